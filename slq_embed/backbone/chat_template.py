"""The chat template of an SLQ model: the backbone's own turn, the text as plain text, the query tokens last.

The saved template is what makes stock loading right and safe, so it is built here once and used everywhere.
It is not written family by family. The backbone's own template is rendered with markers and cut at them. The pieces
are put together again with the text neutralised and capped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from transformers import PretrainedConfig

from slq_embed.backbone.families import family_of, tokenizer_of

DEFAULT_INSTRUCTIONS = {
    "text": "{text}",
    "image": "",
    "composed": "Modify this image with {text}. Describe modified image in one word:",
}
"""The paper's prompts (arXiv:2604.13710): the bare input, and an instruction for an image with a text."""

# Private-use characters: no template spells them.
_TEXT, _SYSTEM, _MEDIA = "\ue000text\ue000", "\ue000system\ue000", "\ue000media\ue000"
_ONE_IMAGE = "This model's chat template cannot repeat an image. Pass one image in each input."
_NO_VIDEO = "This model reads no videos. Pass frames of the video as images."

_BODY = """\
{%- set slq = namespace(system=none, text=none, images=0, videos=0) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- if message['role'] == 'system' -%}{%- set slq.system = message['content'] -%}
{%- else -%}{%- set slq.text = (slq.text or '') + message['content'] -%}{%- endif -%}
{%- else -%}
{%- if message['role'] == 'system' -%}{%- set slq.system = '' -%}{%- endif -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set slq.images = slq.images + 1 -%}
{%- elif part['type'] == 'video' -%}{%- set slq.videos = slq.videos + 1 -%}
{%- elif part['type'] == 'text' -%}
{%- if message['role'] == 'system' -%}{%- set slq.system = (slq.system or '') + part['text'] -%}
{%- else -%}{%- set slq.text = (slq.text or '') + part['text'] -%}{%- endif -%}
{%- else -%}{{ raise_exception("A message has a part that is no text, image or video. If you passed chats beside other inputs, encode the chats in a call of their own.") }}
{%- endif -%}{%- endfor -%}{%- endif -%}{%- endfor -%}
"""
"""What is read of the messages. Of several system messages the last one counts: a chat's own comes after the host's prompt.

Another part is refused, not left out: the host makes one of a chat that stands beside other inputs.
"""
_BODY_END = _BODY.splitlines(keepends=True)[-1]
_PROMPTS = re.compile(r"{%- set slq\.system = {.*}\.get\(slq_task.*? else slq\.system -%}")  # JSON holds no line break


def control_strings(processor: Any) -> list[str]:
    """Every string that the processor does not read as plain text.

    Args:
        processor: A transformers processor with a ``tokenizer``.

    Returns:
        Added tokens that are not white space, and placeholder strings such as ``image_token``.
    """
    tokenizer = tokenizer_of(processor)
    strings = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    strings |= {value for name, value in vars(processor).items() if name.endswith("_token") and isinstance(value, str)}
    return sorted(token for token in strings if token.strip())


def neutralising_filters(controls: Iterable[str]) -> str:
    """Jinja filters after which a text spells none of the control strings.

    Each control string is broken by a space after its first character: ``<|im_end|>`` becomes ``< |im_end|>``.
    Two characters decide, so one ``replace`` serves all strings that begin alike.

    Example:
        >>> neutralising_filters(["<|im_end|>", "<|image_pad|>"])
        '| replace("<|", "< |")'
    """
    return " ".join(f"| replace({json.dumps(start)}, {json.dumps(broken)})" for start, broken in _breaks(controls))


def neutralise(text: str, controls: Iterable[str]) -> str:
    """The text as :func:`neutralising_filters` leave it.

    Example:
        >>> neutralise("a <|im_end|> b", ["<|im_end|>"])
        'a < |im_end|> b'
    """
    for start, broken in _breaks(controls):
        text = text.replace(start, broken)
    return text


def _breaks(controls: Iterable[str]) -> list[tuple[str, str]]:
    breaks = []
    for start in sorted({control[:2] for control in controls}):
        # A doubled character can stand three times in a row, which one pass leaves half done.
        breaks += [(start, f"{start[0]} {start[1:]}")] * (2 if len(start) == 2 and start[0] == start[1] else 1)
    return breaks


def is_slq_template(template: Any) -> bool:
    """Whether this is a template of :func:`build_chat_template`."""
    return isinstance(template, str) and template.startswith(_BODY[: _BODY.index("text=none")])


def reads_videos(processor: Any, config: PretrainedConfig) -> bool:
    """Whether processor and family read videos, and the template of :func:`build_chat_template` has a place for them."""
    if not family_of(config).reads_videos:
        return False
    if getattr(processor, "video_processor", None) is None or not is_slq_template(processor.chat_template):
        return False
    return "range(slq.videos)" in processor.chat_template and _NO_VIDEO not in processor.chat_template


def build_chat_template(
    processor: Any,
    query_tokens: Iterable[str],
    *,
    max_text_chars: int,
    instructions: Mapping[str, str] | None = None,
) -> str:
    """Write the template that puts any input into one user turn and appends the query tokens.

    Args:
        processor: The backbone's processor, with its own chat template.
        query_tokens: Strings of the query tokens, in order.
        max_text_chars: Longest text that is read, in characters; the rest is cut so that no query can be lost.
        instructions: Text of the user turn for ``"text"``, ``"image"`` (images or videos without a text) and
            ``"composed"`` inputs, with ``{text}`` where the input's text belongs. Missing ones are :data:`DEFAULT_INSTRUCTIONS`.

    Returns:
        A Jinja template in the transformers chat format.

    Raises:
        ValueError: If an instruction is unknown or lacks ``{text}``, or the processor has no usable template, or one with
            query tokens.
    """
    if is_slq_template(processor.chat_template):
        raise ValueError(
            "The processor's chat template appends latent queries already. Pass the backbone's own processor, or none, and it "
            "is loaded by the backbone's name. For more queries on an encoder's backbone, call its with_queries()."
        )
    texts = {**DEFAULT_INSTRUCTIONS, **(instructions or {})}
    if unknown := set(texts) - set(DEFAULT_INSTRUCTIONS):
        raise ValueError(f"Unknown instructions {sorted(unknown)}: use {sorted(DEFAULT_INSTRUCTIONS)}.")
    for kind in ("text", "composed"):
        if texts[kind].count("{text}") != 1:
            raise ValueError(
                f"The {kind!r} instruction is {texts[kind]!r}, but it must hold {{text}} once, where the text belongs."
            )
    controls = control_strings(processor)
    clean = neutralising_filters(controls)
    text = f"{{{{ ((slq.text or '')[:{max_text_chars}]) {clean} }}}}"
    system = f"{{{{ (slq.system[:{max_text_chars}]) {clean} }}}}"

    def turn(with_media: bool, with_text: bool, with_system: bool) -> str:
        kind = "composed" if with_media and with_text else "image" if with_media else "text"
        marked = texts[kind].replace("{text}", _TEXT)
        if with_media:
            rendered, media = _cut_out_media(
                lambda images, videos: _render_turn(processor, marked, images, videos, with_system),
                getattr(processor, "video_processor", None) is not None,
                tuple(controls),
            )
        else:
            rendered, media = _render_turn(processor, marked, 0, 0, with_system), ""
        filled = {_TEXT: text, _SYSTEM: system, _MEDIA: media}
        pieces = re.split(f"({'|'.join(filled)})", rendered)
        return "".join(filled.get(piece, _literal(piece)) for piece in pieces)

    conditions = [("slq.system", (False, True, True))]
    if tokenizer_of(processor) is not processor:  # a tokenizer alone reads no images
        media = "(slq.images or slq.videos)"
        conditions = [
            (f"{media} and slq.text is not none and slq.system", (True, True, True)),
            (f"{media} and slq.text is not none", (True, True, False)),
            (f"{media} and slq.system", (True, False, True)),
            (media, (True, False, False)),
            *conditions,
        ]
    cases = [
        f"{{%- {'if' if number == 0 else 'elif'} {condition} -%}}{turn(*flags)}"
        for number, (condition, flags) in enumerate(conditions)
    ]
    queries = _literal("".join(query_tokens))
    return f"{_BODY}{''.join(cases)}{{%- else -%}}{turn(False, True, False)}{{%- endif -%}}{queries}"


def replace_queries(template: str, before: Iterable[str], after: Iterable[str]) -> str:
    """A template of :func:`build_chat_template` with other query tokens.

    Args:
        template: The template.
        before: Strings of its query tokens.
        after: Strings of the new ones.

    Raises:
        ValueError: If the template does not end with those query tokens.
    """
    ending = _literal("".join(before))
    if not template.endswith(ending):
        raise ValueError("The chat template does not end with the model's query tokens: it was changed after loading.")
    return template[: len(template) - len(ending)] + _literal("".join(after))


def with_prompts(template: str, prompts: Mapping[str, str], default: str = "") -> str:
    """A template of :func:`build_chat_template` that knows prompts, for servers, which do not read those of a folder.

    Args:
        template: The template. Prompts that it knows already are dropped.
        prompts: Prompts by the name of the task, which a request passes as the template's argument ``slq_task``. Another
            name, such as ``"none"``, stands for no prompt. A system message of the request goes before.
        default: The prompt of requests that pass no ``slq_task``.

    Raises:
        ValueError: If the template is not one of :func:`build_chat_template`.
    """
    template = without_prompts(template)
    if not (written := {task: prompt for task, prompt in {**prompts, "default": default}.items() if prompt}):
        return template
    chosen = f'{json.dumps(written, ensure_ascii=False)}.get(slq_task if slq_task is defined else "default")'
    return _insert(template, f"{{%- set slq.system = {chosen} if slq.system is none else slq.system -%}}")


def with_start(template: str, start: str) -> str:
    """A template of :func:`build_chat_template` that begins every chat with this text, such as a token that a tokenizer would add."""
    return _insert(template, _literal(start)) if start else template


def _insert(template: str, piece: str) -> str:
    """A template with a piece more: after the messages are read, and before anything is written."""
    body, end, turns = template.partition(_BODY_END)
    if not is_slq_template(template) or not end:
        raise ValueError("The chat template is not one of slq-embed: it was changed after loading.")
    return f"{body}{end}{piece}{turns}"


def without_prompts(template: str) -> str:
    """A template without what :func:`with_prompts` has written: here, prompts come as system messages."""
    return _PROMPTS.sub("", template)


def _literal(text: str) -> str:
    # A Jinja string, because template text next to {%- -%} loses its white space.
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def _cut_out_media(render: Callable[[int, int], str], videos: bool, controls: tuple[str, ...]) -> tuple[str, str]:
    """Find what a turn writes for each image and each video.

    Args:
        render: Renders the turn with so many images and videos.
        videos: Whether the processor reads any.
        controls: Control strings: what is written for an image begins with one, if it can be cut in several ways.

    Returns:
        The turn, with a marker in place of its media, and the Jinja code for the media.
    """
    one = render(1, 0)
    cuts = _cuts(one, [_or_none(render, count, 0) for count in (2, 3)], controls)
    if not cuts:  # such as a template that numbers its images
        return f"{_MEDIA}{one}", _refusal("slq.images > 1", _ONE_IMAGE) + _refusal("slq.videos", _NO_VIDEO)
    for before, image, after in cuts if videos else ():
        rendered = _or_none(render, 0, 1)
        if rendered is None or not (rendered.startswith(before) and rendered.endswith(after)):
            continue
        video = rendered[len(before) : len(rendered) - len(after)]
        alike = (rendered, f"{before}{video * 2}{after}", f"{before}{image}{video}{after}")
        if video not in ("", image) and alike == tuple(
            _or_none(render, *counts) for counts in ((0, 1), (0, 2), (1, 1))
        ):
            return f"{before}{_MEDIA}{after}", _loop("images", image) + _loop("videos", video)
    before, image, after = cuts[0]
    return f"{before}{_MEDIA}{after}", _loop("images", image) + _refusal("slq.videos", _NO_VIDEO)


def _cuts(one: str, more: list[str | None], controls: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """All ways to cut a turn so that repeating its middle gives the turns with more images."""
    length = len(more[0] or "") - len(one)
    cuts = []
    for start in range(len(one) - length + 1) if length > 0 else ():
        before, piece, after = one[:start], one[start : start + length], one[start + length :]
        if more == [f"{before}{piece * count}{after}" for count in range(2, 2 + len(more))]:
            cuts.append((before, piece, after))
    return sorted(cuts, key=lambda cut: not cut[1].startswith(controls))


def _or_none(render: Callable[[int, int], str], images: int, videos: int) -> str | None:
    try:
        return render(images, videos)
    except ValueError:  # the template refuses so many
        return None


def _loop(name: str, piece: str) -> str:
    return f"{{%- for _ in range(slq.{name}) -%}}{_literal(piece)}{{%- endfor -%}}"


def _refusal(condition: str, message: str) -> str:
    return f"{{%- if {condition} -%}}{{{{ raise_exception({json.dumps(message)}) }}}}{{%- endif -%}}"


def shows_system(processor: Any) -> bool:
    """Whether a processor's own chat template has a place for a system message."""
    with suppress(Exception):  # of a template that knows no system role
        return _render(processor, _TEXT, 0, 0, True).count("\ue000") == 4
    return False


def _render_turn(processor: Any, text: str, images: int, videos: int, system: bool) -> str:
    expected = (_TEXT in text) + system
    if system:
        with suppress(Exception):  # of a template that knows no system role
            if (rendered := _render(processor, text, images, videos, True)).count("\ue000") == 2 * expected:
                return rendered
        text = f"{_SYSTEM}\n\n{text}"
    try:
        rendered = _render(processor, text, images, videos, False)
    except Exception as error:
        raise ValueError(
            f"The chat template of {type(processor).__name__} cannot render a user turn: {error}. "
            "Give the processor of an instruction-tuned checkpoint."
        ) from error
    if rendered.count("\ue000") != 2 * expected:
        raise ValueError(
            f"The chat template of {type(processor).__name__} does not write its text and system prompt once each. "
            "Give a processor whose template shows every message as it is."
        )
    return rendered


def _render(processor: Any, text: str, images: int, videos: int, system: bool) -> str:
    content: list[dict[str, str]] = [{"type": "image"}] * images + [{"type": "video"}] * videos
    if text:
        content.append({"type": "text", "text": text})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": _SYSTEM}]})
    if tokenizer_of(processor) is processor:
        messages = as_strings(messages)
    return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def as_strings(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates of text models expect them: each with its one text in place of a list of parts."""
    return [{"role": message["role"], "content": message["content"][0]["text"]} for message in messages]

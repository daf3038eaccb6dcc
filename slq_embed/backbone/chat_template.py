"""The chat template of an SLQ model: the backbone's own turn, the text as plain text, the query tokens last.

The saved template is what makes stock loading right and safe, so it is built here once and used everywhere.
It is not written family by family. The backbone's own template is rendered with markers and cut at them. The pieces
are put together again with the text neutralised and capped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from slq_embed.backbone.families import tokenizer_of

DEFAULT_INSTRUCTIONS = {
    "text": "{text}",
    "image": "",
    "composed": "Modify this image with {text}. Describe modified image in one word:",
}
"""The paper's prompts (arXiv:2604.13710): the bare input, and an instruction for an image with a text."""

_TEXT, _SYSTEM = "\ue000text\ue000", "\ue000system\ue000"  # private-use characters: no template spells them

_BODY = """\
{%- set slq = namespace(system=none, text=none, image=false) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- if message['role'] == 'system' -%}{%- set slq.system = message['content'] -%}
{%- else -%}{%- set slq.text = (slq.text or '') + message['content'] -%}{%- endif -%}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set slq.image = true -%}
{%- elif part['type'] == 'text' -%}
{%- if message['role'] == 'system' -%}{%- set slq.system = (slq.system or '') + part['text'] -%}
{%- else -%}{%- set slq.text = (slq.text or '') + part['text'] -%}{%- endif -%}
{%- endif -%}{%- endfor -%}{%- endif -%}{%- endfor -%}
"""


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
    return isinstance(template, str) and template.startswith(_BODY[: _BODY.index("-%}")])


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
        instructions: Text of the user turn for ``"text"``, ``"image"`` and ``"composed"`` inputs, with
            ``{text}`` where the input's text belongs. Missing ones are :data:`DEFAULT_INSTRUCTIONS`.

    Returns:
        A Jinja template in the transformers chat format.

    Raises:
        ValueError: If an instruction is unknown or lacks ``{text}``, or the processor has no usable template.
    """
    texts = {**DEFAULT_INSTRUCTIONS, **(instructions or {})}
    if unknown := set(texts) - set(DEFAULT_INSTRUCTIONS):
        raise ValueError(f"Unknown instructions {sorted(unknown)}: use {sorted(DEFAULT_INSTRUCTIONS)}.")
    for kind in ("text", "composed"):
        if texts[kind].count("{text}") != 1:
            raise ValueError(
                f"The {kind!r} instruction is {texts[kind]!r}, but it must hold {{text}} once, where the text belongs."
            )
    clean = neutralising_filters(control_strings(processor))
    text = f"{{{{ ((slq.text or '')[:{max_text_chars}]) {clean} }}}}"
    system = f"{{{{ (slq.system[:{max_text_chars}]) {clean} }}}}"

    def turn(image: bool, with_text: bool, with_system: bool) -> str:
        kind = "composed" if image and with_text else "image" if image else "text"
        marked = texts[kind].replace("{text}", _TEXT)
        pieces = re.split(f"({_TEXT}|{_SYSTEM})", _render_turn(processor, marked, image, with_system))
        return "".join({_TEXT: text, _SYSTEM: system}.get(piece, _literal(piece)) for piece in pieces)

    conditions = [("slq.system", (False, True, True))]
    if tokenizer_of(processor) is not processor:  # a tokenizer alone reads no images
        conditions = [
            ("slq.image and slq.text is not none and slq.system", (True, True, True)),
            ("slq.image and slq.text is not none", (True, True, False)),
            ("slq.image and slq.system", (True, False, True)),
            ("slq.image", (True, False, False)),
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


def _literal(text: str) -> str:
    # A Jinja string, because template text next to {%- -%} loses its white space.
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def _render_turn(processor: Any, text: str, image: bool, system: bool) -> str:
    expected = (_TEXT in text) + system

    def render(text: str, system: bool) -> str:
        content: list[dict[str, str]] = [{"type": "image"}] if image else []
        if text:
            content.append({"type": "text", "text": text})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": _SYSTEM}]})
        if tokenizer_of(processor) is processor:  # templates of text models expect strings
            messages = [{"role": message["role"], "content": message["content"][0]["text"]} for message in messages]
        return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    if system:
        with suppress(Exception):  # of a template that knows no system role
            if (rendered := render(text, True)).count("\ue000") == 2 * expected:
                return rendered
        text = f"{_SYSTEM}\n\n{text}"
    try:
        rendered = render(text, False)
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

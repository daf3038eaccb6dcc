from __future__ import annotations

import pytest
from jinja2 import Environment, TemplateError
from transformers import AutoProcessor, Qwen3VLConfig

from slq_embed.backbone.chat_template import (
    build_chat_template,
    neutralising_filters,
    reads_videos,
    with_prompts,
    without_prompts,
)
from tests.families import others


def clean(text: str, controls: list[str]) -> str:
    return Environment().from_string("{{ text " + neutralising_filters(controls) + " }}").render(text=text)


@pytest.mark.parametrize(
    ("controls", "text"),
    [
        (["<|im_end|>"], "a <|im_end|> b <<|im_end|>"),
        (["[INST]", "</s>"], "[INST] x [[INST]</s>"),
        (["[[A]]"], "[[A]] [[[A]] [[[[A]]"),
        (['"quoted"'], 'say "quoted"'),
    ],
)
def test_no_control_string_survives(controls, text):
    cleaned = clean(text, controls)
    assert not any(control in cleaned for control in controls)
    assert cleaned.replace(" ", "") == text.replace(" ", "")


def test_plain_text_is_left_alone():
    assert clean("a < b, c > d: 100 %", ["<|im_end|>", "</s>"]) == "a < b, c > d: 100 %"


@pytest.fixture
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint())


def render(processor, template: str, *content, system: str | None = None) -> str:
    chat = [{"role": "user", "content": list(content)}]
    if system is not None:
        chat.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return processor.apply_chat_template(chat, chat_template=template, tokenize=False)


def test_the_turn_is_the_backbones_own_and_ends_with_the_queries(processor):
    template = build_chat_template(processor, ["<|slq_0|>", "<|slq_1|>"], max_text_chars=50)
    text, image = {"type": "text", "text": "hi"}, {"type": "image"}
    own = processor.apply_chat_template([{"role": "user", "content": [text]}], add_generation_prompt=True)
    assert render(processor, template, text) == own + "<|slq_0|><|slq_1|>"
    assert render(processor, template, image, text) == render(processor, template, text, image)
    assert "<|im_start|>system\nfind<|im_end|>" in render(processor, template, image, system="find")


def test_texts_and_prompts_are_capped_and_neutralised(processor):
    template = build_chat_template(processor, ["<|slq_0|>"], max_text_chars=20)
    said = render(
        processor, template, {"type": "text", "text": "<|im_end|>" + "x" * 99}, system="<|im_end|>" + "y" * 99
    )
    assert said.count("<|im_end|>") == 2
    assert (said.count("x"), said.count("y")) == (10, 11)  # one y of "system"
    assert said.endswith("<|slq_0|>")


@pytest.mark.parametrize("parts", [False, True])
def test_of_several_system_messages_the_last_one_counts(processor, parts):
    """The host puts its prompt before a chat's own system message."""
    template = build_chat_template(processor, ["<|slq_0|>"], max_text_chars=50)
    told = [[{"type": "text", "text": text}] if parts else text for text in ("prompt", "own", "hi")]
    roles = ("system", "system", "user")
    chat = [{"role": role, "content": content} for role, content in zip(roles, told, strict=True)]
    said = processor.apply_chat_template(chat, chat_template=template, tokenize=False)
    assert said == processor.apply_chat_template(chat[1:], chat_template=template, tokenize=False)
    assert "system\nown<|im_end|>" in said


OLD = {"query": "OLD-Q", "document": '}.get(slq_task) "OLD-D" -%} \n x'}


def test_prompts_in_a_template_are_replaced_not_stacked(processor):
    plain = build_chat_template(processor, ["<|slq_0|>"], max_text_chars=50)
    chat = [{"role": "user", "content": "hi"}]

    def said(template, **arguments):
        return processor.apply_chat_template(chat, chat_template=template, tokenize=False, **arguments)

    old = with_prompts(plain, OLD, default="OLD-0")
    assert "OLD-Q" in said(old, slq_task="query")
    assert "OLD-D" in said(old, slq_task="document")
    assert "OLD-0" in said(old)
    assert said(old, slq_task="none") == said(plain)
    new = with_prompts(old, {"query": "NEW-Q", "document": ""})
    assert "NEW-Q" in said(new, slq_task="query")
    assert "OLD" not in new
    assert said(new) == said(new, slq_task="document") == said(plain)
    assert with_prompts(new, {"query": ""}) == without_prompts(old) == plain
    with pytest.raises(ValueError, match="not one of slq-embed"):
        with_prompts("{{ messages }}", OLD)


def test_a_template_of_before_takes_prompts_too(processor):
    plain = build_chat_template(processor, ["<|slq_0|>"], max_text_chars=50)
    before = plain.replace("{%- if message['role'] == 'system' -%}{%- set slq.system = '' -%}{%- endif -%}\n", "")
    assert before != plain
    setting = '{%- set slq.system = {"query": "OLD"}.get(slq_task) if slq_task is defined and slq.system is none else slq.system -%}'
    head, _, turns = before.partition("{%- if (slq.images")
    exported = f"{head}{setting}{{%- if (slq.images{turns}"
    assert without_prompts(exported) == before
    chat = [{"role": "user", "content": "hi"}]
    written = with_prompts(exported, {"query": "NEW"})
    assert "OLD" not in written
    assert "NEW" in processor.apply_chat_template(chat, chat_template=written, tokenize=False, slq_task="query")


def test_instructions_are_text_of_the_user_turn(processor):
    told = {"image": "One word:", "text": "Say: {text}.", "composed": "Change by {text}:"}
    template = build_chat_template(processor, ["<|slq_0|>"], max_text_chars=20, instructions=told)
    text, image = {"type": "text", "text": "hi"}, {"type": "image"}
    assert "Say: hi.<|im_end|>" in render(processor, template, text)
    assert "<|vision_end|>One word:<|im_end|>" in render(processor, template, image)
    assert "<|vision_end|>Change by hi:<|im_end|>" in render(processor, template, image, text)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"video": "x"}, "Unknown instructions"),
        ({"text": "no place"}, "must hold"),
        ({"composed": "{text}{text}"}, "once"),
    ],
)
def test_a_wrong_instruction_is_refused(processor, told, message):
    with pytest.raises(ValueError, match=message):
        build_chat_template(processor, ["<|slq_0|>"], max_text_chars=20, instructions=told)


def test_images_and_videos_are_written_as_often_as_they_come(processor):
    own = processor.chat_template
    template = build_chat_template(processor, ["<|slq_0|>"], max_text_chars=20, instructions={"composed": "{text}"})
    text, image, video = {"type": "text", "text": "hi"}, {"type": "image"}, {"type": "video"}
    for content in ([image], [image, image], [image] * 4, [video], [image, video, video]):
        for more in ([], [text]):
            chat = [{"role": "user", "content": [*content, *more]}]
            expected = processor.apply_chat_template(
                chat, chat_template=own, add_generation_prompt=True, tokenize=False
            )
            assert render(processor, template, *content, *more) == expected + "<|slq_0|>"
            assert render(processor, template, *more, *content[::-1]) == expected + "<|slq_0|>"


@pytest.mark.parametrize("separator", ["", "\n", " and <|vision_start|>"])
def test_what_stands_between_images_is_kept(processor, separator):
    own = processor.chat_template.replace("<|vision_end|>", "<|vision_end|>" + separator)
    processor.chat_template = own
    template = build_chat_template(processor, ["<|slq_0|>"], max_text_chars=20)
    content = [{"type": "image"}] * 3 + [{"type": "video"}] * 2
    chat = [{"role": "user", "content": content}]
    expected = processor.apply_chat_template(chat, chat_template=own, add_generation_prompt=True, tokenize=False)
    assert render(processor, template, *content) == expected + "<|slq_0|>"


def test_a_template_that_numbers_its_images_takes_one(processor):
    """Repeating what it writes for one would not be its own turn."""
    processor.chat_template = processor.chat_template.replace(
        "<|vision_start|><|image_pad|>", "Picture {{ loop.index }}: <|vision_start|><|image_pad|>"
    )
    template = build_chat_template(processor, ["<|slq_0|>"], max_text_chars=20)
    assert "Picture 1: <|vision_start|><|image_pad|>" in render(processor, template, {"type": "image"})
    with pytest.raises(TemplateError, match="cannot repeat an image"):
        render(processor, template, {"type": "image"}, {"type": "image"})


def test_a_template_without_videos_refuses_them(processor):
    named = "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    assert reads_videos_with(processor, processor.chat_template)
    for without in (
        "{% elif part.type == 'video' %}",
        "{% elif part.type == 'video' %}<|vision_start|><|image_pad|><|vision_end|>",
    ):
        template = processor.chat_template.replace(named, without)
        assert template != processor.chat_template
        assert not reads_videos_with(processor, template)
    processor.video_processor = None
    assert not reads_videos_with(processor, processor.chat_template)


def reads_videos_with(processor, template: str) -> bool:
    own, processor.chat_template = processor.chat_template, template
    try:
        processor.chat_template = build_chat_template(processor, ["<|slq_0|>"], max_text_chars=20)
        if not (found := reads_videos(processor, Qwen3VLConfig())):
            with pytest.raises(TemplateError, match="reads no videos"):
                render(processor, processor.chat_template, {"type": "video"})
        return found
    finally:
        processor.chat_template = own


def test_a_template_that_hides_its_text_is_refused(processor):
    processor.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(ValueError, match="does not write its text"):
        build_chat_template(processor, ["<|slq_0|>"], max_text_chars=20)
    processor.chat_template = None
    processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="instruction-tuned"):
        build_chat_template(processor, ["<|slq_0|>"], max_text_chars=20)


def test_without_a_system_role_the_prompt_stands_before_the_text():
    """Gemma's templates raise an error for one."""
    tokenizer = others.gemma().processor
    tokenizer.chat_template = build_chat_template(tokenizer, ["<|slq_0|>"], max_text_chars=50)
    chat = [{"role": "system", "content": "find"}, {"role": "user", "content": "hi"}]
    said = tokenizer.apply_chat_template(chat, tokenize=False)
    assert "<|im_start|>user\nfind\n\nhi<|im_end|>" in said
    assert said.endswith("<|slq_0|>")

"""A folder for vLLM: what it names, that all else loads it, what is refused. make test-vllm serves it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import transformers
from packaging.version import Version
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from slq_embed import SLQEncoder
from slq_embed.saving import export_vllm
from tests.parts import PARTS, build, trained
from tests.vllm.backbones import build_llava_that_begins_texts

PROMPTS = {"query": "find the picture", "document": ""}
INSIDE = PARTS["all" if Version(transformers.__version__) >= Version("5.23") else "deep"]  # older ones load no adapter


@pytest.mark.parametrize(
    "options", [{}, {"projection": 16}, {"pooling": "last"}, {"pooling": "weighted"}, INSIDE], ids=str
)
def test_all_that_loads_a_merged_folder_loads_it(checkpoint, mixed, options, tmp_path):
    encoder = trained(build(checkpoint, prompts=PROMPTS, **options))
    export_vllm(encoder, tmp_path)
    assert np.array_equal(SLQEncoder(tmp_path).encode_query(mixed), encoder.encode_query(mixed))
    stock = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=options is INSIDE)
    assert np.abs(stock.encode_query(mixed) - encoder.encode_query(mixed)).max() < 1e-6
    assert encoder.slq_config.form == "adapter", "the model in memory is as it was"


@pytest.mark.parametrize("options", [{}, {"deep_queries": True}, {"pooling": "last"}], ids=["mean", "deep", "last"])
def test_a_merged_folder_names_an_architecture_that_servers_do_not_know(checkpoint, options, tmp_path):
    encoder = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cpu", **options)
    encoder.save_pretrained(tmp_path, form="merged")
    named = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert named == ["SLQQwen3VLForConditionalGeneration"]
    assert not set(named) & set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    assert AutoConfig.from_pretrained(tmp_path).architectures == named
    SLQEncoder(tmp_path).save_pretrained(tmp_path / "again", form="merged")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == named, "not twice"


def test_the_template_knows_the_prompts(encoder, tmp_path):
    encoder.prompts = {"query": 'find "it" <|im_end|>', "passage": "read it"}
    export_vllm(encoder, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    system = [{"role": "system", "content": [{"type": "text", "text": "another"}]}]

    def render(messages, **arguments):
        return processor.apply_chat_template(messages, tokenize=False, **arguments)

    plain = encoder.processor.apply_chat_template(chat, tokenize=False)
    assert render(chat) == render(chat, slq_task="unknown") == plain
    assert 'find "it" < |im_end|>' in render(chat, slq_task="query"), "it spells no control token"
    assert "read it" in render(chat, slq_task="document")
    assert render([*system, *chat], slq_task="query") == render([*system, *chat])


def test_a_default_prompt_is_the_servers_and_is_not_applied_twice(checkpoint, mixed, tmp_path):
    """What loads the folder sends its prompt as a system message, or none; a server knows only what a request names."""
    encoder = SLQEncoder.from_backbone(
        checkpoint(), num_queries=4, seed=0, device="cpu", prompts={"all": "look at it"}, default_prompt_name="all"
    )
    export_vllm(encoder, tmp_path / "a")
    again, stock = SLQEncoder(tmp_path / "a", device="cpu"), SentenceTransformer(str(tmp_path / "a"), device="cpu")
    for options in ({}, {"prompt": ""}, {"prompt_name": "document"}, {"prompt": "another"}):
        expected = encoder.encode(mixed, **options)
        assert np.array_equal(again.encode(mixed, **options), expected), options
        assert np.abs(stock.encode(mixed, **options) - expected).max() < 1e-6, options
    assert np.abs(encoder.encode(mixed) - encoder.encode(mixed, prompt="")).max() > 1e-3, "the prompt changes nothing"
    chat = [{"role": "user", "content": "a"}]
    processor = AutoProcessor.from_pretrained(tmp_path / "a")
    assert "look at it" in processor.apply_chat_template(chat, tokenize=False)
    again.save_pretrained(tmp_path / "b", form="merged")
    assert "look at it" not in (tmp_path / "b" / "chat_template.jinja").read_text("utf8"), (
        "stock loading would apply it"
    )


def test_a_folder_that_is_loaded_and_exported_again_has_the_new_prompts_only(encoder, tmp_path):
    encoder.prompts = {"query": "OLD", "document": "OLD"}
    export_vllm(encoder, tmp_path / "a")
    again = SLQEncoder(tmp_path / "a", device="cpu")
    again.prompts = {"query": "NEW", "document": ""}
    export_vllm(again, tmp_path / "b")
    template = (tmp_path / "b" / "chat_template.jinja").read_text("utf8")
    assert "NEW" in template
    assert "OLD" not in template


@pytest.mark.parametrize("content", ["Look.", [{"type": "text", "text": "Look."}]], ids=["a str", "parts"])
def test_a_chats_own_system_message_takes_the_place_of_the_prompt(checkpoint, content, tmp_path):
    encoder = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cpu", prompts=PROMPTS)
    encoder.save_pretrained(tmp_path)
    chats = [[{"role": "system", "content": content}, {"role": "user", "content": "a red circle"}]]
    expected = encoder.encode(chats)
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    for options in ({}, {"prompt_name": "query"}):
        assert np.array_equal(encoder.encode(chats, **options), expected)
        assert np.abs(stock.encode(chats, **options) - expected).max() < 1e-6
    assert np.abs(encoder.encode([chats[0][1:]]) - expected).max() > 1e-3


def test_queries_with_a_token_type_of_their_own_are_refused(encoder, tmp_path):
    encoder.slq_config.query_token_type = 1
    with pytest.raises(ValueError, match="vLLM cannot serve this model: its queries have a token type of their own"):
        export_vllm(encoder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_token_that_the_processor_adds_at_the_start_is_in_the_template(mixed, tmp_path):
    """vLLM tokenizes a rendered chat as it is; processors do not add the token again."""
    encoder = SLQEncoder.from_backbone(
        build_llava_that_begins_texts(tmp_path / "backbone"), num_queries=4, device="cpu"
    )
    assert encoder.preprocess(["a"])["input_ids"][0, 0] == encoder.tokenizer.bos_token_id
    export_vllm(encoder, tmp_path / "model")
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert processor.apply_chat_template(chat, tokenize=False).startswith("<|im_start|>[user")
    for loaded in (SLQEncoder(tmp_path / "model"), SentenceTransformer(str(tmp_path / "model"), device="cpu")):
        assert np.abs(loaded.encode(mixed) - encoder.encode(mixed)).max() < 1e-6
    export_vllm(SLQEncoder(tmp_path / "model"), tmp_path / "again")
    template = "chat_template.jinja"
    assert (tmp_path / "again" / template).read_text() == (tmp_path / "model" / template).read_text()


def test_another_token_at_the_start_is_refused(tmp_path):
    backbone = build_llava_that_begins_texts(tmp_path / "backbone", named=False)
    encoder = SLQEncoder.from_backbone(backbone, num_queries=4, device="cpu")
    with pytest.raises(ValueError, match="puts more tokens around a chat than the tokenizer's bos_token"):
        export_vllm(encoder, tmp_path / "model")

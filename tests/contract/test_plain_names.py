"""Names of weights, and of tokens, that plain Sentence Transformers could look for in vain: mended, or refused before training."""

from __future__ import annotations

import json

import pytest

from slq_embed import QueryAdapter, SLQEncoder
from slq_embed.backbone.families import load_backbone
from slq_embed.saving.plain_names import key_mapping
from tests.families import FAMILIES
from tests.families.building import write

pytest.importorskip("transformers.models.unlimited_ocr", reason="measured with 5.23")


def built(name, tmp_path, **options):
    folder = write(tmp_path / "backbone", FAMILIES[name][1]())
    return SLQEncoder.from_backbone(folder, num_queries=4, device="cpu", **options)


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_saved_folder_says_that_the_names_begin_with_the_decoders(form, tmp_path):
    encoder = built("lighton_ocr", tmp_path)
    encoder.save_pretrained(tmp_path / "saved", form=form)
    settings = json.loads((tmp_path / "saved" / "sentence_bert_config.json").read_text("utf8"))
    assert settings["model_kwargs"] == {"key_mapping": {r"^model\.": ""}}


def test_other_backbones_need_no_mapping(checkpoint):
    assert key_mapping(load_backbone(str(checkpoint()))) == {}


@pytest.mark.parametrize("name", ["deepseek_ocr2", "unlimited_ocr"])
def test_an_adapter_whose_weights_would_be_renamed_is_refused_before_training(name, tmp_path):
    message = f"changes the names of an adapter's weights on a {name}.* Use form='merged', without a query adapter"
    with pytest.raises(ValueError, match=message):
        built(name, tmp_path)
    encoder = built(name, tmp_path, form="merged")
    with pytest.raises(ValueError, match=message):
        encoder.save_pretrained(tmp_path / "saved", form="adapter")
    with pytest.raises(ValueError, match=message):
        encoder.with_queries(2, query_adapter=QueryAdapter(rank=2))


PARTS = [{"deep_queries": True}, {"query_adapter": QueryAdapter(rank=2)}, {"pooling": "last"}]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: next(iter(part)))
def test_what_acts_at_the_last_tokens_is_refused_where_these_are_no_queries(part, tmp_path):
    message = "processor of this chameleon writes tokens after the queries.* Use a projection head, or another pooling"
    with pytest.raises(ValueError, match=message):
        built("chameleon", tmp_path, **part)
    encoder = built("chameleon", tmp_path, projection=8)
    with pytest.raises(ValueError, match=message):
        encoder.with_queries(2, **part)

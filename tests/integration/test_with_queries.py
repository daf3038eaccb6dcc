"""Other queries on an encoder's backbone: they read what its own read, whatever form it was loaded from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from slq_embed import SLQEncoder
from tests.training import arguments, toy_pairs


@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize(("form", "rows"), [("adapter", {"spare": 7}), ("merged", {"spare": 1})])
def test_a_loaded_model_gives_others_its_template_once(checkpoint, mixed, tmp_path, form, rows, count):
    backbone = checkpoint(**rows)
    told = {"text": "Say {text}."}
    first = SLQEncoder.from_backbone(
        backbone, num_queries=4, seed=0, device="cpu", form=form, instructions=told, max_pixels=1024
    )
    first.prompts["query"], first.default_prompt_name, first.truncate_dim = "Find it.", "query", 16
    first.save_pretrained(tmp_path / "first")
    loaded = SLQEncoder(tmp_path / "first", device="cpu")
    expected = SLQEncoder.from_backbone(
        loaded.backbone,
        backbone_name=str(backbone),
        num_queries=count,
        seed=3,
        form=form,
        instructions=told,
        max_pixels=1024,
        pooling="last",
    )
    made = loaded.with_queries(count, seed=3, pooling="last")
    assert torch.equal(made.queries, expected.queries)
    assert made.processor.chat_template == expected.processor.chat_template
    assert (made.prompts["query"], made.default_prompt_name, made.truncate_dim) == ("Find it.", "query", 16)
    found = made.encode(mixed)
    assert np.abs(found - expected.encode(mixed, prompt="Find it.", truncate_dim=16)).max() < 1e-6
    together = loaded.encode(mixed, query_sets={"made": made, "own": loaded}, prompt="Find it.")
    assert np.abs(together["made"] - found).max() < 1e-6
    made.save_pretrained(tmp_path / "made")
    again = SentenceTransformer(str(tmp_path / "made"), device="cpu")
    assert np.abs(again.encode(mixed[:4]) - found[:4]).max() < 1e-6
    assert np.abs(loaded.encode(mixed) - first.encode(mixed)).max() < 1e-6, "the first is as it was"


def test_a_sweep_starts_from_a_merged_model(checkpoint, tmp_path):
    from slq_embed.training import sweep

    made = SLQEncoder.from_backbone(checkpoint(spare=1), num_queries=4, seed=0, device="cpu", form="merged")
    made.save_pretrained(tmp_path / "merged")
    encoder = SLQEncoder(tmp_path / "merged", device="cpu")
    result = sweep(encoder, arguments(tmp_path, max_steps=2), toy_pairs().dataset, [{"num_queries": n} for n in (2, 6)])
    assert [len(variant.encoder.queries) for variant in result.variants] == [2, 6]
    assert all(np.isfinite(variant.loss) for variant in result.variants)


def test_a_changed_template_is_refused(encoder):
    encoder.processor.chat_template += "{{ 'more' }}"
    with pytest.raises(ValueError, match="does not end with the model's query tokens"):
        encoder.with_queries(2)


def test_the_hosts_arguments_may_come_by_place(encoder, mixed):
    named = encoder.with_queries(2, seed=1)
    encoder.prompts["asked"] = named.prompts["asked"] = "find it."
    by_place = encoder.encode(mixed, "asked", None, 3, False, query_sets={"named": named})["named"]
    assert np.abs(by_place - named.encode(mixed, prompt_name="asked")).max() < 1e-6

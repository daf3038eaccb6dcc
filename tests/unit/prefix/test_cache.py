"""A cache that starts from a prefix: the queries extend it, and leave the prefix as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from slq_embed import SLQEncoder
from slq_embed.prefix.cache import BackboneCache
from slq_embed.prefix.packing import pack_row, unpack_row
from slq_embed.prefix.passes import collate, run_prefix
from tests.families import lfm, newer, newer_others, others, qwen
from tests.families.building import write

BUILDERS = {"qwen3_5": qwen.qwen3_5, "lfm2_vl": lfm.lfm2_vl, "gemma3": others.gemma3}
INDEXED = {"qwen4_exp": newer.qwen4_exp, "glm5_next": newer.glm5_next, "mistral_large4": newer_others.mistral_large4}
BUILDERS |= INDEXED
TEXTS = ["a red circle", "two green stars and a heart"]

pytestmark = [
    pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="measured with 5.23"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of processors, with NumPy 2
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name), build()) for name, build in BUILDERS.items()}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_prefix_can_be_used_again(folders, name, count):
    """One query alone takes a path of its own through convolutions, which writes into their state."""
    module = SLQEncoder.from_backbone(folders[name], num_queries=count, seed=0, device="cpu").transformer
    assert module.schedule == "prefix"
    features = module.preprocess(TEXTS, keyed=False)
    prefix = module.prefix(features)
    first, second = module.query_states(prefix), module.query_states(prefix)
    assert torch.equal(first, second)
    assert (first - module.all_positions(features)).abs().max() < 1e-4
    (gradient,) = torch.autograd.grad(first.square().sum(), module.queries)
    assert gradient.norm() > 0


@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_states_of_fixed_size_are_packed_exactly(folders, precision):
    module = SLQEncoder.from_backbone(folders["qwen3_5"], num_queries=2, seed=0, device="cpu").transformer
    row, _ = run_prefix(module.query_decoder, module.preprocess(TEXTS, keyed=False))
    assert sorted(row.states) == ["0.conv.0", "0.recurrent.0", "2.conv.0", "2.recurrent.0"]
    assert [len(layer) for layer in row.layers] == [0, 2, 0, 2]
    back = unpack_row(pack_row(row, precision), torch.float32, torch.device("cpu"))
    assert [len(layer) for layer in back.layers] == [0, 2, 0, 2]
    assert all(torch.equal(back.states[name], state) for name, state in row.states.items())
    assert (back.length, back.last_position, back.axes) == (row.length, row.last_position, row.axes)


@pytest.mark.parametrize("name", INDEXED)
def test_what_an_indexer_keeps_is_a_part_of_the_prefix_that_no_store_can_keep(folders, name):
    module = SLQEncoder.from_backbone(folders[name], num_queries=2, seed=0, device="cpu").transformer
    rows = run_prefix(module.query_decoder, module.preprocess(TEXTS, keyed=False))
    parts = next(layer for layer in rows[0].layers if len(layer) > 2)
    assert {part.shape[1] for part in parts} == {rows[0].length}
    with pytest.raises(ValueError, match="which a store cannot keep"):
        pack_row(rows[0], "exact")


def test_positions_that_an_indexer_keeps_stay_whole_numbers_in_half_precision(folders):
    """From 257 on, bfloat16 has no odd numbers."""
    module = SLQEncoder.from_backbone(folders["qwen4_exp"], num_queries=2, seed=0, device="cpu").transformer
    rows = run_prefix(module.query_decoder, module.preprocess(["a red circle " * 120], keyed=False))
    (*_, layer) = collate(rows, torch.device("cpu"), torch.bfloat16).layers
    assert rows[0].length > 300
    assert [part.dtype for part in layer] == [torch.bfloat16] * 3 + [torch.int64]
    assert layer[3][0, 0, :, 0].tolist() == list(range(rows[0].length))


@pytest.mark.parametrize(
    ("config", "words"), [("falcon_h1", "keeps its state in a"), ("mamba2", "would have no length")]
)
def test_other_states_are_refused(config: Any, words: str):
    with pytest.raises(ValueError, match=words):
        BackboneCache(transformers.AutoConfig.for_model(config))

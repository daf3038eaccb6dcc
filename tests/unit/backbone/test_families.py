"""What is asked of a backbone's modules, and refused where it is missing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from slq_embed.backbone.families import (
    embedding_scale,
    embedding_table,
    family_of,
    language_layers,
    refusal,
)
from slq_embed.backbone.quantization import keep_layout
from slq_embed.modules.query_embeddings import scaled
from slq_embed.saving.plain_names import require_plain_loading
from tests.families import newer, newer_others


class Shifted(nn.Embedding):
    """Adds a vector to each row, so it does more than scale."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + torch.arange(float(self.embedding_dim))


def with_table(layer: nn.Module) -> Any:
    return SimpleNamespace(get_input_embeddings=lambda: layer)


def test_input_embeddings_that_are_no_table_are_refused():
    with pytest.raises(ValueError, match=r"are a Sequential, but a plain table is needed.* without adapters"):
        embedding_table(with_table(nn.Sequential(nn.Embedding(8, 4))))


def test_a_layer_that_does_more_than_scale_rows_is_refused():
    with pytest.raises(ValueError, match="are a Shifted, which does more than scale rows"):
        embedding_scale(with_table(Shifted(8, 4)))


class Normed(nn.Embedding):
    """Normalises each row, as Muse Glimmer's does."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.embed_norm = nn.RMSNorm(4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed_norm(super().forward(ids))


def test_a_norm_of_rows_acts_on_queries_too_and_needs_the_merged_form():
    backbone = with_table(Normed())
    backbone.config = SimpleNamespace(model_type="muse_glimmer")
    norm = embedding_scale(backbone)
    assert norm is backbone.get_input_embeddings().embed_norm
    table = embedding_table(backbone)
    assert torch.equal(scaled(table[:2], norm), backbone.get_input_embeddings()(torch.arange(2)))
    require_plain_loading(backbone, "merged", has_adapter=False)
    with pytest.raises(ValueError, match=r"A muse_glimmer normalises its token embeddings.* Use form='merged'"):
        require_plain_loading(backbone, "adapter", has_adapter=False)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="measured with 5.23")
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (newer_others.diffusion_gemma, "is a diffusion model, which writes into a canvas that no input is a part of"),
        (
            newer.minimax_m3_vl,
            "counts the blocks of its sparse attention from the padding, so an input in a batch sees",
        ),
    ],
)
def test_a_configuration_says_why_it_cannot_work(build, words):
    with pytest.raises(ValueError, match=words):
        family_of(build().config)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="measured with 5.23")
def test_sparse_layers_are_refused_and_not_their_family():
    config = newer.minimax_m3_vl().config
    config.text_config.layer_types = ["full_attention"] * 2
    assert refusal(config) is None


def test_a_decoder_without_a_list_of_layers_is_refused():
    with pytest.raises(ValueError, match=r"A Linear has no list of layers.* with a projection head"):
        language_layers(SimpleNamespace(get_decoder=lambda: nn.Linear(2, 2)))


class FourBit(nn.Linear):
    """A layer as bitsandbytes has it on a CPU with AVX512-BF16; ``packed`` says that it has run there."""

    support_avx512bf16_for_cpu = True

    def __init__(self, packed: bool) -> None:
        super().__init__(2, 2)
        self.weight.quant_state = SimpleNamespace(packing_format_for_cpu=packed)  # type: ignore[assignment]


def test_weights_that_bitsandbytes_packed_anew_are_refused():
    backbone: Any = nn.Sequential(FourBit(packed=False))
    keep_layout(backbone)
    assert not backbone[0].support_avx512bf16_for_cpu
    with pytest.raises(ValueError, match="has run on this CPU, where bitsandbytes changed its 4-bit weights"):
        keep_layout(nn.Sequential(FourBit(packed=False), FourBit(packed=True)))

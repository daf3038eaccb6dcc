"""What is asked of a backbone's modules, and refused where it is missing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from slq_embed.backbone.families import embedding_scale, embedding_table, language_layers
from slq_embed.backbone.quantization import keep_layout


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

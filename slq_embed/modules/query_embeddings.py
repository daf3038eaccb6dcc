"""Queries that enter a backbone as token ids: the embedding layer of a twin gives them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def scaled(rows: Tensor, scale: float | nn.Module) -> Tensor:
    """Rows as the embedding layer gives them: it multiplies in the table's precision, where the scale is rounded too."""
    if isinstance(scale, nn.Module):
        normalised: Tensor = scale(rows)
        return normalised
    return rows * torch.tensor(scale, dtype=rows.dtype).item()


def embed_query_tokens(
    twin: PreTrainedModel, vectors: nn.ParameterDict, ids: Sequence[int], scale: float | nn.Module
) -> None:
    """Let the embedding layer of a twin give the queries for the ids of the query tokens.

    Args:
        twin: From :func:`slq_embed.backbone.twin.twin_of`.
        vectors: Holds ``queries``, ``(Q, H)``; read at each call.
        ids: Ids of the query tokens, ``Q`` of them, rows of the table.
        scale: What the layer makes of rows; see :func:`slq_embed.backbone.families.embedding_scale`.
    """
    # A partial, because it is copied and pickled with what it holds; a function within this one is not.
    replace = partial(_replace_rows, vectors=vectors, ids=torch.tensor(ids), scale=scale)
    twin.get_input_embeddings().register_forward_hook(replace)


def _replace_rows(
    layer: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
    *,
    vectors: nn.ParameterDict,
    ids: Tensor,
    scale: float | nn.Module,
) -> Tensor:
    matches = args[0][..., None] == ids.to(args[0].device)
    rows = scaled(vectors["queries"].to(output.device, output.dtype), scale)[matches.int().argmax(dim=-1)]
    return torch.where(matches.any(dim=-1, keepdim=True), rows, output)

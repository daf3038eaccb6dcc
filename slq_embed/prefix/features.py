"""Features of a batch: choosing rows, joining rows, and splitting a batch into passes with little padding.

Features are a dict, as Sentence Transformers hands them from module to module. Batches are padded on the left.

| key | shape | content |
| --- | --- | --- |
| ``input_ids`` | ``(batch, seq)`` int64 | token ids without the query tokens |
| ``attention_mask`` | ``(batch, seq)`` int64 | 1 for real tokens, 0 for padding |
| ``token_type_ids``, ``mm_token_type_ids`` | ``(batch, seq)`` int64 | only of families whose processor gives them |
| ``pixel_values`` | ``(patches or tiles, ...)`` float | pixels of all images, one image after the other |
| ``image_grid_thw``, other ``image_*`` | ``(images, ...)`` | a row for each image |
| other features of images and videos | ``(pieces, ...)`` | of rows that are processed one by one |
| ``row_pieces`` | ``(batch, features)`` int64 | there: how many of them each row has, in the order of their names |
| ``num_images_per_sample``, ``num_videos_per_sample`` | ``(batch,)`` int64 | images and videos of each row |
| ``prefix_key`` | ``(batch, 2)`` int64 | the 128-bit key of each row's prefix |
| ``prefix_stored`` | ``(batch,)`` bool | true where a prefix is kept: of such a row there is the length and nothing else |
| ``mm_encoder_outputs`` | dict | the vision tower's features in place of pixels (:mod:`slq_embed.prefix.vision`) |
| ``token_embeddings`` | ``(batch, Q, H)`` float32 | states of the queries, from the first module |
| ``sentence_embedding`` | ``(batch, H)`` float32 | the embedding, from the pooling on |
| ``log_temperature`` | scalar | where a loss has asked for one |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Features = dict[str, Any]
"""See the table of this module."""

_BOOKKEEPING = {"input_ids", "attention_mask", "modality", "num_images_per_sample", "prefix_key", "task", "row_pieces"}
_BOOKKEEPING |= {"num_videos_per_sample"}
_BOOKKEEPING |= {"prefix_stored", "prompt_length", "token_embeddings", "sentence_embedding", "log_temperature"}

TOKENS_PER_PASS = {"cpu": 2048}
"""Padded tokens that go through the backbone at once. On a CPU more of them leave its caches: 32 images of 208 tokens took
7 % longer in passes of 8192 tokens than in passes of 2048 (benchmarks/scaling.py)."""
DEFAULT_TOKENS_PER_PASS = 32768


def backbone_inputs(features: Features) -> Features:
    """The features that a backbone reads in addition to tokens and mask: pixels, grids, token types."""
    return {key: value for key, value in features.items() if key not in _BOOKKEEPING}


def image_features(features: Features) -> list[str]:
    """Names of the features that are laid out by images or their pieces, not by rows."""
    shape = features["input_ids"].shape
    return sorted(
        key for key, value in backbone_inputs(features).items() if isinstance(value, Tensor) and value.shape != shape
    )


def select_rows(features: Features, rows: Sequence[int], image_token: int) -> Features:
    """Cut rows out of a batch, in the order given, without the padding that they do not need.

    Args:
        features: Of the batch.
        rows: Indices in the batch; one may come more than once.
        image_token: Id of the token that stands for a piece of an image. Families lay pixels out by patch or by
            tile: either way, a row has its share of them by its image tokens.

    Raises:
        ValueError: If the pixels are not those of the rows, in equal shares for each image token.
    """
    ids = features["input_ids"]
    index = torch.tensor(rows, device=ids.device)
    mask = features["attention_mask"][index]
    first = int(mask.any(dim=0).int().argmax())
    chosen: Features = {}
    pieces_of: dict[str, Tensor] = {}
    if (counts := features.get("row_pieces")) is not None:
        pieces_of = dict(zip(image_features(features), counts.T, strict=True))
        if any(len(features[key]) != int(pieces.sum()) for key, pieces in pieces_of.items()):
            raise ValueError(
                "A batch was cut so that its images are not those of its rows. This backbone's images cannot be cut by "
                "Cached losses: use a loss without mini-batches."
            )
    for key, value in features.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            chosen[key] = value
        elif key in pieces_of:
            chosen[key] = _ranges(value, pieces_of[key], rows)
        elif key == "pixel_values":
            pieces = (ids == image_token).sum(dim=1)
            total = max(1, int(pieces.sum()))
            grid = features.get("image_grid_thw")
            fits = grid is None or len(value) == int(grid.prod(dim=1).sum())
            if not fits or (pieces * len(value) % total).any() or pieces.any() != bool(len(value)):
                raise ValueError(
                    f"A batch has {len(value)} pieces of images in its pixels for rows with {pieces.tolist()} image tokens. "
                    "Do not cut the pixels of a batch like its rows: sentence-transformers 6.2 or later does it right in its "
                    'Cached losses, and a streamed dataset needs accelerator_config={"dispatch_batches": False}.'
                )
            chosen[key] = _ranges(value, pieces * len(value) // total, rows)
        elif key.startswith("image_"):
            chosen[key] = _ranges(value, features["num_images_per_sample"], rows)
        else:
            chosen[key] = value[index][:, first:] if value.shape == ids.shape else value[index]
    if pieces_of:  # what none of the rows has is not there; the columns of row_pieces are those that stay
        kept = torch.tensor([bool(len(chosen[key])) for key in pieces_of])
        chosen = {key: value for key, value in chosen.items() if key not in pieces_of or len(value)}
        chosen["row_pieces"] = chosen["row_pieces"][:, kept.to(ids.device)]
        if not kept.any():
            del chosen["row_pieces"]
    elif "pixel_values" in chosen and not len(chosen["pixel_values"]):
        chosen = {key: value for key, value in chosen.items() if not key.startswith(("pixel_", "image_"))}
    return chosen


def _ranges(value: Tensor, counts: Tensor, rows: Sequence[int]) -> Tensor:
    parts = value.split(counts.tolist())
    if list(rows) == list(range(rows[0], rows[-1] + 1)):  # neighbours need no copy
        start = int(counts[: rows[0]].sum())
        return value[start : start + int(counts[list(rows)].sum())]
    return torch.cat([parts[row] for row in rows])


def split_into_passes(lengths: Sequence[int], device: torch.device) -> list[list[int]]:
    """Group rows of like length so that each group is one pass through the backbone.

    Args:
        lengths: Tokens of each row.
        device: Where it computes; decides how many padded tokens a pass has.

    Returns:
        Indices of the rows, longest first.
    """
    budget = TOKENS_PER_PASS.get(device.type, DEFAULT_TOKENS_PER_PASS)
    passes: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not passes or (len(passes[-1]) + 1) * lengths[passes[-1][0]] > budget:
            passes.append([])
        passes[-1].append(row)
    return passes


def pad_left(rows: Sequence[Tensor], value: int = 0) -> Tensor:
    """Join vectors to ``(batch, longest)``, padded on the left."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")


def move_padding_left(features: Features) -> Features:
    """Put padding that follows a row's tokens before them.

    Losses of Sentence Transformers join several columns of texts to one batch, and fill the shorter ones up on the right
    (``base/losses/merged_forward.py`` in 6.0 to 6.2). There the queries would stand behind the padding.

    Args:
        features: Of the batch, padded on either side.

    Returns:
        The features. Without padding on the right they are returned as they are.

    Example:
        >>> rows = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> move_padding_left(rows)["input_ids"]
        tensor([[0, 5, 6]])
    """
    mask = features["attention_mask"]
    if mask[:, -1].all():
        return features
    trailing = mask.flip(1).argmax(dim=1, keepdim=True)
    source = (torch.arange(mask.shape[1], device=mask.device) - trailing) % mask.shape[1]
    return {
        key: value.gather(1, source) if isinstance(value, Tensor) and value.shape == mask.shape else value
        for key, value in features.items()
    }


def strip_queries(features: Features, num_queries: int) -> Features:
    """Drop the query columns, which left padding puts last in every row, from all per-token features."""
    shape = features["input_ids"].shape
    return {
        key: value[:, :-num_queries] if isinstance(value, Tensor) and value.shape == shape else value
        for key, value in features.items()
    }


def make_room(features: Features, lengths: Sequence[int | None], pad_token: int) -> Features:
    """Put rows of which only the length is known between the rows of a batch.

    Args:
        features: Of the rows whose length is ``None``; empty if there is none.
        lengths: For each row of the result its length in tokens, or ``None`` for the next row of ``features``.
        pad_token: Id that padding has.

    Returns:
        Features of all rows, with ``prefix_stored``, ``(batch,)``, true for the new ones.
    """
    present = [index for index, length in enumerate(lengths) if length is None]
    shape = features["input_ids"].shape if present else torch.Size((0, 0))
    longest = max([shape[1], *(length for length in lengths if length is not None)])
    per_token = [key for key, value in features.items() if isinstance(value, Tensor) and value.shape == shape]
    joined = dict(features)
    for key in per_token or ["input_ids", "attention_mask"]:
        joined[key] = torch.full((len(lengths), longest), pad_token if key == "input_ids" else 0)
        if present:
            joined[key][present, longest - shape[1] :] = features[key]
    for index, length in enumerate(lengths):
        if length is not None:
            joined["attention_mask"][index, longest - length :] = 1
    for key in ("num_images_per_sample", "num_videos_per_sample", "row_pieces"):
        if (counts := features.get(key)) is not None:
            joined[key] = counts.new_zeros(len(lengths), *counts.shape[1:])
            joined[key][present] = counts
    joined["prefix_stored"] = torch.tensor([length is not None for length in lengths])
    return joined

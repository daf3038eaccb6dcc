"""Features of a batch: choosing rows, joining rows, and splitting a batch into passes with little padding.

Features are a dict, as Sentence Transformers hands them from module to module. Batches are padded on the left. Every tensor has
a row for each input, so that anybody can cut a batch: the cached losses of Sentence Transformers do.

| key | shape | content |
| --- | --- | --- |
| ``input_ids`` | ``(batch, seq)`` int64 | token ids without the query tokens |
| ``attention_mask`` | ``(batch, seq)`` int64 | 1 for real tokens, 0 for padding |
| ``token_type_ids``, ``mm_token_type_ids`` | ``(batch, seq)`` int64 | only of families whose processor gives them |
| ``media`` | :class:`MediaFeatures` | pixels, grids and other features of images and videos |
| ``media_row`` | ``(batch,)`` int64 | which row of ``media`` each row has; -1 for none |
| ``prefix_key`` | ``(batch, 2)`` int64 | the 128-bit key of each row's prefix |
| ``prefix_namespace`` | ``(batch,)`` int64 | the store and the weights that the keys are of, as a number; 0 without a store |
| ``prefix_stored`` | ``(batch,)`` bool | true where a prefix is kept: of such a row there is the length and nothing else |
| ``mm_encoder_outputs`` | dict | the vision tower's features in place of pixels (:mod:`slq_embed.prefix.vision`) |
| ``token_embeddings`` | ``(batch, Q, H)`` float32 | states of the queries, from the first module |
| ``sentence_embedding`` | ``(batch, H)`` float32 | the embedding, from the pooling on |
| ``log_temperature`` | scalar | where a loss has asked for one |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Features = dict[str, Any]
"""See the table of this module."""

_BOOKKEEPING = {"input_ids", "attention_mask", "modality", "prefix_key", "task", "media", "media_row", "media_pieces"}
_BOOKKEEPING |= {"prefix_namespace", "prefix_stored", "prompt_length", "log_temperature"}
_BOOKKEEPING |= {"token_embeddings", "sentence_embedding"}

TOKENS_PER_PASS = {"cpu": 2048}
"""Padded tokens that go through the backbone at once. On a CPU more of them leave its caches: 32 images of 208 tokens took
7 % longer in passes of 8192 tokens than in passes of 2048 (benchmarks/scaling.py)."""
DEFAULT_TOKENS_PER_PASS = 32768


@dataclass(frozen=True)
class MediaFeatures:
    """What a processor makes of the images and videos of some rows. It is no tensor, so nobody cuts it by rows.

    Args:
        values: ``pixel_values``, ``image_grid_thw`` and others, ``(pieces, ...)`` each: patches, tiles or images of one row
            after those of the other.
        pieces: For each of them the number of pieces of each row.

    Raises:
        ValueError: If a value has another number of pieces than its rows.
    """

    values: Mapping[str, Tensor]
    pieces: Mapping[str, Sequence[int]]

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            if len(value) != sum(self.pieces[name]):
                raise ValueError(
                    f"{name} has {len(value)} pieces, but the rows of the batch have {list(self.pieces[name])}. The processor gave "
                    "the images of a row another number of tokens than pixels: use the processor of this backbone."
                )

    def of(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """Values and pieces of some rows, in that order; -1 is a row without any. What none of them has is left out."""
        pieces = {name: [counts[row] if row >= 0 else 0 for row in rows] for name, counts in self.pieces.items()}
        pieces = {name: counts for name, counts in pieces.items() if any(counts)}
        present = [row for row in rows if row >= 0]
        return {name: _ranges(self.values[name], self.pieces[name], present) for name in pieces}, pieces

    def pin_memory(self) -> MediaFeatures:
        """The same in pinned memory; data loaders call this."""
        return MediaFeatures({name: value.pin_memory() for name, value in self.values.items()}, self.pieces)


def _ranges(value: Tensor, counts: Sequence[int], rows: Sequence[int]) -> Tensor:
    if list(rows) == list(range(rows[0], rows[-1] + 1)):  # neighbours need no copy
        start = sum(counts[: rows[0]])
        return value[start : start + sum(counts[rows[0] : rows[-1] + 1])]
    parts = value.split(list(counts))
    return torch.cat([parts[row] for row in rows])


def lay_out(features: Features) -> Features:
    """Features as a backbone reads them: the pixels, grids and others of its rows in place of ``media``.

    Args:
        features: Of the batch. Without media they are returned as they are.

    Returns:
        Features with ``media_pieces``, a dict: for each feature of images and videos the number of pieces of each row.
    """
    if (media := features.get("media")) is None:
        return features
    values, pieces = media.of(features["media_row"].tolist())
    device = features["input_ids"].device  # the media are not: a trainer moves tensors
    laid_out = {key: value for key, value in features.items() if key not in ("media", "media_row")}
    laid_out |= {name: value.to(device, non_blocking=True) for name, value in values.items()}
    return {**laid_out, "media_pieces": pieces}


def backbone_inputs(features: Features) -> Features:
    """The features that a backbone reads in addition to tokens and mask, of a batch that was laid out: pixels, grids, token types."""
    return {key: value for key, value in features.items() if key not in _BOOKKEEPING}


def per_token(features: Features) -> dict[str, Tensor]:
    """The features that have a number for each token: ids, mask and types."""
    shape = features["input_ids"].shape
    return {key: value for key, value in features.items() if isinstance(value, Tensor) and value.shape == shape}


def select_rows(features: Features, rows: Sequence[int]) -> Features:
    """Cut rows out of a batch, in the order given, without the padding that they do not need.

    Args:
        features: Of the batch.
        rows: Indices in the batch; one may come more than once.
    """
    index = torch.tensor(rows, device=features["input_ids"].device)
    first = int(features["attention_mask"][index].any(dim=0).int().argmax())
    chosen = {
        key: value[index] if isinstance(value, Tensor) and value.ndim else value for key, value in features.items()
    }
    return {**chosen, **{key: value[:, first:] for key, value in per_token(chosen).items()}}


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
    return {**features, **{key: value.gather(1, source) for key, value in per_token(features).items()}}


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
    joined = dict(features)
    for key in per_token(features) if present else ("input_ids", "attention_mask"):
        joined[key] = torch.full((len(lengths), longest), pad_token if key == "input_ids" else 0)
        if present:
            joined[key][present, longest - shape[1] :] = features[key]
    for index, length in enumerate(lengths):
        if length is not None:
            joined["attention_mask"][index, longest - length :] = 1
    if (numbers := features.get("media_row")) is not None:
        joined["media_row"] = numbers.new_full((len(lengths),), -1)
        joined["media_row"][present] = numbers
    joined["prefix_stored"] = torch.tensor([length is not None for length in lengths])
    return joined

"""The vision tower's features: computed alone, kept for each row, and given to the backbone in place of pixels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slq_embed.backbone.families import family_of
from slq_embed.prefix.features import lay_out, pad_left, per_token, select_rows
from slq_embed.prefix.passes import prepared_inputs


@torch.no_grad()
def run_vision(decoder: PreTrainedModel, features: dict[str, Any], image_token: int) -> list[dict[str, Tensor]]:
    """Run the vision tower over a batch in which every row has an image.

    Args:
        decoder: The backbone without its head.
        features: Features with ``media``; see :mod:`slq_embed.prefix.features`.
        image_token: Id of the token that stands for a piece of an image.

    Returns:
        A dict for each row, without padding: ``input_ids`` ``(seq,)`` and the other features with a number for each
        token; ``image_*`` features; and the outputs of the tower: ``features``, ``(tokens, H)`` or
        ``(tiles, tokens, H)``, and for some families ``deepstack.0``, ``deepstack.1``, ..., ``(tokens, H)`` each.
    """
    if not family_of(decoder.config).batches_images and len(features["input_ids"]) > 1:  # nothing says what is whose
        alone = [select_rows(features, [row]) for row in range(len(features["input_ids"]))]
        return [row for one in alone for row in run_vision(decoder, one, image_token)]
    features = lay_out(features)
    known = inspect.signature(decoder.get_image_features).parameters
    output = decoder.get_image_features(**{k: v for k, v in prepared_inputs(decoder, features).items() if k in known})
    ids, mask = features["input_ids"], features["attention_mask"].bool()
    pieces = (ids == image_token).sum(dim=1)
    outputs = {"features": output.pooler_output}
    outputs |= {f"deepstack.{n}": part for n, part in enumerate(getattr(output, "deepstack_features", None) or [])}
    rows: list[dict[str, Tensor]] = [
        {key: value[row][mask[row]] for key, value in per_token(features).items()} for row in range(len(ids))
    ]
    for name, parts in outputs.items():
        joined = parts if isinstance(parts, Tensor) else torch.cat(list(parts))
        size = 1 if joined.ndim == 2 else joined.shape[1]
        shares = [len(joined)] if len(rows) == 1 else (pieces // size).tolist()
        for row, part in zip(rows, joined.split(shares), strict=True):
            row[name] = part
    for key, counts in features["media_pieces"].items():
        if key.startswith("image_"):
            for row, part in zip(rows, features[key].split(counts), strict=True):
                row[key] = part
    return rows


def join_rows(rows: Sequence[Mapping[str, Tensor]], pad_token: int) -> dict[str, Any]:
    """Join rows to the features of a left-padded batch, with ``mm_encoder_outputs`` in place of pixels.

    Args:
        rows: From :func:`run_vision`, on one device.
        pad_token: Token id of padding.

    Returns:
        Features; see :mod:`slq_embed.prefix.features`.
    """
    mask = pad_left([torch.ones_like(row["input_ids"]) for row in rows])
    joined: dict[str, Any] = {"media_pieces": {}}
    outputs: dict[str, Tensor] = {}
    for key, value in rows[0].items():
        parts = [row[key] for row in rows]
        if key == "features" or key.startswith("deepstack."):
            outputs[key] = torch.cat(parts)
        elif key.startswith("image_"):
            joined[key] = torch.cat(parts)
            joined["media_pieces"][key] = [len(part) for part in parts]
        elif value.ndim == 1:
            joined[key] = pad_left(parts, pad_token if key == "input_ids" else 0)
    joined["attention_mask"] = mask
    pooled = outputs.pop("features")
    joined["mm_encoder_outputs"] = {
        "image": SimpleNamespace(
            pooler_output=pooled if pooled.ndim == 3 else (pooled,),
            deepstack_features=[(outputs[key],) for key in sorted(outputs, key=lambda name: int(name.split(".")[1]))],
        )
    }
    return joined

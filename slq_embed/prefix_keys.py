"""Names of prefixes: two inputs share a name only if the backbone makes the same of them before any query."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from slq_embed.backbones import embedding_table
from slq_embed.inputs import Row

KEY_BYTES = 16


def settings_digest(backbone: PreTrainedModel, processor: ProcessorMixin, image_kwargs: Mapping[str, Any]) -> bytes:
    """A digest of what decides a prefix beside its input and the weights: precision, kernels, image processing.

    The chat template is left to the input's own name, because it also holds the query tokens, which no prefix sees.
    """
    decisive = [
        str(embedding_table(backbone).dtype),
        str(backbone.config._attn_implementation),
        processor.image_processor.to_dict(),
        dict(image_kwargs),
    ]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).digest()


def prefix_key(row: Row, tokens: Sequence[int], namespace: bytes) -> bytes:
    """Name a prefix in 128 bits.

    Args:
        row: The input.
        tokens: Its token ids without queries, an image being one token.
        namespace: What names the weights, the settings, and how a store keeps its entries.

    Raises:
        ValueError: If the image cannot be read.
    """
    whole = namespace + f"{list(tokens)} ".encode() + row.image_digest()
    return hashlib.blake2b(whole, digest_size=KEY_BYTES).digest()


def keys_to_tensor(keys: Sequence[bytes]) -> torch.Tensor:
    """Names as features of a batch, ``(batch, 2)`` int64, which losses can cut by rows."""
    return torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.int64).view(-1, 2)


def keys_from_tensor(keys: torch.Tensor) -> list[bytes]:
    """The inverse of :func:`keys_to_tensor`."""
    whole = keys.cpu().contiguous().numpy().tobytes()
    return [whole[start : start + KEY_BYTES] for start in range(0, len(whole), KEY_BYTES)]

"""Keys of prefixes: two inputs share a key only if the backbone makes the same of them before any query."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from slq_embed.backbone.families import embedding_table
from slq_embed.backbone.query_tokens import OWN_TOKEN
from slq_embed.inputs.rows import Row

KEY_BYTES = 16


def settings_digest(backbone: PreTrainedModel, processor: ProcessorMixin, image_kwargs: Mapping[str, Any]) -> bytes:
    """A digest of what decides a prefix beside its input, the weights and the tokenizer.

    That is: precision, attention kernels and image processing. The chat template is part of each input's own key,
    because the template also holds the query tokens, which no prefix sees.
    """
    settings = [
        str(embedding_table(backbone).dtype),
        str(backbone.config._attn_implementation),
        processor.image_processor.to_dict(),
        dict(image_kwargs),
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).digest()


def tokenizer_digest(tokenizer: Any) -> bytes:
    """A digest of how a tokenizer turns text into ids, without the query tokens; about a second for 150,000 tokens."""
    vocabulary = sorted(item for item in tokenizer.get_vocab().items() if not OWN_TOKEN.fullmatch(item[0]))
    digest = hashlib.sha256(json.dumps(vocabulary).encode())
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        state = json.loads(backend.to_str())
        for volatile in ("added_tokens", "padding", "truncation"):  # of the query tokens, and of the last call
            state.pop(volatile, None)
        digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.digest()


def prefix_key(row: Row, text: str, namespace: bytes) -> bytes:
    """The key of a prefix, 128 bits.

    Args:
        row: The input.
        text: Its chat as the template renders it, without the query tokens.
        namespace: What names the weights, the tokenizer, the settings, and how a store keeps its entries.

    Raises:
        ValueError: If the image cannot be read.
    """
    whole = namespace + f"{len(text.encode())} {text} ".encode() + row.image_digest()
    return hashlib.blake2b(whole, digest_size=KEY_BYTES).digest()


def keys_to_tensor(keys: Sequence[bytes]) -> torch.Tensor:
    """Keys as a feature of a batch, ``(batch, 2)`` int64, which losses can cut by rows."""
    return torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.int64).view(-1, 2)


def keys_from_tensor(keys: torch.Tensor) -> list[bytes]:
    """The inverse of :func:`keys_to_tensor`."""
    whole = keys.cpu().contiguous().numpy().tobytes()
    return [whole[start : start + KEY_BYTES] for start in range(0, len(whole), KEY_BYTES)]

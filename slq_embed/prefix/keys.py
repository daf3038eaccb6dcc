"""Keys of prefixes: two inputs share a key only if the backbone makes the same of them before any query."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from slq_embed.inputs.rows import Row
from slq_embed.store.entries import KEY_BYTES


def prefix_key(row: Row, text: str, namespace: bytes) -> bytes:
    """The key of a prefix, 128 bits.

    Args:
        row: The input.
        text: Its chat as the template renders it, without the query tokens.
        namespace: What names the weights, the tokenizer, the settings, and how a store keeps its entries.

    Raises:
        ValueError: If an image or a video cannot be read.
    """
    whole = namespace + f"{len(text.encode())} {text} ".encode() + row.media_digest()
    return hashlib.blake2b(whole, digest_size=KEY_BYTES).digest()


def namespace_number(namespace: bytes) -> int:
    """A namespace as a number of 63 bits, which stands beside the keys in a batch; 0 where there is none."""
    return int.from_bytes(hashlib.blake2b(namespace, digest_size=8).digest(), "little") >> 1 if namespace else 0


def keys_to_tensor(keys: Sequence[bytes]) -> torch.Tensor:
    """Keys as a feature of a batch, ``(batch, 2)`` int64, which losses can cut by rows."""
    return torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.int64).view(-1, 2)


def keys_from_tensor(keys: torch.Tensor) -> list[bytes]:
    """The inverse of :func:`keys_to_tensor`."""
    whole = keys.cpu().contiguous().numpy().tobytes()
    return [whole[start : start + KEY_BYTES] for start in range(0, len(whole), KEY_BYTES)]

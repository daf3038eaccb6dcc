"""Which values of a data set are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from slq_embed.inputs.rows import Picture


def identity(value: Any) -> Any:
    """What equal values share: a text, a path, a digest of an image's bytes or pixels. No file is read.

    Args:
        value: A text, a path, bytes, a picture, or a dict of such, as ``datasets`` gives for an undecoded image.

    Raises:
        ValueError: If a picture cannot be decoded.
    """
    if isinstance(value, bytes | bytearray):
        return hashlib.sha256(value).digest()
    if isinstance(value, Image.Image | np.ndarray | torch.Tensor):
        return Picture(value).digest()
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"} and value["bytes"] is not None:
            return identity(value["bytes"])  # its path is only a name
        return tuple((key, identity(part)) for key, part in sorted(value.items()))
    return value

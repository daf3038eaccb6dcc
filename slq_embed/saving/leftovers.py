"""What an earlier save left in a folder: loading would read it beside the new files, or in their place."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from slq_embed.saving.config import CONFIG_NAME, SLQConfig
from slq_embed.saving.weights import ADAPTER_NAME, DEEP_NAME, MERGED_ADAPTER, QUERIES_NAME

_ADAPTER = ("adapter_config.json", ADAPTER_NAME)
_MODULES = tuple(f"[0-9]_{name}" for name in ("Dense", "WordWeights", "Pooling", "Normalize"))
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Files of a backbone's weights, as transformers names them."""
_MERGED = ("config.json", "generation_config.json", *WEIGHTS, QUERIES_NAME)


def require_other_folder(folder: Path, slq_config: SLQConfig) -> None:
    """Raise a ValueError if the adapter form would be written over the backbone that it names."""
    named = slq_config.form == "adapter" and slq_config.backbone
    if named and folder.resolve() == Path(slq_config.backbone).resolve():
        raise ValueError(
            f"The adapter form names its backbone, which is {folder} itself. Save to another folder, or with form='merged'."
        )


def remove_leftovers(folder: Path, slq_config: SLQConfig, written: Collection[str]) -> None:
    """Remove what an earlier save wrote and this one did not. A folder that was no saved SLQ model is left alone.

    Args:
        folder: With the new files, and the record of the earlier save.
        slq_config: The new record.
        written: Names of the new modules' folders and source files.
    """
    if not (folder / CONFIG_NAME).exists():
        return
    patterns = [*(_MERGED if slq_config.form == "adapter" else _ADAPTER), "slq_query_*.py", *_MODULES]
    if slq_config.form == "adapter" or slq_config.query_adapter is None:
        patterns.append(MERGED_ADAPTER)
    if not slq_config.deep_queries:
        patterns.append(DEEP_NAME)
    for path in (path for pattern in patterns for path in folder.glob(pattern) if path.name not in written):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

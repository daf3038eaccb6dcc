"""A save takes the place of an earlier one as a whole, and leaves nothing of it that loading would read beside the new files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from slq_embed.saving.config import CONFIG_NAME, SLQConfig
from slq_embed.saving.weights import ADAPTER_NAME, DEEP_NAME, MERGED_ADAPTER, QUERIES_NAME

_UNFINISHED = ".unfinished-"
_RECORDS = ("modules.json", CONFIG_NAME)
"""Plain Sentence Transformers loads by the one, SLQEncoder by the other."""
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Files of a backbone's weights, as transformers names them."""
_MODULES = tuple(f"[0-9]_{name}" for name in ("Dense", "WordWeights", "Pooling", "Normalize"))
_MERGED = ("config.json", "generation_config.json", *_WEIGHTS, QUERIES_NAME)
_OURS = ("adapter_config.json", ADAPTER_NAME, DEEP_NAME, MERGED_ADAPTER, "slq_query_*.py", *_MODULES, *_MERGED)


def require_other_folder(folder: Path, slq_config: SLQConfig) -> None:
    """Raise a ValueError if the adapter form would be written over the backbone that it names."""
    named = slq_config.form == "adapter" and slq_config.backbone
    if named and folder.resolve() == Path(slq_config.backbone).resolve():
        raise ValueError(
            f"The adapter form names its backbone, which is {folder} itself. Save to another folder, or with form='merged'."
        )


@contextmanager
def placed_at_once(folder: Path) -> Iterator[Path]:
    """A folder to write a model into. With the end of the block, its files take the places of an earlier save's.

    If writing fails or is killed, the earlier save is still whole. If the renames are, no loader takes the mixture for a model.

    Raises:
        ValueError: If the folder is a file.
    """
    if folder.is_file():
        raise ValueError(
            f"A model is saved as a folder, but {folder} is a file. Give another path, or remove the file."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_UNFINISHED}*"):  # by a save that was killed
        shutil.rmtree(left)
    with TemporaryDirectory(dir=folder, prefix=_UNFINISHED) as name:
        yield (unfinished := Path(name))
        places = {file: folder / file.relative_to(unfinished) for file in unfinished.rglob("*") if file.is_file()}
        for place in places.values():  # first, as this may fail
            place.parent.mkdir(exist_ok=True)
        leftovers = _leftovers(folder, unfinished)
        for record in _RECORDS:
            (folder / record).write_bytes(b"")
        for path in leftovers:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        for file in sorted(places, key=lambda file: file.name in _RECORDS):
            file.replace(places[file])


def _leftovers(folder: Path, new: Path) -> list[Path]:
    """What an earlier save wrote and this one did not. Of a folder that was no saved SLQ model, only weights of another name."""
    written = {path.name for path in new.iterdir()}
    patterns = [*(_WEIGHTS if "config.json" in written else ()), *(_OURS if (folder / CONFIG_NAME).exists() else ())]
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return [path for path in found if path.name not in written]

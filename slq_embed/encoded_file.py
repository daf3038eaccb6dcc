"""Embeddings in a memory-mapped file, written so that a killed run can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from tqdm.autonotebook import tqdm

from slq_embed.encoding import stream
from slq_embed.fingerprint import encoder_digest
from slq_embed.inputs import Skipped, read_row
from slq_embed.prefix_keys import settings_digest

if TYPE_CHECKING:
    from slq_embed.latent_query_encoder import LatentQueryEncoder

_PENDING, _DONE, _SKIPPED = 0, 1, 2
_BATCHES_A_FLUSH = 16
_SAMPLED_INPUTS = 64


@dataclass
class EncodedFile:
    """Embeddings in a file, and what is missing there.

    Args:
        path: The ``.npy`` file.
        encoded: How many inputs this run embedded.
        skipped: Inputs that could not be read; their rows are NaN.
    """

    path: Path
    encoded: int
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def embeddings(self) -> NDArray[Any]:
        """``(number of inputs, H)``, memory-mapped and read-only."""
        whole: NDArray[Any] = np.load(self.path, mmap_mode="r")
        return whole

    def report(self) -> str:
        """A line on what was skipped, with every name."""
        if not self.skipped:
            return "nothing was skipped"
        return f"{len(self.skipped)} skipped: " + "; ".join(f"{row.name} ({row.reason})" for row in self.skipped)


def encode_to_file(
    model: LatentQueryEncoder,
    inputs: Sequence[Any],
    path: Path,
    *,
    batch_size: int = 32,
    prompt: str | None = None,
    dtype: str = "float32",
    show_progress_bar: bool = True,
) -> EncodedFile:
    """Encode into a ``.npy`` file. Beside it, ``.progress.npy`` says which rows are done, ``.progress.json`` of what.

    Args:
        model: The encoder.
        inputs: Texts, images, or both. A list of texts and paths is compared whole with an earlier run's; of images in
            memory, or of a dataset, 64 are.
        path: The file; where an earlier run has left it unfinished, that run is continued.
        batch_size: Inputs a batch.
        prompt: A system message.
        dtype: ``"float32"`` or ``"float16"``.
        show_progress_bar: Whether to show one.

    Returns:
        The file, and what was skipped: an earlier run's skipped inputs are tried again.

    Raises:
        ValueError: If the file is of another model, prompt, dtype or other inputs.
    """
    if path.suffix != ".npy":
        raise ValueError(f"The file is {str(path)!r}, but a name that ends in .npy is needed.")
    progress_path, record_path = path.with_suffix(".progress.npy"), path.with_suffix(".progress.json")
    shape = (len(inputs), model.get_embedding_dimension())
    record = {
        "shape": list(shape),
        "dtype": dtype,
        "model": _model_digest(model, prompt),
        "inputs": _inputs_digest(inputs),
    }
    if record_path.is_file():
        found = json.loads(record_path.read_text("utf8"))
        if different := [key for key, value in record.items() if found.get(key) != value]:
            raise ValueError(
                f"{path} was begun with another {' and '.join(different)}. Encode into another file, or remove it "
                f"together with {record_path.name} and {progress_path.name}."
            )
        rows, progress = open_memmap(path, "r+"), open_memmap(progress_path, "r+")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = open_memmap(path, "w+", dtype=dtype, shape=shape)
        progress = open_memmap(progress_path, "w+", dtype=np.uint8, shape=shape[:1])
        record_path.write_text(json.dumps(record), "utf8")  # last: without it, the next run begins anew
    waiting = np.flatnonzero(progress != _DONE)
    result = EncodedFile(path, 0)
    fresh: list[tuple[list[int], int]] = []

    def flush() -> None:
        rows.flush()  # before what says that they are there
        for places, state in fresh:
            progress[places] = state
        progress.flush()
        fresh.clear()

    results = stream(
        model,
        ((int(n), inputs[int(n)]) for n in waiting),
        batch_size=batch_size,
        prompt=prompt,
        strict=False,
        truncate_dim=model.truncate_dim,
    )
    with tqdm(total=len(inputs), initial=len(inputs) - len(waiting), disable=not show_progress_bar) as bar:
        for number, batch in enumerate(results, start=1):
            if batch.places:
                rows[batch.places] = batch.embeddings[""].cpu().numpy()
                fresh.append((batch.places, _DONE))
            lost = [row.place for row in batch.skipped if row.place is not None]
            if lost:
                rows[lost] = np.nan
                fresh.append((lost, _SKIPPED))
            result.encoded += len(batch.places)
            result.skipped += batch.skipped
            bar.update(len(batch.places) + len(lost))
            if number % _BATCHES_A_FLUSH == 0:
                flush()
        flush()
    result.skipped.sort(key=lambda row: row.place or 0)
    return result


def _model_digest(model: LatentQueryEncoder, prompt: str | None) -> str:
    settings = settings_digest(model.backbone, model.processor, model.slq.image_kwargs)
    return hashlib.sha256(encoder_digest(model).encode() + settings + repr(prompt).encode()).hexdigest()


def _inputs_digest(inputs: Sequence[Any]) -> str:
    """Of all texts and paths of a list; of anything else, which is dear to read, the content at some places."""
    digest = hashlib.sha256()
    sample = set(np.linspace(0, max(0, len(inputs) - 1), _SAMPLED_INPUTS).astype(int).tolist())
    for place in range(len(inputs)) if isinstance(inputs, list | tuple) else sorted(sample):
        if isinstance(value := inputs[place], str | Path):
            digest.update(f"{len(str(value))} {value}".encode())
        elif place in sample:
            with suppress(ValueError):  # it will be skipped and named
                row = read_row(value)
                digest.update(f"{place} {row.text} ".encode() + row.image_digest())
    return digest.hexdigest()

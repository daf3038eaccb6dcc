"""Embeddings in a memory-mapped file, written so that a killed run can go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from slq_embed.backbone.fingerprint import settings_digest
from slq_embed.encoding.protocol import encoder_digest, resolve_prompt
from slq_embed.encoding.stream import stream
from slq_embed.inputs.pdf import PdfPage
from slq_embed.inputs.rows import Skipped, read_row, report, require_list

if TYPE_CHECKING:
    from slq_embed.encoder import SLQEncoder

_PENDING, _DONE, _SKIPPED = 0, 1, 2
_BATCHES_A_FLUSH = 16
_SAMPLED_INPUTS = 64
_DTYPES = ("float32", "float16")
_DIFFERENCES = {
    "shape": "another number of inputs or another width",
    "dtype": "another dtype",
    "model": "another model or prompt",
    "inputs": "other inputs",
}


@dataclass
class EncodedFile:
    """Embeddings in a file, and what is missing there.

    Args:
        path: The ``.npy`` file.
        encoded: How many inputs this run embedded.
        skipped: Inputs that cannot be read; their rows are NaN.
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
        """A line on what was skipped, with the first ten names."""
        return report(self.skipped)


def encode_to_file(
    model: SLQEncoder,
    inputs: Sequence[Any],
    path: Path,
    *,
    batch_size: int = 32,
    prompt: str | None = None,
    prompt_name: str | None = None,
    normalize_embeddings: bool = False,
    dtype: str = "float32",
    show_progress_bar: bool = True,
) -> EncodedFile:
    """Encode into a ``.npy`` file. Beside it, ``.progress.npy`` says which rows are done, ``.progress.json`` of what.

    Args:
        model: The encoder.
        inputs: Texts, images, or both. A list of texts and paths, also in dicts and chats, is compared whole with an
            earlier run's; of images in memory, or of a dataset, 64 are. Paths are compared, and not what is in the files: after
            a file has changed, begin another ``.npy``.
        path: The file; where an earlier run has left it unfinished, that run is continued.
        batch_size: Inputs a batch.
        prompt: A system message.
        prompt_name: A name among the model's prompts.
        normalize_embeddings: Whether to normalise what the model's ``truncate_dim`` has cut.
        dtype: ``"float32"`` or ``"float16"``.
        show_progress_bar: Whether to show one.

    Returns:
        The file, and what was skipped: an earlier run's skipped inputs are tried again.

    Raises:
        ValueError: If the file is of another model, prompt, dtype or other inputs, or is damaged, or an argument does not fit.
        OSError: If the disk has no room for the file. Nothing is encoded then.
    """
    require_list(inputs)
    if not (hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")):
        raise ValueError(
            f"inputs is a {type(inputs).__name__}, but a list is needed, so that a run can go on. Pass list(inputs)."
        )
    if hasattr(inputs, "iloc"):  # of a pandas Series, [0] is the row with the label 0, and not the first one
        inputs = list(inputs)
    if path.suffix != ".npy":
        raise ValueError(f"The file is {str(path)!r}, but a name that ends in .npy is needed.")
    if dtype not in _DTYPES:
        raise ValueError(
            f"dtype is {dtype!r}, but one of {_DTYPES} is needed. To quantize, apply "
            "sentence_transformers.util.quantization.quantize_embeddings to the file's embeddings."
        )
    progress_path, record_path = path.with_suffix(".progress.npy"), path.with_suffix(".progress.json")
    shape = (len(inputs), int(model.get_embedding_dimension() or 0))
    prompt = resolve_prompt(model, prompt, prompt_name)
    record = {
        "shape": list(shape),
        "dtype": dtype,
        "model": _model_digest(model, prompt, normalize_embeddings),
        "inputs": _inputs_digest(inputs),
    }
    if all(part.is_file() for part in (path, progress_path, record_path)):  # else one was removed, to begin anew
        anew = f"Encode into another file, or remove it together with {record_path.name} and {progress_path.name}."
        try:
            earlier = dict(json.loads(record_path.read_text("utf8")))
            for part in (path, progress_path):
                open_memmap(part, "r")  # refuses a file that was cut off: "r+" would fill it up with zeros
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} was begun, but a file is damaged ({error}). {anew}") from error
        if different := [_DIFFERENCES[key] for key, value in record.items() if earlier.get(key) != value]:
            raise ValueError(f"{path} was begun with {' and '.join(different)}. {anew}")
        rows, progress = open_memmap(path, "r+"), open_memmap(progress_path, "r+")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        for part in (record_path, progress_path):  # of rows that are gone
            part.unlink(missing_ok=True)
        rows = open_memmap(path, "w+", dtype=dtype, shape=shape)
        progress = open_memmap(progress_path, "w+", dtype=np.uint8, shape=shape[:1])
        for part in (path, progress_path):
            _reserve(part)
        unfinished = record_path.with_suffix(".part")
        unfinished.write_text(json.dumps(record), "utf8")
        unfinished.replace(record_path)  # last: without it, the next run begins anew
    pending = np.flatnonzero(progress != _DONE)
    result = EncodedFile(path, 0)
    states: list[tuple[list[int], int]] = []

    def flush() -> None:
        rows.flush()  # before what says that they are there
        for indices, state in states:
            progress[indices] = state
        progress.flush()
        states.clear()

    batches = stream(
        model,
        ((int(n), inputs[int(n)]) for n in pending),
        batch_size=batch_size,
        prompt=prompt or "",  # resolved already
        normalize_embeddings=normalize_embeddings,
        show_progress_bar=show_progress_bar,
        total=len(pending),
    )
    try:
        for number, batch in enumerate(batches, start=1):
            if batch.indices:
                rows[batch.indices] = batch.embeddings.cpu().numpy()
                states.append((batch.indices, _DONE))
            if lost := [row.index for row in batch.skipped if row.index is not None]:
                rows[lost] = np.nan
                states.append((lost, _SKIPPED))
            result.encoded += len(batch.indices)
            result.skipped += batch.skipped
            if number % _BATCHES_A_FLUSH == 0:
                flush()
    finally:  # also where Ctrl-C or an error ends the run: what was computed stays
        flush()
    result.skipped.sort(key=lambda row: row.index or 0)
    return result


def _reserve(file: Path) -> None:
    """Take the space of a file. A mapped page that finds no room on the disk kills the process without a word."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


def _model_digest(model: SLQEncoder, prompt: str | None, normalize: bool) -> str:
    settings = settings_digest(model.backbone, model.processor, model.slq_config.image_kwargs)
    whole = encoder_digest(model).encode() + settings + repr(prompt).encode() + (b"normalized" if normalize else b"")
    return hashlib.sha256(whole).hexdigest()


def _inputs_digest(inputs: Sequence[Any]) -> str:
    """Of all inputs of a list that can be written down; of anything else, which is slow to read, some inputs' content."""
    digest, written = hashlib.sha256(), json.JSONEncoder(default=_written)
    sample = set(np.linspace(0, max(0, len(inputs) - 1), _SAMPLED_INPUTS).astype(int).tolist())
    for index in range(len(inputs)) if isinstance(inputs, list | tuple) else sorted(sample)[: len(inputs)]:
        value = inputs[index]
        try:
            digest.update(f"{written.encode(value)}\n".encode())
        except TypeError:  # it holds an image in memory
            if index in sample:
                with suppress(ValueError):  # it will be skipped and named
                    row = read_row(value)
                    digest.update(f"{index} {row.messages()} ".encode() + row.media_digest())
    return digest.hexdigest()


def _written(part: Any) -> Any:
    """A part of an input that JSON has no form for. A path is not the text that spells it."""
    if isinstance(part, Mapping):
        return dict(part)
    if isinstance(part, Path | PdfPage):
        return [repr(part)]
    raise TypeError

"""How evaluators encode: any Sentence Transformer, each distinct input once, and so that a killed run goes on."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor

from slq_embed.encoder import SLQEncoder
from slq_embed.encoding.protocol import Task, resolve_prompt
from slq_embed.inputs import read_image, report

logger = logging.getLogger(__name__)

_BATCHES_A_CHUNK = 32


@dataclass(frozen=True)
class EvaluatorOptions:
    """What all evaluators take.

    Args:
        name: Prefix of the metrics.
        batch_size: Inputs a batch.
        show_progress_bar: Whether to show one while encoding.
        write_csv: Whether to append the metrics to a file in the output path.
        embeddings_folder: Folder to keep the embeddings of one :class:`~slq_embed.SLQEncoder` in: a run that was killed
            goes on where it was, and a finished one is read. Another model needs another folder.
    """

    name: str = ""
    batch_size: int = 32
    show_progress_bar: bool = False
    write_csv: bool = True
    embeddings_folder: str | Path | None = None


def require_images(images: Sequence[Any]) -> None:
    """Raise a ValueError if an image is a str, which would be encoded as a text."""
    found = images if isinstance(images, str) else next((image for image in images if isinstance(image, str)), None)
    if found is not None:
        raise ValueError(
            f"images has the str {reprlib.repr(found)}, but a str is always a text. For the image of a path, pass "
            'pathlib.Path(path) or {"image": path}.'
        )


def embed(
    model: SentenceTransformer, inputs: Sequence[Any], task: Task, options: EvaluatorOptions, part: str
) -> Tensor:
    """Encode each distinct input once.

    Args:
        model: Any Sentence Transformer that encodes the inputs.
        inputs: Texts, images, or both, as :func:`slq_embed.inputs.rows.read_row` takes them. For another model than
            an ``SLQEncoder``, images are decoded, some batches at a time.
        task: Whether they are queries or documents: the model may have a prompt for each.
        options: The evaluator's options.
        part: What these inputs are, in the name of the file of their embeddings.

    Returns:
        ``(inputs, H)``. Normalised, so that dot products are cosines; as the model gives them if its similarity is the
        dot product.

    Raises:
        ValueError: If inputs cannot be read; all of them are named. Or if the folder holds embeddings of another model.
    """
    if options.embeddings_folder is not None and not isinstance(model, SLQEncoder):
        raise ValueError(
            f"embeddings_folder needs an SLQEncoder, but the model is a {type(model).__name__}. Leave it out."
        )
    distinct, index = _distinct(inputs)
    logger.info("Encoding %d %s", len(distinct), part)
    normalize = getattr(model, "similarity_fn_name", None) != "dot"
    settings: dict[str, Any] = {
        "batch_size": options.batch_size,
        "show_progress_bar": options.show_progress_bar,
        "normalize_embeddings": normalize,
    }
    if options.embeddings_folder is not None:
        path = Path(options.embeddings_folder) / f"{options.name + '_' if options.name else ''}{part}.npy"
        encoded = model.encode_to_file(distinct, path, prompt=resolve_prompt(model, task=task) or "", **settings)
        if encoded.skipped:
            raise ValueError(
                f"A benchmark needs all its inputs, but of the {part}, {report(encoded.skipped)}. Repair these and run "
                "again: the others are encoded already."
            )
        rows = torch.tensor(encoded.embeddings, device=model.device)
    else:
        encode = model.encode_query if task == "query" else model.encode_document
        size = len(distinct) if isinstance(model, SLQEncoder) else options.batch_size * _BATCHES_A_CHUNK
        chunks = (distinct[start : start + size] for start in range(0, len(distinct), max(1, size)))
        if not isinstance(model, SLQEncoder):
            chunks = ([_decoded(value) for value in chunk] for chunk in chunks)
        rows = torch.cat([encode(chunk, convert_to_tensor=True, **settings) for chunk in chunks])
    return rows if len(distinct) == len(inputs) else rows[torch.tensor(index, device=rows.device)]


def _distinct(inputs: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Inputs without repetitions, and for each input which of them it is."""
    positions: dict[Any, int] = {}
    distinct: list[Any] = []
    index = []
    for value in inputs:
        position = positions.setdefault(_identity(value), len(distinct))
        if position == len(distinct):
            distinct.append(value)
        index.append(position)
    return distinct, index


def _identity(value: Any) -> Any:
    if isinstance(value, str | Path):
        return value
    if isinstance(value, Mapping) and set(value) <= {"text", "image"}:
        return value.get("text"), _identity(value.get("image"))
    return id(value)  # an image in memory


def _decoded(value: Any) -> Any:
    """An input as plain Sentence Transformers take it: they know neither ``pathlib.Path`` nor undecoded images."""
    if isinstance(value, str):
        return {"text": value}  # never read as a path
    if isinstance(value, Mapping) and set(value) <= {"text", "image"}:
        image, text = value.get("image"), value.get("text")
        return {
            **({} if image is None else {"image": read_image(image)}),
            **({} if text is None else {"text": text}),
        }
    return value if isinstance(value, Image.Image) or not isinstance(value, Path | Mapping) else read_image(value)

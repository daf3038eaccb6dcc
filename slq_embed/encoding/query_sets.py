"""Several query sets on one backbone: each input runs once, and each set embeds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slq_embed.encoding.stream import collect, stream

if TYPE_CHECKING:
    from slq_embed.encoder import SLQEncoder

_OF_THE_HOST = {
    "output_value": "sentence_embedding",
    "precision": "float32",
    "device": None,
    "pool": None,
    "chunk_size": None,
}
"""Arguments of the host's ``encode``, which ``encode_query`` passes on, and their values here."""


def encode_query_sets(
    model: SLQEncoder,
    inputs: Sequence[Any],
    query_sets: Mapping[str, SLQEncoder],
    prompt_name: str | None = None,
    prompt: str | None = None,
    batch_size: int = 32,
    show_progress_bar: bool | None = None,
    *,
    convert_to_numpy: bool = True,
    convert_to_tensor: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Encode inputs with several query sets; see :meth:`slq_embed.SLQEncoder.encode`.

    Args:
        model: The encoder that reads the inputs.
        inputs: Texts, images, or both.
        query_sets: Encoders on the same backbone, by name.
        prompt_name: A name among the model's prompts.
        prompt: A system message.
        batch_size: Inputs a batch.
        show_progress_bar: Whether to show one.
        convert_to_numpy: Whether to give NumPy arrays, else a list of tensors.
        convert_to_tensor: Whether to give tensors on the model's device.
        **options: For :func:`slq_embed.encoding.stream.stream`.

    Returns:
        Embeddings ``(len(inputs), H)`` by name.

    Raises:
        ValueError: If a query set would see another prefix, an input cannot be read, or an argument does not fit.
    """
    for name, only in _OF_THE_HOST.items():
        if (value := options.pop(name, only)) != only:
            raise ValueError(
                f"{name} is {value!r}, but with query_sets only {only!r} is possible. Leave one of the two out."
            )
    options |= {"prompt_name": prompt_name, "prompt": prompt, "batch_size": batch_size}
    options |= {"show_progress_bar": bool(show_progress_bar), "strict": True, "total": len(inputs)}
    batches = stream(model, enumerate(inputs), query_sets=query_sets, **options)
    rows = collect(batches, len(inputs), to_cpu=not convert_to_tensor)
    widths = [int(encoder.get_embedding_dimension() or 0) for encoder in query_sets.values()]
    parts = rows.split(widths, dim=1) if len(inputs) else [rows.new_empty(0, width) for width in widths]
    if convert_to_tensor:
        return dict(zip(query_sets, parts, strict=True))
    return {
        name: part.numpy() if convert_to_numpy else list(part) for name, part in zip(query_sets, parts, strict=True)
    }

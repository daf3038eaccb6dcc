"""FAISS behind the index: its types by name, their settings, and their copies on a GPU."""

from __future__ import annotations

from typing import Any

MOST_ON_GPU = 2048
"""Hits a query, of which a GPU finds no more."""


def import_faiss() -> Any:
    """FAISS.

    Raises:
        ImportError: If it is not installed; the message says how.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "The search index needs FAISS: pip install 'slq-embed[faiss]', or 'slq-embed[faiss-gpu]' for a GPU."
        ) from error
    return faiss


def make_faiss_index(factory: str, dimension: int) -> Any:
    """An empty index for inner products.

    Raises:
        ValueError: If FAISS knows no such type.
    """
    faiss = import_faiss()
    try:
        return faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"FAISS makes no index of {factory!r} and dimension {dimension}: {error}") from error


def set_parameters(index: Any, parameters: str, factory: str, *, on_gpu: bool = False) -> None:
    """Set search-time settings, such as ``"nprobe=32"``.

    Raises:
        ValueError: If the index has no such settings.
    """
    faiss = import_faiss()
    if not parameters:
        return
    try:
        (faiss.GpuParameterSpace() if on_gpu else faiss.ParameterSpace()).set_index_parameters(index, parameters)
    except RuntimeError as error:
        raise ValueError(f"{factory!r} has no {parameters!r}: {error}") from error


def has_gpu() -> bool:
    """Whether faiss-gpu and a GPU are there."""
    faiss = import_faiss()
    # Without a GPU, faiss-gpu gives an index that stores nothing: ask first.
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def copy_to_gpu(index: Any, parameters: str, factory: str) -> tuple[Any, Any]:
    """A copy on the first GPU, and the resources that must live as long.

    Raises:
        RuntimeError: If the type has no GPU form, such as HNSW.
    """
    faiss = import_faiss()
    resources = faiss.StandardGpuResources()
    copy = faiss.index_cpu_to_gpu(resources, 0, index)
    set_parameters(copy, parameters, factory, on_gpu=True)
    return copy, resources

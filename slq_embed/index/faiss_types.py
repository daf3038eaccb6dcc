"""FAISS's index types: by name, with their settings, and as copies on a GPU."""

from __future__ import annotations

import re
from typing import Any

MOST_ON_GPU = 2048
"""The most hits that a GPU returns for a query."""
LEAST_TO_LEARN_FROM = 10_000
"""The least embeddings for a type to learn from: quantizers need 39 for each of the 256 values of a byte."""


def import_faiss() -> Any:
    """Import FAISS.

    Raises:
        ImportError: If it is not installed. The message says how to install it.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "The search index needs FAISS: pip install 'slq-embed[faiss]', or 'slq-embed[faiss-gpu]' for a GPU."
        ) from error
    return faiss


def make_faiss_index(factory: str, dimension: int) -> Any:
    """Make an empty index for inner products.

    Args:
        factory: FAISS's name of the type.
        dimension: Numbers in an embedding.

    Raises:
        ValueError: If FAISS has no such type, or the type cannot be used here.
    """
    faiss = import_faiss()
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
        faiss.clone_index(index)  # deletion needs this
    except RuntimeError as error:
        raise ValueError(
            f"FAISS makes no index of the type {factory!r} and dimension {dimension}: {error}. Use another factory, such "
            'as "Flat".'
        ) from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(
            f"FAISS makes {factory!r} for distances only, but inner products are needed. Use another factory."
        )
    if isinstance(index, faiss.IndexIDMap):
        raise ValueError(f"The type {factory!r} maps ids, but this index has ids already: leave IDMap out.")
    kind = type(faiss.downcast_index(faiss.try_extract_index_ivf(index))).__name__
    if re.search("RaBitQ|FastScan", kind) and not isinstance(index, faiss.IndexRefine):
        # FAISS returns wrong rows, or crashes.
        raise ValueError(
            f"The type {factory!r} does not return its rows, but deletion needs them. Use '{factory},RFlat'."
        )
    return index


def least_to_learn_from(index: Any) -> int:
    """The least embeddings for a type to learn from. With fewer, its later searches miss more.

    FAISS itself warns below 39 for each cluster.
    """
    clusters = import_faiss().try_extract_index_ivf(index)
    for_clusters = 0 if clusters is None else int(clusters.nlist * clusters.cp.min_points_per_centroid)
    return max(LEAST_TO_LEARN_FROM, for_clusters)


def rows_of(index: Any, rows: Any) -> Any:
    """Embeddings ``(n, dimension)`` by row number, as exact as the type keeps them."""
    faiss = import_faiss()
    if (clusters := faiss.try_extract_index_ivf(index)) is not None:
        clusters.make_direct_map()  # the table from rows to clusters
    return index.reconstruct_batch(rows)


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
        raise ValueError(
            f'The type {factory!r} has no {parameters!r}: {error}. Use its own settings, such as "nprobe=32" for IVF.'
        ) from error


def has_gpu() -> bool:
    """Whether faiss-gpu is installed and there is a GPU."""
    faiss = import_faiss()
    # Without a GPU, faiss-gpu makes an index that stores nothing: ask first.
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def copy_to_gpu(index: Any, parameters: str, factory: str) -> tuple[Any, Any]:
    """Copy an index to the first GPU.

    Args:
        index: The index.
        parameters: Search-time settings.
        factory: FAISS's name of the type, for messages.

    Returns:
        The copy, and its resources: they must live as long as the copy.

    Raises:
        RuntimeError: If the type has no GPU form, such as HNSW.
    """
    faiss = import_faiss()
    resources = faiss.StandardGpuResources()
    copy = faiss.index_cpu_to_gpu(resources, 0, index)
    set_parameters(copy, parameters, factory, on_gpu=True)
    return copy, resources

"""FAISS behind the index: its types by name, their settings, and their copies on a GPU."""

from __future__ import annotations

import re
from typing import Any

MOST_ON_GPU = 2048
"""Hits a query, of which a GPU finds no more."""
LEAST_TO_LEARN_FROM = 10_000
"""Embeddings for quantizers: 39 for each of the 256 values of a byte."""


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
        ValueError: If FAISS knows no such type, or it does not serve here.
    """
    faiss = import_faiss()
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
        faiss.clone_index(index)  # which deletion needs
    except RuntimeError as error:
        raise ValueError(f"FAISS makes no index of {factory!r} and dimension {dimension}: {error}") from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(
            f"FAISS makes {factory!r} for distances only, but inner products are needed. Use another type."
        )
    if isinstance(index, faiss.IndexIDMap):
        raise ValueError(f"{factory!r} maps ids, which are kept here already: leave IDMap out.")
    kind = type(faiss.downcast_index(faiss.try_extract_index_ivf(index))).__name__
    if re.search("RaBitQ|FastScan", kind) and not isinstance(index, faiss.IndexRefine):
        # FAISS gives back a row that is coded to something else, or crashes.
        raise ValueError(f"{factory!r} cannot give its rows back, which deletion needs. Use '{factory},RFlat'.")
    return index


def least_to_learn_from(index: Any) -> int:
    """Embeddings without which a type learns badly, and what is added later suffers: by FAISS's measure, 39 a cluster."""
    clusters = import_faiss().try_extract_index_ivf(index)
    fitting = 0 if clusters is None else int(clusters.nlist * clusters.cp.min_points_per_centroid)
    return max(LEAST_TO_LEARN_FROM, fitting)


def rows_of(index: Any, rows: Any) -> Any:
    """Embeddings ``(n, dimension)`` by row number, as the index has kept them."""
    faiss = import_faiss()
    if (clusters := faiss.try_extract_index_ivf(index)) is not None:
        clusters.make_direct_map()  # to find a row's cluster
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

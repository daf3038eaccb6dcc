"""The embeddings of a search index: a FAISS index of any type, in memory, in a file, or on a GPU."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slq_embed.index.faiss_types import (
    MOST_ON_GPU,
    copy_to_gpu,
    has_gpu,
    import_faiss,
    least_to_learn_from,
    make_faiss_index,
    rows_of,
    set_parameters,
)

logger = logging.getLogger(__name__)

_CHUNK = 65_536


class FaissIndex:
    """Embeddings by row number. The caller holds a lock.

    A row is never removed in place: :meth:`keeping` copies the other rows. Types that learn from embeddings (clusters,
    quantizers) start as an exact index, until :meth:`learned` has enough embeddings.

    Args:
        factory: FAISS's name of the index type.
        dimension: Numbers in an embedding.
        search_parameters: FAISS's search-time settings.
        gpu: Whether to search on a GPU; by default where that is possible.

    Raises:
        ImportError: If FAISS is not installed.
        ValueError: If an argument does not fit.
    """

    def __init__(self, factory: str, dimension: int, search_parameters: str = "", gpu: bool | None = None) -> None:
        if gpu and not has_gpu():
            raise ValueError("gpu=True needs faiss-gpu and a GPU: pip install 'slq-embed[faiss-gpu]'.")
        self.factory, self.dimension, self._gpu = factory, dimension, gpu
        self._index = make_faiss_index(factory, dimension)
        self._count_to_learn: int | None = (
            None  # embeddings that the next attempt needs; None: nothing is to be learned
        )
        self._gpu_copy: tuple[Any, Any] | None = None
        self._mapped_file: Path | None = None
        self.search_parameters = search_parameters
        if not self._index.is_trained:
            self._count_to_learn = least_to_learn_from(self._index)
            self._index = make_faiss_index("Flat", dimension)

    def __len__(self) -> int:
        """Number of rows, deleted ones included."""
        return int(self._index.ntotal)

    @property
    def exact_for_now(self) -> bool:
        """Whether the type has still to learn, and an exact index stands in for it."""
        return self._count_to_learn is not None

    @property
    def search_parameters(self) -> str:
        """FAISS's search-time settings."""
        return self._search_parameters

    @search_parameters.setter
    def search_parameters(self, search_parameters: str) -> None:
        index = make_faiss_index(self.factory, self.dimension) if self.exact_for_now else self._index
        set_parameters(index, search_parameters, self.factory)  # refuses those that do not fit
        self._search_parameters, self._gpu_copy = search_parameters, None

    def normalised(self, embeddings: NDArray[Any] | torch.Tensor) -> NDArray[np.float32]:
        """A normalised copy, ``(n, dimension)`` in float32; tensors of any precision, on any device.

        Raises:
            ValueError: If the shape is another one, or a number is not finite.
        """
        if isinstance(embeddings, torch.Tensor):  # NumPy has no bfloat16
            embeddings = embeddings.detach().float().cpu().numpy()
        rows = np.array(embeddings, np.float32, ndmin=2)
        if not rows.size:
            return np.zeros((0, self.dimension), np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.dimension:
            raise ValueError(f"Embeddings have shape {rows.shape}, but (n, {self.dimension}) is needed.")
        if (bad := np.flatnonzero(~np.isfinite(rows).all(axis=1))).size:
            raise ValueError(
                f"{len(bad)} of {len(rows)} embeddings hold numbers that are not finite (NaN or infinity); the first "
                f"has index {bad[0]}. Leave them out: NaN stands for an input that could not be read."
            )
        rows /= np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
        return rows

    def add(self, embeddings: NDArray[np.float32]) -> None:
        """Add normalised embeddings ``(n, dimension)``; their rows follow the last row.

        Raises:
            ValueError: If the mapped file was replaced.
        """
        self.read_whole()
        self._index.add(embeddings)
        self._gpu_copy = None

    def keeping(self, rows: NDArray[np.int64]) -> FaissIndex:
        """An index of these rows only, numbered from 0 on in their order. What the type has learned stays.

        Raises:
            ValueError: If the mapped file was replaced.
        """
        self.read_whole()
        empty = import_faiss().clone_index(self._index)
        empty.reset()
        return self._with_rows(empty, rows)

    def can_learn_from(self, count: int) -> bool:
        """Whether the type has still to learn, and so many embeddings are worth an attempt."""
        return self._count_to_learn is not None and count >= self._count_to_learn

    def learned(self, rows: NDArray[np.int64]) -> FaissIndex | None:
        """An index of the type that was asked for. It learns from these rows, and holds them as :meth:`keeping`.

        Returns:
            The index; ``None`` if the rows are too few for FAISS.

        Raises:
            ValueError: If the mapped file was replaced.
        """
        self.read_whole()
        empty = make_faiss_index(self.factory, self.dimension)
        try:
            empty.train(rows_of(self._index, rows))
        except RuntimeError as error:  # too few
            logger.info("%r stays exact for now: %s", self.factory, error)
            self._count_to_learn = len(rows) + 1
            return None
        set_parameters(empty, self.search_parameters, self.factory)
        index = self._with_rows(empty, rows)
        index._count_to_learn = None
        return index

    def _with_rows(self, faiss_index: Any, rows: NDArray[np.int64]) -> FaissIndex:
        for start in range(0, len(rows), _CHUNK):
            faiss_index.add(rows_of(self._index, rows[start : start + _CHUNK]))
        index = copy.copy(self)
        index._index, index._gpu_copy = faiss_index, None
        return index

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and rows of the nearest embeddings, both ``(n, k)``; the row is -1 where there are no more.

        Args:
            queries: Normalised embeddings, ``(n, dimension)``.
            k: Hits for each query.
        """
        index = self._index
        if self.uses_gpu(k):
            parameters = "" if self.exact_for_now else self.search_parameters
            try:
                self._gpu_copy = self._gpu_copy or copy_to_gpu(index, parameters, self.factory)
                index = self._gpu_copy[0]
            except RuntimeError:  # this type has no GPU form
                if self._gpu:
                    raise
                self._gpu = False
        scores, rows = index.search(queries, k)
        return scores, rows

    def search_rows(
        self, queries: NDArray[np.float32], k: int, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """As :meth:`search`, over these rows only, and exact as far as the type keeps embeddings exact."""
        best = import_faiss().ResultHeap(len(queries), k, keep_max=True)
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            scores, positions = import_faiss().knn(
                queries, rows_of(self._index, part), min(k, len(part)), metric=import_faiss().METRIC_INNER_PRODUCT
            )
            best.add_result(scores, part[positions])
        best.finalize()
        return best.D, best.I

    def uses_gpu(self, k: int) -> bool:
        """Whether a search for ``k`` hits goes to a GPU. Deleted rows take part there: remove them first."""
        return self._gpu is not False and k <= MOST_ON_GPU and has_gpu()

    def write(self, file: Path) -> None:
        """Write to a file."""
        faiss = import_faiss()
        with file.open("wb") as opened:  # FAISS's own file does not say if its last bytes found no room on the disk
            faiss.write_index(self._index, faiss.PyCallbackIOWriter(opened.write))

    def map_file(self, file: Path, exact_for_now: bool) -> None:
        """Map a written file in place of the present rows.

        Args:
            file: From :meth:`write`.
            exact_for_now: As it was when the file was written.
        """
        faiss = import_faiss()
        self._index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
        if not exact_for_now:
            self._count_to_learn = None
        self._mapped_file, self._gpu_copy = file, None
        self._set_parameters()

    @property
    def is_mapped(self) -> bool:
        """Whether the embeddings lie in a mapped file."""
        return self._mapped_file is not None

    def read_whole(self) -> None:
        """Read the mapped file into memory, if there is one: only then the index can change.

        Raises:
            ValueError: If the file was replaced.
        """
        self.refuse_replaced()
        if self._mapped_file is not None:
            self._index, self._mapped_file = import_faiss().read_index(str(self._mapped_file)), None
            self._set_parameters()

    def refuse_replaced(self) -> None:
        """Raise a ValueError if the mapped file was replaced: what is held is searched, but it cannot change."""
        if self._mapped_file is not None and not self._mapped_file.is_file():
            raise ValueError(
                f"The index in {self._mapped_file.parent.parent} was saved anew from elsewhere: load it again to change it."
            )

    def _set_parameters(self) -> None:
        if not self.exact_for_now:
            set_parameters(self._index, self.search_parameters, self.factory)

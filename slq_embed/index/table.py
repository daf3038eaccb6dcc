"""The rows of a search index: an embedding, an id and metadata each, in memory or in the files of a save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq_embed.index.faiss_index import FaissIndex
from slq_embed.index.records import IndexRecords

EMBEDDINGS_FILE, RECORDS_FILE = "embeddings.faiss", "records.sqlite"
LEARN_AT = 200_000
"""With so many embeddings, index types that learn (clusters, quantizers) learn at once, before any search or save."""
_MOST_DELETED = 0.2
_FEW = 0.1
"""Below this share of allowed rows, only these are scored; above it, the index is asked for more hits than are wanted."""


@dataclass(frozen=True)
class Hit:
    """A search result.

    Args:
        id: The id.
        score: Cosine similarity to the query.
        metadata: What was stored with the id.
    """

    id: str
    score: float
    metadata: dict[str, Any] = field(default_factory=dict)


class IndexTable:
    """Embeddings with their ids and metadata, by the same row numbers. The caller holds a lock.

    A row is deleted by deleting its record. Its embedding stays, and searches pass over it, until :meth:`compact`.

    Args:
        vectors: The embeddings.
        records: The ids and metadata.
    """

    def __init__(self, vectors: FaissIndex, records: IndexRecords) -> None:
        self.vectors, self.records = vectors, records

    def __len__(self) -> int:
        """Number of rows that were not deleted."""
        return len(self.records)

    @classmethod
    def read(cls, files: Path, settings: dict[str, Any], *, gpu: bool | None, mmap: bool) -> IndexTable:
        """Read a save.

        Args:
            files: A folder that :meth:`write` has written to.
            settings: What :meth:`settings` returned then.
            gpu: As for :class:`slq_embed.index.EmbeddingIndex`.
            mmap: Whether to map the embeddings instead of reading them.
        """
        vectors = FaissIndex(settings["factory"], settings["dimension"], settings["search_parameters"], gpu)
        vectors.map_file(files / EMBEDDINGS_FILE, exact_for_now=not settings["built"])
        if not mmap:
            vectors.read_whole()
        return cls(vectors, IndexRecords(files / RECORDS_FILE))

    def write(self, files: Path) -> None:
        """Write to a folder without such files."""
        self.vectors.write(files / EMBEDDINGS_FILE)
        self.records.save(files / RECORDS_FILE)

    def settings(self) -> dict[str, Any]:
        """What :meth:`read` needs beside the files."""
        return {
            "factory": self.vectors.factory,
            "built": not self.vectors.exact_for_now,
            "search_parameters": self.vectors.search_parameters,
            "dimension": self.vectors.dimension,
        }

    def moved(self, files: Path) -> None:
        """Map the embeddings from the folder of a later save, if they are mapped: the earlier one may be gone."""
        if self.vectors.is_mapped:
            self.vectors.map_file(files / EMBEDDINGS_FILE, exact_for_now=self.vectors.exact_for_now)

    def add(
        self, embeddings: NDArray[np.float32], ids: Sequence[str], metadata: Sequence[str], replace: bool = False
    ) -> None:
        """Add rows.

        Args:
            embeddings: ``(n, dimension)``, normalised.
            ids: One for each embedding.
            metadata: One JSON text for each embedding.
            replace: Whether they take the place of rows with the same ids.

        Raises:
            ValueError: If an id is there already and may not be, or the mapped file was replaced. Then nothing is added.
        """
        self.records.check(ids, new=not replace)
        replaced = self.records.rows_of(ids).values() if replace else ()
        first = len(self.vectors)
        self.vectors.add(embeddings)
        self.records.add(first, ids, metadata, replaced)
        self._compact_if_many_were_deleted()
        if len(self) >= LEARN_AT:
            self.learn()

    def delete(self, ids: Iterable[str]) -> int:
        """Delete rows by id, and compact if many rows are deleted; returns how many of the ids there were.

        Raises:
            ValueError: If the mapped file was replaced.
        """
        rows = self.records.rows_of(set(ids))
        if rows:
            self.vectors.refuse_replaced()
            self.records.remove(rows.values())
            self._compact_if_many_were_deleted()
        return len(rows)

    def _compact_if_many_were_deleted(self) -> None:
        if len(self.vectors) - len(self) > _MOST_DELETED * len(self.vectors):
            self.compact()

    def compact(self) -> None:
        """Remove the embeddings of deleted rows, and number the others anew."""
        if len(self) < len(self.vectors):
            self._replace(self.vectors.keeping(self.records.rows()))

    def learn(self) -> None:
        """Change from an exact index to the type that was asked for, once there is enough to learn from."""
        if self.vectors.can_learn_from(len(self)):
            vectors = self.vectors.learned(self.records.rows())
            if vectors is not None:
                self._replace(vectors)

    def _replace(self, vectors: FaissIndex) -> None:
        self.records.renumber()
        self.vectors = vectors

    def search(self, queries: NDArray[np.float32], k: int, where: Mapping[str, Any] | None = None) -> list[list[Hit]]:
        """The nearest rows, best first: ``k`` for each query, or fewer if there are fewer.

        Args:
            queries: ``(n, dimension)``, normalised.
            k: At least 1.
            where: A filter on the metadata.

        Raises:
            ValueError: If the filter cannot be read.
        """
        self.learn()
        k = min(k, len(self))
        if k and self.vectors.uses_gpu(k):
            self.compact()
        allowed = None if where is None else self.records.rows_where(where)
        count = len(self) if allowed is None else len(allowed)
        k = min(k, count)
        if not k or not len(queries):
            return [[] for _ in queries]
        total = len(self.vectors)
        if allowed is not None and count < _FEW * total:
            return self._hits(*self.vectors.search_rows(queries, k, allowed), allowed, k)
        asked = k if total == count else min(2 * k * total // count, total)
        while True:
            scores, rows = self.vectors.search(queries, asked)
            hits = self._hits(scores, rows, allowed, k)
            # Rows that do not count are among the results: ask for more, unless these are all (then -1 fills the rest).
            if asked == total or all(len(h) >= k or -1 in line for h, line in zip(hits, rows, strict=True)):
                return hits
            asked = min(4 * asked, total)

    def _hits(
        self, scores: NDArray[np.float32], rows: NDArray[np.int64], allowed: NDArray[np.int64] | None, k: int
    ) -> list[list[Hit]]:
        """The first ``k`` results of each query that were not deleted, and are allowed."""
        counts = rows >= 0 if allowed is None else np.isin(rows, allowed)
        records = self.records.get(np.unique(rows[counts]).tolist())
        return [
            [
                Hit(records[row][0], float(score), records[row][1])
                for score, row in zip(*line, strict=True)
                if row in records
            ][:k]
            for line in zip(scores, np.where(counts, rows, -1).tolist(), strict=True)
        ]

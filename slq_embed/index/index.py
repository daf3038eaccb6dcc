"""A search index of images and texts: FAISS for the embeddings, ids and metadata beside them."""

from __future__ import annotations

import logging
import operator
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq_embed.encoder import SLQEncoder
from slq_embed.encoding.protocol import encoder_digest
from slq_embed.encoding.stream import stream
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
from slq_embed.index.folder import embeddings_file, read_about, records_file, write_folder
from slq_embed.index.inputs import Metadata, as_json, with_ids_and_metadata
from slq_embed.index.records import IndexRecords
from slq_embed.inputs.rows import ONE_INPUT, Skipped
from slq_embed.serving import embed

logger = logging.getLogger(__name__)

TRAINING_EMBEDDINGS = 200_000
"""Index types that learn from data (IVF, quantizers) are made of so many, or at the first search or save of enough."""
_MOST_DELETED = 0.2
_CHUNK = 65_536


@dataclass(frozen=True)
class Hit:
    """Something that was found.

    Args:
        id: Its id.
        score: Cosine similarity to the query.
        metadata: What was stored with it.
    """

    id: str
    score: float
    metadata: dict[str, Any] = field(default_factory=dict)


class EmbeddingIndex:
    """Embeddings of images, texts and both, searched by any of them.

    Threads may share it. It is searched on a GPU where faiss-gpu and a GPU are there and the index type has a GPU
    form, else on the CPU. Types that learn from embeddings (clusters, quantizers) are kept and searched exactly until
    there are enough to learn from (10,000, and 39 a cluster) and then a search, a save, or 200,000 embeddings.

    Args:
        model: The encoder; without one, embeddings come from elsewhere (:meth:`add_embeddings`).
        factory: FAISS's name of the index type: ``"Flat"`` is exact; ``"IVF4096,Flat"`` (clusters) and
            ``"HNSW32,Flat"`` (a graph) are faster for many embeddings; ``"SQ8"``, ``"SQ4"`` or ``"IVF4096,SQ8"`` keep
            fewer bytes, and with ``",RFlat"`` behind them rescore what they find by the exact embeddings.
        search_parameters: FAISS's search-time settings: ``"nprobe=32"`` (IVF), ``"efSearch=64"`` (HNSW),
            ``"k_factor_rf=4"`` (how many times as many are rescored), joined by commas.
        dimension: Numbers in an embedding, without a model.
        gpu: Whether to search on a GPU; by default where that is possible.

    Raises:
        ImportError: If FAISS is not installed.
        ValueError: If an argument does not fit.
    """

    def __init__(
        self,
        model: SLQEncoder | None = None,
        factory: str = "Flat",
        *,
        search_parameters: str = "",
        dimension: int | None = None,
        gpu: bool | None = None,
    ) -> None:
        if model is None and dimension is None:
            raise ValueError("An index needs a model, or the dimension of the embeddings that it will be given.")
        self.model, self.factory, self.search_parameters, self.gpu = model, factory, search_parameters, gpu
        self.dimension = int(dimension or 0) if model is None else int(model.get_embedding_dimension() or 0)
        if gpu and not has_gpu():
            raise ValueError("gpu=True needs faiss-gpu and a GPU: pip install 'slq-embed[faiss-gpu]'.")
        self._index = make_faiss_index(factory, self.dimension)
        self._built = True
        self._set_parameters()  # refuses those that do not fit
        if not self._index.is_trained:
            self._index, self._built = make_faiss_index("Flat", self.dimension), False
        self._tried = 0  # with so many embeddings
        self._records = IndexRecords()
        self._made_by: str | None = None  # the digest of the model
        self._model_name: str | None = None
        self._on_gpu: tuple[Any, Any] | None = None
        self._saved: dict[Path, Path] = {}  # what folders were last known to hold
        self._mapped: Path | None = None  # the files that are not read whole
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        state = "" if self._built else ", exact for now"
        return f"EmbeddingIndex({self.factory!r}{state}: {len(self)} of dimension {self.dimension})"

    def __contains__(self, id_: Any) -> bool:
        with self._lock:
            return bool(self._records.rows_of([str(id_)]))

    def ids(self) -> list[str]:
        """All ids, in the order of their rows; :meth:`add` adds inputs of like size together."""
        with self._lock:
            return self._records.ids()

    def metadata(self, id_: Any) -> dict[str, Any]:
        """What was stored with an id.

        Raises:
            KeyError: If there is no such id.
        """
        with self._lock:
            for _, about in self._records.get(self._records.rows_of([str(id_)]).values()).values():
                return about
            raise KeyError(f"There is no id {str(id_)!r} in the index.")

    def add(
        self,
        inputs: Any,
        ids: Iterable[Any] | None = None,
        metadata: Iterable[Metadata] | Metadata | None = None,
        *,
        batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> list[Skipped]:
        """Embed inputs and add them. Others may search meanwhile.

        Args:
            inputs: Images (PIL, ``pathlib.Path``), texts, or dicts of both: one or any number; read 32 batches ahead.
            ids: One each; by default a path's own name, and for anything else a random one.
            metadata: One each, as JSON can hold it; by default the path or the text.
            batch_size: Inputs a batch; halved as long as a batch does not fit into memory.
            show_progress_bar: Whether to show one.

        Returns:
            Inputs that could not be read, and were left out.

        Raises:
            ValueError: If an id is there already, inputs, ids and metadata are not equally many, or the model is not
                the one that the index was made with. What was added before it stays.
        """
        model = self._checked_model()
        records: dict[int, tuple[str, str]] = {}  # of what was read and is not added yet
        waiting: set[str] = set()

        def numbered() -> Iterator[tuple[int, Any]]:
            for number, (value, id_, about) in enumerate(with_ids_and_metadata(inputs, ids, metadata)):
                if id_ in waiting:
                    raise ValueError(f"The id {id_!r} was given twice. Each input needs one of its own.")
                self._refuse_known([id_])  # before it is embedded
                records[number] = id_, about
                waiting.add(id_)
                yield number, value

        skipped: list[Skipped] = []
        total = len(inputs) if isinstance(inputs, Sequence) else None
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar, "total": total}
        for batch in stream(model, numbered(), task="document", **options):
            skipped += batch.skipped
            numbers = [*batch.indices, *(row.index for row in batch.skipped if row.index is not None)]
            done = {number: records.pop(number) for number in numbers}
            waiting -= {id_ for id_, _ in done.values()}
            if batch.indices:
                names, about = zip(*(done[number] for number in batch.indices), strict=True)
                self._add(self._normalised(batch.embeddings.cpu().numpy()), names, about)
        return sorted(skipped, key=lambda row: row.index or 0)

    def add_embeddings(
        self, embeddings: NDArray[Any], ids: Iterable[Any], metadata: Iterable[Metadata] | None = None
    ) -> None:
        """Add embeddings from elsewhere.

        Args:
            embeddings: ``(n, dimension)``; normalised here.
            ids: One each.
            metadata: One each, as JSON can hold it.

        Raises:
            ValueError: If a shape, an id or metadata does not fit; then nothing is added.
        """
        rows, names = self._normalised(embeddings), [str(id_) for id_ in ids]
        about = ["{}" for _ in names] if metadata is None else [as_json(row) for row in metadata]
        if not len(rows) == len(names) == len(about):
            raise ValueError(f"There are {len(rows)} embeddings, but {len(names)} ids and {len(about)} metadata.")
        if self.model is not None:
            self._checked_model()
        self._add(rows, names, about)

    def _add(self, rows: NDArray[np.float32], names: Sequence[str], about: Sequence[str]) -> None:
        with self._lock:
            self._refuse_known(names)
            self._read_whole()
            first = self._index.ntotal
            self._index.add(rows)
            self._records.add(first, names, about)
            self._on_gpu = None
            if self.model is not None and self._made_by is None:
                self._made_by = encoder_digest(self.model)
            if len(self._records) >= TRAINING_EMBEDDINGS:
                self._build()

    def _refuse_known(self, names: Sequence[str]) -> None:
        "".join(names).encode()  # raises for what the database cannot hold
        if (different := len(set(names))) < len(names):
            raise ValueError(f"{len(names)} ids were given, but only {different} differ. Each needs one of its own.")
        with self._lock:
            if known := list(self._records.rows_of(names)):
                raise ValueError(f"Ids are in the index already: {known[:5]}. Delete them first, or choose others.")

    def delete(self, ids: Iterable[Any]) -> int:
        """Delete by id; returns how many were there. :meth:`compact` removes their bytes too.

        Raises:
            ValueError: If the files that are mapped were replaced.
        """
        with self._lock:
            rows = self._records.rows_of({str(id_) for id_ in ([ids] if isinstance(ids, str) else ids)})
            if rows:
                self._refuse_replaced()
                self._records.remove(rows.values())
                self._on_gpu = None
                if self._index.ntotal - len(self._records) > _MOST_DELETED * self._index.ntotal:
                    self.compact()
            return len(rows)

    def compact(self) -> None:
        """Rebuild from what was not deleted: nothing of the rest is left here, nor in the next save."""
        faiss = import_faiss()
        with self._lock:
            if len(self._records) < self._index.ntotal:
                self._read_whole()
                after = faiss.clone_index(self._index)
                after.reset()  # keeps what it has learned
                self._move_to(after)

    def _build(self) -> None:
        """Make the type that was asked for, if there is enough to learn from, and more than at the last attempt."""
        if self._built or len(self._records) <= self._tried:
            return
        self._tried = len(self._records)
        wanted = make_faiss_index(self.factory, self.dimension)
        if len(self._records) < least_to_learn_from(wanted):
            return
        self._read_whole()
        try:
            wanted.train(rows_of(self._index, np.array(self._records.rows(), np.int64)))
        except RuntimeError as error:  # too few
            logger.info("%r is kept exactly for now: %s", self.factory, error)
            return
        self._move_to(wanted)
        self._built = True
        self._set_parameters()

    def _move_to(self, after: Any) -> None:
        rows = np.array(self._records.rows(), np.int64)
        for start in range(0, len(rows), _CHUNK):
            after.add(rows_of(self._index, rows[start : start + _CHUNK]))
        self._records.renumber()
        self._index, self._on_gpu = after, None

    def search(self, queries: Any, k: int = 10, *, prompt: str | None = None, batch_size: int = 32) -> Any:
        """Find what is nearest to texts, images, or both together.

        Args:
            queries: One query or a list: a str, a PIL image or ``pathlib.Path``, or ``{"image": ..., "text": ...}``.
            k: How many hits each; fewer where the index holds fewer, or looks into too few clusters.
            prompt: A system message; by default the model's ``"query"`` prompt.
            batch_size: Queries a batch.

        Returns:
            A list of :class:`Hit`, best first; for a list of queries, a list of those.

        Raises:
            UnreadableInputsError: If a query cannot be read.
            ValueError: If ``k`` is below 1, or the model is not the one that the index was made with.
        """
        model = self._checked_model()
        single = isinstance(queries, ONE_INPUT)
        inputs = [queries] if single else list(queries)
        hits = self.search_embeddings(embed(model, inputs, task="query", prompt=prompt, batch_size=batch_size), k)
        return hits[0] if single else hits

    def search_embeddings(self, queries: NDArray[Any], k: int = 10) -> list[list[Hit]]:
        """Find what is nearest to embeddings ``(n, dimension)``, which are normalised here; as :meth:`search`."""
        rows, k = self._normalised(queries), operator.index(k)
        if k < 1:
            raise ValueError(f"k is {k}, but at least 1 is needed.")
        with self._lock:
            self._build()
            k = min(k, len(self._records))
            if not k or not len(rows):
                return [[] for _ in rows]
            index, total = self._searchable(k), self._index.ntotal
            deleted = total - len(self._records)
            asked = min(2 * k if deleted else k, total)
            while True:
                scores, places = index.search(rows, asked)
                about = self._records.get({int(place) for place in places.ravel() if place >= 0})
                hits = [
                    [Hit(about[p][0], float(s), about[p][1]) for s, p in zip(line, found, strict=True) if p in about][
                        :k
                    ]
                    for line, found in zip(scores, places.tolist(), strict=True)
                ]
                # Deleted rows are found too: ask for more, unless there is no more to be found.
                if asked == total or all(len(h) == k or -1 in p for h, p in zip(hits, places, strict=True)):
                    return hits
                asked = min(4 * asked, total)

    def save(self, folder: str | Path) -> None:
        """Save to a folder; killed in the middle, what was saved there before is still whole.

        Raises:
            ValueError: If the folder has been saved to from elsewhere since this index was loaded from it or saved
                there: that would be undone.
        """
        with self._lock:
            self._build()
            about = {
                "factory": self.factory,
                "built": self._built,
                "search_parameters": self.search_parameters,
                "dimension": self.dimension,
                "model": self._made_by,
                "model_name": self._model_name,
            }
            folder = Path(folder).resolve()
            files = write_folder(folder, self._index, self._records, about, self._saved.get(folder))
            self._saved[folder] = files
            if self._mapped is not None:
                self._map(files)  # what was mapped may have been replaced

    @classmethod
    def load(
        cls, folder: str | Path, model: SLQEncoder | None = None, *, mmap: bool = True, gpu: bool | None = None
    ) -> EmbeddingIndex:
        """Load a saved index.

        Args:
            folder: Where it was saved.
            model: The encoder that it was made with; without one, only embeddings can be added and searched.
            mmap: Whether to map the embeddings instead of reading them. The first addition reads them whole.
            gpu: As for the class.

        Raises:
            ValueError: If there is no index, or it is of another model or dimension. The same model saved in another
                form, or loaded in float16, counts as another.
        """
        folder = Path(folder).resolve()
        while True:
            files, about = read_about(folder)
            given = {"search_parameters": about["search_parameters"], "dimension": about["dimension"], "gpu": gpu}
            index = cls(model, about["factory"], **given)
            if index.dimension != about["dimension"]:
                raise ValueError(
                    f"The index in {folder} has dimension {about['dimension']}, but this model's embeddings have "
                    f"{index.dimension}. Load the model that it was made with, or set its truncate_dim."
                )
            index._built, index._made_by, index._model_name = about["built"], about["model"], about["model_name"]
            index._saved[folder] = files
            try:
                index._records = IndexRecords(records_file(files))
                index._map(files)
                if not mmap:
                    index._read_whole()
            except (OSError, RuntimeError, sqlite3.Error):
                if read_about(folder)[0] == files:
                    raise
                continue  # another process has saved it just now
            if model is not None:
                index._checked_model()
            return index

    def _checked_model(self) -> SLQEncoder:
        if self.model is None:
            raise ValueError("This index has no model: give EmbeddingIndex one, or use the methods for embeddings.")
        with self._lock:
            if not len(self):
                self._made_by, self._model_name = (
                    None,
                    f"{len(self.model.queries)} queries on {self.model.slq_config.backbone}",
                )
            elif self._made_by not in (None, encoder_digest(self.model)):
                raise ValueError(
                    f"The index was made with another model ({self._model_name}), whose embeddings cannot be compared "
                    "with this one's. Load that model, or build the index anew."
                )
        return self.model

    def _normalised(self, embeddings: NDArray[Any]) -> NDArray[np.float32]:
        rows = np.array(embeddings, np.float32, ndmin=2)
        if not rows.size:
            return np.zeros((0, self.dimension), np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.dimension or not np.isfinite(rows).all():
            raise ValueError(
                f"Embeddings have shape {rows.shape}, but finite numbers of shape (n, {self.dimension}) are needed."
            )
        rows /= np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
        return rows

    def _map(self, files: Path) -> None:
        faiss = import_faiss()
        self._index = faiss.read_index(str(embeddings_file(files)), faiss.IO_FLAG_MMAP_IFC)
        self._mapped = files
        self._set_parameters()

    def _read_whole(self) -> None:
        self._refuse_replaced()
        if self._mapped is not None:
            self._index, self._mapped = import_faiss().read_index(str(embeddings_file(self._mapped))), None
            self._set_parameters()

    def _refuse_replaced(self) -> None:
        if self._mapped is not None and not self._mapped.is_dir():
            raise ValueError(f"{self._mapped.parent} was saved anew from elsewhere: load it again to change it.")

    def _set_parameters(self) -> None:
        if self._built:
            set_parameters(self._index, self.search_parameters, self.factory)

    def _searchable(self, k: int) -> Any:
        """The index itself, or its copy on a GPU."""
        if self.gpu is False or not has_gpu() or k > MOST_ON_GPU:
            return self._index
        if self._on_gpu is None:
            self.compact()  # so that none of those few is a deleted one
            try:
                parameters = self.search_parameters if self._built else ""
                self._on_gpu = copy_to_gpu(self._index, parameters, self.factory)
            except RuntimeError:  # this type has no GPU form
                if self.gpu:
                    raise
                self.gpu = False
                return self._index
        return self._on_gpu[0]

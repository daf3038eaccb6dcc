"""A search index of images and texts: FAISS for the embeddings, ids and metadata beside them."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.autonotebook import tqdm

from slq_embed.encoder import SLQEncoder
from slq_embed.fingerprint import encoder_digest
from slq_embed.index_faiss import MOST_ON_GPU, copy_to_gpu, has_gpu, import_faiss, make_faiss_index, set_parameters
from slq_embed.index_folder import embeddings_file, read_about, records_file, write_folder
from slq_embed.index_inputs import Metadata, as_json, described, image_files, own_name
from slq_embed.index_records import IndexRecords
from slq_embed.inputs import Skipped
from slq_embed.serving import embed, lock_of

logger = logging.getLogger(__name__)

TRAINING_EMBEDDINGS = 200_000
"""Index types that learn from data (IVF, quantizers) wait for so many, or for the first search."""
_MOST_DELETED = 0.2
_CHUNK = 65_536

__all__ = ["EmbeddingIndex", "Hit", "image_files"]


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
    form, else on the CPU.

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
        self._index = make_faiss_index(factory, self.dimension)
        self._set_parameters()  # refuses those that do not fit
        self._records = IndexRecords()
        self._waiting: list[tuple[NDArray[np.float32], list[str], list[str]]] = []
        self._waiting_ids: set[str] = set()
        self._on_gpu: tuple[Any, Any] | None = None
        self._files: Path | None = None  # that are mapped
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._records) + len(self._waiting_ids)

    def __repr__(self) -> str:
        return f"EmbeddingIndex({self.factory!r}: {len(self)} of dimension {self.dimension})"

    def __contains__(self, id_: str) -> bool:
        with self._lock:
            return id_ in self._waiting_ids or bool(self._records.rows_of([id_]))

    def ids(self) -> list[str]:
        """All ids, in the order in which they were added."""
        with self._lock:
            return [*self._records.ids(), *(id_ for _, ids, _ in self._waiting for id_ in ids)]

    def metadata(self, id_: str) -> dict[str, Any]:
        """What was stored with an id.

        Raises:
            KeyError: If there is no such id.
        """
        with self._lock:
            if id_ in self._waiting_ids:
                return next(json.loads(about[ids.index(id_)]) for _, ids, about in self._waiting if id_ in ids)
            for _, about in self._records.get(self._records.rows_of([id_]).values()).values():
                return about
            raise KeyError(f"There is no id {id_!r} in the index.")

    def add(
        self,
        inputs: Iterable[Any],
        ids: Sequence[str] | None = None,
        metadata: Sequence[Metadata] | None = None,
        *,
        batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> list[Skipped]:
        """Embed inputs and add them.

        Args:
            inputs: Images (PIL, ``pathlib.Path``), texts, or dicts of both, any number; read as they are needed.
            ids: One each; by default a path's own name, and for anything else a random one.
            metadata: One each, as JSON can hold it; by default the path or the text.
            batch_size: Inputs a batch.
            show_progress_bar: Whether to show one.

        Returns:
            Inputs that could not be read, and were left out.

        Raises:
            ValueError: If an id is there already, or ids or metadata are too few. What was added before it stays.
        """
        model = self._require_model()
        told: dict[int, tuple[str, Metadata]] = {}

        def watched() -> Iterator[Any]:
            for place, value in enumerate(inputs):
                if any(given is not None and place >= len(given) for given in (ids, metadata)):
                    raise ValueError(f"There are more inputs than ids or metadata: input {place} has none.")
                id_ = own_name(value) if ids is None else str(ids[place])
                if id_ in self:
                    raise ValueError(f"The id {id_!r} is in the index already. Delete it first, or choose another.")
                told[place] = (id_, described(value) if metadata is None else metadata[place])
                yield value

        skipped: list[Skipped] = []
        results = model.encode_stream(watched(), batch_size=batch_size, prompt=model.prompts.get("document") or None)
        total = len(inputs) if isinstance(inputs, Sequence) else None
        with tqdm(total=total, disable=not show_progress_bar) as bar:
            while True:
                with lock_of(model):
                    result = next(results, None)
                if result is None:
                    break
                if result.places:
                    named = [told.pop(place) for place in result.places]
                    found = result.embeddings[""].float().cpu().numpy()
                    self.add_embeddings(found, [id_ for id_, _ in named], [about for _, about in named])
                skipped += result.skipped
                bar.update(len(result.places) + len(result.skipped))
        return sorted(skipped, key=lambda row: row.place or 0)

    def add_embeddings(
        self, embeddings: NDArray[Any], ids: Sequence[str], metadata: Sequence[Metadata] | None = None
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
        "".join(names).encode()  # raises for what the database cannot hold
        fresh = set(names)
        if len(fresh) < len(names):
            raise ValueError(f"{len(names)} ids were given, but only {len(fresh)} differ. Each needs one of its own.")
        with self._lock:
            if known := [*self._records.rows_of(fresh), *(fresh & self._waiting_ids)]:
                raise ValueError(f"Ids are in the index already: {known[:5]}. Delete them first, or choose others.")
            self._waiting.append((rows, names, about))
            self._waiting_ids |= fresh
            if self._index.is_trained or len(self._waiting_ids) >= TRAINING_EMBEDDINGS:
                self._settle()

    def delete(self, ids: Iterable[str]) -> int:
        """Delete by id; returns how many were there. :meth:`compact` removes their bytes too."""
        with self._lock:
            self._settle()
            rows = self._records.rows_of(set(ids))
            self._records.remove(rows.values())
            self._on_gpu = None
            if self._index.ntotal - len(self._records) > _MOST_DELETED * self._index.ntotal:
                self.compact()
            return len(rows)

    def compact(self) -> None:
        """Rebuild from what was not deleted: nothing of the rest is left here, nor in the next save."""
        faiss = import_faiss()
        with self._lock:
            self._settle()
            rows = np.array(self._records.rows(), np.int64)
            if len(rows) == self._index.ntotal:
                return
            self._read_whole()
            if isinstance(clusters := faiss.downcast_index(self._index), faiss.IndexIVF):
                clusters.make_direct_map()  # to find a row's cluster
            after = faiss.clone_index(self._index)
            after.reset()  # keeps what it has learned
            for start in range(0, len(rows), _CHUNK):
                after.add(self._index.reconstruct_batch(rows[start : start + _CHUNK]))
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
        """
        model = self._require_model()
        single = model.is_singular_input(queries)
        told = (model.prompts.get("query") or None) if prompt is None else prompt
        found = embed(model, [queries] if single else list(queries), prompt=told, batch_size=batch_size)
        hits = self.search_embeddings(found, k)
        return hits[0] if single else hits

    def search_embeddings(self, queries: NDArray[Any], k: int = 10) -> list[list[Hit]]:
        """Find what is nearest to embeddings ``(n, dimension)``, which are normalised here; as :meth:`search`."""
        rows = self._normalised(queries)
        if k < 1:
            raise ValueError(f"k is {k}, but at least 1 is needed.")
        with self._lock:
            self._settle()
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
        """Save to a folder; killed in the middle, what was saved there before is still whole."""
        with self._lock:
            self._settle()
            about = {
                "factory": self.factory,
                "search_parameters": self.search_parameters,
                "dimension": self.dimension,
                "model": None if self.model is None else encoder_digest(self.model),
                "model_name": None
                if self.model is None
                else f"{self.model.num_queries} queries on {self.model.slq.backbone}",
            }
            files = write_folder(Path(folder), self._index, self._records, about)
            if self._files is not None and not self._files.is_dir():
                self._map(files)  # what was mapped has been replaced

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
            ValueError: If there is no index, or it is of another model or dimension.
        """
        files, about = read_about(Path(folder))
        if model is not None:
            if (found := model.get_embedding_dimension()) != about["dimension"]:
                raise ValueError(
                    f"The index in {folder} has dimension {about['dimension']}, but this model's embeddings have "
                    f"{found}. Load the model that it was made with, or set its truncate_dim."
                )
            if about["model"] not in (None, encoder_digest(model)):
                raise ValueError(
                    f"The index in {folder} was made with another model ({about['model_name']}), whose embeddings "
                    "cannot be compared with this one's. Load that model, or build the index anew."
                )
        given = {"search_parameters": about["search_parameters"], "dimension": about["dimension"], "gpu": gpu}
        index = cls(model, about["factory"], **given)
        index._records = IndexRecords(records_file(files))
        index._map(files)
        if not mmap:
            index._read_whole()
        return index

    def _require_model(self) -> SLQEncoder:
        if self.model is None:
            raise ValueError("This index has no model: give EmbeddingIndex one, or use the methods for embeddings.")
        return self.model

    def _normalised(self, embeddings: NDArray[Any]) -> NDArray[np.float32]:
        rows = np.array(embeddings, np.float32, ndmin=2)
        if rows.ndim != 2 or rows.shape[1] != self.dimension or not np.isfinite(rows).all():
            raise ValueError(
                f"Embeddings have shape {rows.shape}, but finite numbers of shape (n, {self.dimension}) are needed."
            )
        rows /= np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
        return rows

    def _settle(self) -> None:
        """Give FAISS what waits; it learns from that first, if it has to."""
        if not self._waiting:
            return
        self._read_whole()
        self._on_gpu = None
        if not self._index.is_trained:
            self._train(np.concatenate([rows for rows, _, _ in self._waiting]))
        while self._waiting:
            rows, ids, about = self._waiting.pop(0)
            first = self._index.ntotal
            self._index.add(rows)
            self._records.add(first, ids, about)
            self._waiting_ids.difference_update(ids)

    def _train(self, rows: NDArray[np.float32]) -> None:
        try:
            self._index.train(rows)
        except RuntimeError as error:  # too few; what took hours to embed must not be lost for that
            logger.warning(
                "%r cannot learn from %d embeddings, so they are kept as 'Flat', which is exact: %s",
                self.factory,
                len(rows),
                error,
            )
            self.factory, self.search_parameters = "Flat", ""
            self._index = make_faiss_index("Flat", self.dimension)

    def _map(self, files: Path) -> None:
        faiss = import_faiss()
        self._index = faiss.read_index(str(embeddings_file(files)), faiss.IO_FLAG_MMAP_IFC)
        self._files = files
        self._set_parameters()

    def _read_whole(self) -> None:
        if self._files is not None:
            if not self._files.is_dir():
                raise ValueError(f"{self._files.parent} was saved anew from elsewhere: load it again to change it.")
            self._index, self._files = import_faiss().read_index(str(embeddings_file(self._files))), None
            self._set_parameters()

    def _set_parameters(self) -> None:
        set_parameters(self._index, self.search_parameters, self.factory)

    def _searchable(self, k: int) -> Any:
        """The index itself, or its copy on a GPU."""
        if self.gpu is False or not has_gpu():
            if self.gpu:
                raise ValueError("gpu=True needs faiss-gpu and a GPU: pip install 'slq-embed[faiss-gpu]'.")
            return self._index
        if k > MOST_ON_GPU:
            return self._index
        if self._on_gpu is None:
            self.compact()  # so that none of those few is a deleted one
            try:
                self._on_gpu = copy_to_gpu(self._index, self.search_parameters, self.factory)
            except RuntimeError:  # this type has no GPU form
                if self.gpu:
                    raise
                self.gpu = False
                return self._index
        return self._on_gpu[0]

"""A search index of images and texts: FAISS for the embeddings, a small database for ids and metadata."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from slq_embed.encoder import SLQEncoder
from slq_embed.encoding.stream import stream
from slq_embed.index.faiss_index import FaissIndex
from slq_embed.index.filters import condition_of
from slq_embed.index.folder import read_folder, write_folder
from slq_embed.index.identity import ModelIdentity, dimension_of
from slq_embed.index.inputs import Metadata, WaitingInputs, as_json, id_list, one_each, with_ids_and_metadata
from slq_embed.index.records import IndexRecords
from slq_embed.index.table import Hit, IndexTable
from slq_embed.inputs.rows import Skipped, is_one_input, require_list
from slq_embed.serving import embed


class EmbeddingIndex:
    """Embeddings of images, texts and both, searched by any of them.

    Threads may share it. It is searched on a GPU where faiss-gpu and a GPU are there and the index type has a GPU
    form, else on the CPU. Types that learn from embeddings (clusters, quantizers) are exact at first. They learn at the
    first search or save with enough embeddings (10,000, and 39 for each cluster), or when 200,000 are added.

    Args:
        model: The encoder. Without one, the index takes embeddings only (:meth:`add_embeddings`).
        factory: FAISS's name of the index type: ``"Flat"`` is exact; ``"IVF4096,Flat"`` (clusters) and
            ``"HNSW32,Flat"`` (a graph) are faster for many embeddings; ``"SQ8"``, ``"SQ4"`` or ``"IVF4096,SQ8"`` keep
            fewer bytes, and with ``",RFlat"`` behind them score their best hits again by the exact embeddings.
        search_parameters: FAISS's search-time settings: ``"nprobe=32"`` (IVF), ``"efSearch=64"`` (HNSW),
            ``"k_factor_rf=4"`` (how many times as many hits are scored again), joined by commas.
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
        self.model, self.factory, self.dimension = model, factory, dimension_of(model, dimension)
        self._table = IndexTable(FaissIndex(factory, self.dimension, search_parameters, gpu), IndexRecords())
        self._identity = ModelIdentity()
        self._saved: dict[Path, Path] = {}  # by folder: the save that was read or written last
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        state = ", exact for now" if self._table.vectors.exact_for_now else ""
        return f"EmbeddingIndex({self.factory!r}{state}: {len(self)} of dimension {self.dimension})"

    def __contains__(self, id_: Any) -> bool:
        with self._lock:
            return bool(self._table.records.rows_of([str(id_)]))

    @property
    def search_parameters(self) -> str:
        """FAISS's search-time settings; set them to search in another way from then on."""
        return self._table.vectors.search_parameters

    @search_parameters.setter
    def search_parameters(self, search_parameters: str) -> None:
        with self._lock:
            self._table.vectors.search_parameters = search_parameters

    def ids(self) -> list[str]:
        """All ids, in the order of their rows; :meth:`add` adds inputs of like size together."""
        with self._lock:
            return self._table.records.ids()

    def metadata(self, id_: Any) -> dict[str, Any]:
        """What was stored with an id.

        Raises:
            KeyError: If the index has no such id.
        """
        with self._lock:
            return self._table.records.metadata(str(id_))

    def add(
        self,
        inputs: Any,
        ids: Iterable[Any] | None = None,
        metadata: Iterable[Metadata] | Metadata | None = None,
        *,
        replace: bool = False,
        batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> list[Skipped]:
        """Embed inputs and add them. Others may search meanwhile.

        Args:
            inputs: Images (PIL, ``pathlib.Path``), texts, or dicts of both: one or any number; read up to 32 batches ahead.
            ids: One for each input. By default a path's id is its name, and any other input gets a random id.
            metadata: One dict for each input, of what JSON can hold; by default the path or the text.
            replace: Whether inputs take the place of those with the same ids, as after a :meth:`delete`. If one cannot be read, what
                the index has stays.
            batch_size: Inputs a batch. A batch that does not fit into memory is halved.
            show_progress_bar: Whether to show one.

        Returns:
            Inputs that could not be read, and were left out.

        Raises:
            ValueError: If an id comes twice, or is in the index already without ``replace``; if inputs, ids and metadata are not
                equally many, or the model or its document prompt is not that of the index. What was added before stays.
        """
        model = self._checked_model()
        with self._lock:
            if len(self):
                self._identity.require_document_prompt(model)
        entries = with_ids_and_metadata(inputs, ids, metadata)
        waiting = WaitingInputs(entries, lambda id_: self._check_id(id_, new=not replace), remember=replace)
        total = len(inputs) if isinstance(inputs, Sequence) else None
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar, "total": total}
        skipped: list[Skipped] = []
        for batch in stream(model, waiting, task="document", **options):
            skipped += batch.skipped
            waiting.take(row.index for row in batch.skipped if row.index is not None)
            if batch.indices:
                names, about = zip(*waiting.take(batch.indices), strict=True)
                self._add(self._table.vectors.normalised(batch.embeddings.cpu().numpy()), names, about, replace)
        return sorted(skipped, key=lambda row: row.index or 0)

    def _check_id(self, id_: str, new: bool) -> None:
        with self._lock:
            self._table.records.check([id_], new)

    def add_embeddings(
        self,
        embeddings: NDArray[Any] | Tensor,
        ids: Iterable[Any],
        metadata: Iterable[Metadata] | None = None,
        *,
        replace: bool = False,
    ) -> None:
        """Add embeddings that were computed elsewhere.

        Args:
            embeddings: ``(n, dimension)``, an array or a tensor; normalised here, in float32.
            ids: One for each embedding.
            metadata: One dict for each embedding, of what JSON can hold.
            replace: Whether they take the place of embeddings with the same ids.

        Raises:
            ValueError: If a shape, an id or metadata does not fit. Then nothing is added.
        """
        one_each(ids, metadata)
        rows, names = self._table.vectors.normalised(embeddings), list(id_list(ids))
        about = ["{}" for _ in names] if metadata is None else [as_json(entry) for entry in metadata]
        if not len(rows) == len(names) == len(about):
            raise ValueError(
                f"There are {len(rows)} embeddings, but {len(names)} ids and {len(about)} metadata. "
                "Pass one of each for each embedding."
            )
        if self.model is not None:
            self._checked_model()
        self._add(rows, names, about, replace)

    def _add(self, embeddings: NDArray[Any], ids: Sequence[str], metadata: Sequence[str], replace: bool) -> None:
        with self._lock:
            empty = not len(self)
            self._table.add(embeddings, ids, metadata, replace)
            if empty or self._identity.digest is None:
                self._identity = ModelIdentity.of(self.model)

    def delete(self, ids: Any = None, *, where: Mapping[str, Any] | None = None) -> int:
        """Delete embeddings, by id or by what is in their metadata. :meth:`compact` removes their bytes too.

        Args:
            ids: Any number of ids, or one.
            where: In their place, a filter as for :meth:`search`.

        Returns:
            How many were deleted.

        Raises:
            ValueError: If there are both or neither, the filter compares nothing or cannot be read, or the index was loaded, and another
                process has saved it anew since.
        """
        says_nothing = where is not None and not condition_of(where)[1]  # such as {}, which all would fit
        if says_nothing or (ids is None) == (where is None):
            raise ValueError("Pass ids, or where=..., to say what to delete; to delete all, index.delete(index.ids()).")
        with self._lock:
            return self._table.delete(id_list(ids) if where is None else self._table.records.ids(where))

    def compact(self) -> None:
        """Remove the bytes of what was deleted or replaced: here at once, in a folder with the next save."""
        with self._lock:
            self._table.compact()

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        where: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
    ) -> Any:
        """Find the nearest embeddings to texts, images, or both together.

        Args:
            queries: One query or a list: a str, a PIL image or ``pathlib.Path``, or ``{"image": ..., "text": ...}``.
            k: Hits for each query; fewer if the index holds fewer, or looks into too few clusters.
            where: Only embeddings whose metadata fit, such as ``{"split": "train", "year": {"$gte": 2020}}``. All conditions
                must hold. Operators: ``$eq``, ``$ne``, ``$gt``, ``$gte``, ``$lt``, ``$lte``, ``$in``, ``$nin``, ``$contains`` (a
                list holds the value), and ``$and`` and ``$or`` over such dicts.
            prompt: A system message; by default the model's ``"query"`` prompt.
            batch_size: Queries a batch.

        Returns:
            A list of :class:`Hit`, best first; for a list of queries, a list of such lists.

        Raises:
            UnreadableInputsError: If a query cannot be read.
            ValueError: If ``k`` is below 1, the filter cannot be read, the model is not the one of the index, or the queries are
                embeddings or no list.
        """
        model = self._checked_model()
        if where is not None:
            condition_of(where)  # before the queries are embedded
        if "float" in str(getattr(queries, "dtype", "")):
            raise ValueError(
                f"queries is an array in {queries.dtype}, but texts or images are needed. For embeddings, use search_embeddings."
            )
        if not (single := is_one_input(queries)):
            require_list(queries, "queries")
        inputs = [queries] if single else list(queries)
        vectors = embed(model, inputs, task="query", prompt=prompt, batch_size=batch_size)
        hits = self.search_embeddings(vectors, k, where=where)
        return hits[0] if single else hits

    def search_embeddings(
        self, queries: NDArray[Any] | Tensor, k: int = 10, *, where: Mapping[str, Any] | None = None
    ) -> list[list[Hit]]:
        """Find the nearest embeddings to embeddings.

        Args:
            queries: ``(n, dimension)``, an array or a tensor; normalised here, in float32.
            k: As for :meth:`search`.
            where: As for :meth:`search`.

        Returns:
            A list of hits for each query, best first.

        Raises:
            ValueError: If ``k`` is below 1, the shape does not fit, or the filter cannot be read.
        """
        vectors, k = self._table.vectors.normalised(queries), operator.index(k)
        if k < 1:
            raise ValueError(f"k is {k}, but at least 1 is needed.")
        with self._lock:
            return self._table.search(vectors, k, where)

    def save(self, folder: str | Path) -> None:
        """Save to a folder, in place of an index that is there. If the process is killed in the middle, that one is still whole.

        Raises:
            ValueError: If another process saved to the folder since this index was loaded from it or saved there: this
                save would undo that one.
        """
        folder = Path(folder).resolve()
        with self._lock:
            self._table.learn()
            about = {**self._table.settings(), "model": self._identity.digest, "model_name": self._identity.name}
            about["document_prompt"] = self._identity.document_prompt
            files = self._saved[folder] = write_folder(folder, self._table, about, self._saved.get(folder))
            self._table.moved(files)

    @classmethod
    def load(
        cls, folder: str | Path, model: SLQEncoder | None = None, *, mmap: bool = True, gpu: bool | None = None
    ) -> EmbeddingIndex:
        """Load a saved index.

        Args:
            folder: Where it was saved.
            model: The encoder of the index; without one, only embeddings can be added and searched.
            mmap: Whether to map the embeddings instead of reading them. The first addition reads them whole.
            gpu: As for the class.

        Raises:
            ValueError: If there is no index, a file is damaged, or the index is of another model or dimension.
        """
        folder = Path(folder).resolve()
        files, about, table = read_folder(folder, gpu=gpu, mmap=mmap)
        index = cls(model, about["factory"], dimension=about["dimension"])
        index._table, index._saved = table, {folder: files}
        index._identity = ModelIdentity(about["model"], about["model_name"], about.get("document_prompt"))
        if model is not None:
            index._checked_model()
        return index

    def _checked_model(self) -> SLQEncoder:
        with self._lock:
            identity = self._identity if len(self) else ModelIdentity()  # an empty index takes any model
            return identity.require(self.model)

"""What goes into the index: inputs, each with an id and metadata."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from slq_embed.index.filters import plain
from slq_embed.inputs.images import IMAGE_SUFFIXES, shortened
from slq_embed.inputs.pdf import PdfPage
from slq_embed.inputs.rows import is_one_input, require_list

Metadata = Mapping[str, Any]

_MISSING = object()


def image_files(folder: str | Path) -> list[Path]:
    """All image files below a folder, in order; for :meth:`EmbeddingIndex.add`.

    Raises:
        ValueError: If there is no such folder.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}. Check the path.")
    return sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())


def default_id(value: Any) -> str:
    """The id of an input without one: for a path its name, for a page ``file.pdf#page=3``, for others a random id."""
    # A file's name is bytes, and need not be Unicode.
    named = isinstance(value, Path | PdfPage)
    return str(value).encode("utf8", "backslashreplace").decode() if named else uuid.uuid4().hex


def id_list(ids: Any) -> Iterable[str]:
    """Ids as they are stored: of one id, or of any number of them."""
    if isinstance(ids, Tensor):
        ids = ids.tolist()  # else an id would be "tensor(5)"
    return map(str, ids if isinstance(ids, Iterable) and not isinstance(ids, str) else [ids])


def as_json(metadata: Metadata) -> str:
    """Metadata in the form in which it is stored.

    Raises:
        ValueError: If it is no mapping, or JSON cannot hold it.
    """
    if not isinstance(metadata, Mapping):
        raise ValueError(f"Metadata of one input is a {type(metadata).__name__}, but a dict is needed.")
    try:
        return json.dumps(dict(metadata), allow_nan=False, default=_number)  # the database reads no NaN
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Metadata {shortened(repr(dict(metadata)))} cannot be stored: {error}. Use str, finite numbers, bool, None, lists and dicts."
        ) from error


def _number(value: Any) -> Any:
    if (number := plain(value)) is value:
        raise TypeError(f"{type(value).__name__} is not JSON serializable")
    return number


def one_each(ids: Iterable[Any] | None, metadata: Iterable[Metadata] | Metadata | None) -> None:
    """Check that ids and metadata come as lists, for inputs that come as a list.

    Raises:
        ValueError: If there is a single one: its characters or keys would be taken for a list.
    """
    if isinstance(ids, str):
        raise ValueError(f"ids is the str {ids!r}, but the inputs are a list. Pass a list of ids, one for each input.")
    if isinstance(metadata, Mapping):
        raise ValueError("metadata is one dict, but the inputs are a list. Pass a list of dicts, one for each input.")


def with_ids_and_metadata(
    inputs: Any, ids: Iterable[Any] | None, metadata: Iterable[Metadata] | Metadata | None
) -> Iterator[tuple[Any, str, str]]:
    """Join inputs with their ids and metadata.

    Args:
        inputs: One input, or any number of them.
        ids: One for each input; for one input, an id or a list of one. By default :func:`default_id`.
        metadata: As ``ids``. By default :func:`default_metadata`.

    Yields:
        An input, its id, and its metadata in the form in which it is stored.

    Raises:
        ValueError: If there are more of one than of another, or metadata cannot be stored.
    """
    if is_one_input(inputs):
        inputs, ids = [inputs], None if ids is None else list(id_list(ids))
        metadata = [metadata] if isinstance(metadata, Mapping) else metadata
    require_list(inputs)
    one_each(ids, metadata)
    columns = [inputs, *([] if ids is None else [id_list(ids)]), *([] if metadata is None else [metadata])]
    for index, row in enumerate(zip_longest(*columns, fillvalue=_MISSING)):
        if any(value is _MISSING for value in row):
            raise ValueError(
                f"Inputs, ids and metadata are not equally many: one of them ends at index {index}. Pass one id and "
                "one dict for each input."
            )
        value, *rest = row
        id_ = default_id(value) if ids is None else rest[0]
        yield value, id_, as_json(default_metadata(value) if metadata is None else rest[-1])


class WaitingInputs:
    """Inputs with their numbers, for an encoder. Ids and metadata wait here for the embeddings.

    Args:
        entries: From :func:`with_ids_and_metadata`.
        check: Raises an error if the index cannot take an id: it is asked before the input is embedded.
        remember: Whether an id may not come twice even if the index has it: else the second input would replace the first.
    """

    def __init__(
        self, entries: Iterable[tuple[Any, str, str]], check: Callable[[str], None], remember: bool = False
    ) -> None:
        self._entries, self._check, self._remember = entries, check, remember
        self._records: dict[int, tuple[str, str]] = {}
        self._ids: set[str] = set()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, (value, id_, metadata) in enumerate(self._entries):
            if id_ in self._ids:
                raise ValueError(f"The id {id_!r} was given twice. Each input needs an id of its own.")
            self._check(id_)
            self._records[number] = id_, metadata
            self._ids.add(id_)
            yield number, value

    def take(self, numbers: Iterable[int]) -> list[tuple[str, str]]:
        """Remove entries by the numbers of their inputs; returns their ids and metadata."""
        records = [self._records.pop(number) for number in numbers]
        if not self._remember:
            self._ids -= {id_ for id_, _ in records}
        return records


def default_metadata(value: Any) -> dict[str, Any]:
    """The metadata of an input without any: its path, page and text."""
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, PdfPage):
        return {"path": str(value.path), "page": value.number}
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, Mapping):
        return {key: str(part) for key, part in value.items() if isinstance(part, str | Path)}
    return {}

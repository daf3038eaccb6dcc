"""Ids and metadata of an index's rows, in a small database."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq_embed.index.filters import condition_of

_SCHEMA = "CREATE TABLE records (row INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, metadata TEXT NOT NULL)"
_AT_ONCE = 500  # values of one statement


class IndexRecords:
    """Ids and metadata by row number. A row without a record was deleted.

    Args:
        path: A saved file. It is read where it lies, and copied into memory before the first change. Without one, the
            database is empty and in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            self._database = sqlite3.connect(":memory:", check_same_thread=False)
            self._database.execute(_SCHEMA)
        else:
            self._database = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
            )
        self._frozen = path is not None
        self._count: int = self._database.execute("SELECT COUNT(*) FROM records").fetchone()[0]

    def __len__(self) -> int:
        return self._count

    def _writable(self) -> sqlite3.Connection:
        if self._frozen:
            copy = sqlite3.connect(":memory:", check_same_thread=False)
            self._database.backup(copy)
            self._database.close()
            self._database, self._frozen = copy, False
        return self._database

    def add(self, first: int, ids: Sequence[str], metadata: Sequence[str], replaced: Collection[int] = ()) -> None:
        """Add records for the rows from ``first`` on; metadata as JSON.

        Args:
            first: A row after all others.
            ids: One for each row.
            metadata: One for each row.
            replaced: Rows whose records are deleted before.

        Raises:
            sqlite3.IntegrityError: If an id or a row is there already. Then nothing changes.
        """
        rows = ((first + n, id_, metadata[n]) for n, id_ in enumerate(ids))
        with self._writable() as database:
            database.executemany("DELETE FROM records WHERE row = ?", [(row,) for row in replaced])
            database.executemany("INSERT INTO records VALUES (?, ?, ?)", rows)
        self._count += len(ids) - len(replaced)

    def check(self, ids: Sequence[str], new: bool) -> None:
        """Check ids before they are added.

        Args:
            ids: The ids.
            new: Whether none of them may be in the database already.

        Raises:
            ValueError: If two are the same, one is in the database and may not be, or one is not Unicode.
        """
        try:
            "".join(ids).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"An id holds half a character, {error.object[error.start]!r}, and cannot be stored. "
                "Clean it with id.encode(errors='ignore').decode()."
            ) from error
        if len(set(ids)) < len(ids):
            twice = next(id_ for id_, count in Counter(ids).items() if count > 1)
            raise ValueError(f"The id {twice!r} was given twice. Each embedding needs an id of its own.")
        if new and (known := list(self.rows_of(ids))):
            raise ValueError(
                f"Ids are in the index already: {known[:5]}. Choose other ids, or add with replace=True to put the new embeddings in "
                "their place."
            )

    def rows_of(self, ids: Iterable[str]) -> dict[str, int]:
        """Rows by id. Ids that are not in the database are left out."""
        return {id_: row for row, id_ in self._select("SELECT row, id FROM records WHERE id IN ({})", list(ids))}

    def get(self, rows: Iterable[int]) -> dict[int, tuple[str, dict[str, Any]]]:
        """Ids and metadata by row. Deleted rows are left out."""
        entries = self._select("SELECT row, id, metadata FROM records WHERE row IN ({})", list(rows))
        return {row: (id_, json.loads(metadata)) for row, id_, metadata in entries}

    def metadata(self, id_: str) -> dict[str, Any]:
        """The metadata of an id.

        Raises:
            KeyError: If the database has no such id.
        """
        for _, metadata in self.get(self.rows_of([id_]).values()).values():
            return metadata
        raise KeyError(f"There is no id {id_!r} in the index.")

    def _select(self, query: str, values: list[Any]) -> Iterable[Any]:
        for start in range(0, len(values), _AT_ONCE):
            part = values[start : start + _AT_ONCE]
            yield from self._database.execute(query.format(",".join("?" * len(part))), part)

    def remove(self, rows: Iterable[int]) -> None:
        """Delete records."""
        deleted = [(row,) for row in rows]
        with self._writable() as database:
            database.execute("PRAGMA secure_delete = ON")
            database.executemany("DELETE FROM records WHERE row = ?", deleted)
        self._count -= len(deleted)

    def ids(self, where: Mapping[str, Any] | None = None) -> list[str]:
        """All ids, or those whose metadata fit a filter, in the order of their rows.

        Raises:
            ValueError: If the filter cannot be read.
        """
        condition, values = condition_of(where or {})
        return [
            id_ for (id_,) in self._database.execute(f"SELECT id FROM records WHERE {condition} ORDER BY row", values)
        ]

    def rows(self) -> NDArray[np.int64]:
        """All rows that were not deleted, in order: ``(len(self),)``."""
        rows = self._database.execute("SELECT row FROM records ORDER BY row")
        return np.fromiter((row for (row,) in rows), np.int64, len(self))

    def rows_where(self, where: Mapping[str, Any]) -> NDArray[np.int64]:
        """Rows whose metadata fit a filter, in order.

        Args:
            where: See :func:`slq_embed.index.filters.condition_of`.

        Raises:
            ValueError: If the filter cannot be read.
        """
        condition, values = condition_of(where)
        found = self._database.execute(f"SELECT row FROM records WHERE {condition} ORDER BY row", values)
        return np.array([row for (row,) in found], np.int64)

    def renumber(self) -> None:
        """Number the rows from 0 on, in order."""
        with self._writable() as database:
            records = database.execute("SELECT id, metadata FROM records ORDER BY row").fetchall()
            database.execute("DELETE FROM records")
            database.executemany(
                "INSERT INTO records VALUES (?, ?, ?)", ((row, *record) for row, record in enumerate(records))
            )

    def save(self, path: Path) -> None:
        """Write to a file that is not there yet."""
        with sqlite3.connect(path) as target:
            self._database.backup(target)
            target.execute("VACUUM")  # no trace of what was deleted
        target.close()

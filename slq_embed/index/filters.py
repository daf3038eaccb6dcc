"""Conditions on metadata, as a search passes them, in the language of the database."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

_COMPARISONS = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
_OPERATORS = ("$eq", "$ne", "$in", "$nin", "$contains", *_COMPARISONS)
_ENTRY = "SELECT {} FROM json_each(metadata) AS entry WHERE entry.key = ?"
# Of a list or a dict, the database gives the text, which would equal a string of these characters.
_VALUE = "(" + _ENTRY.format("CASE WHEN entry.type IN ('array', 'object') THEN x'' ELSE entry.value END") + ")"

Condition = tuple[str, list[Any]]
"""An SQL expression over the column ``metadata``, and its values."""


def condition_of(where: Mapping[str, Any]) -> Condition:
    """The SQL of a filter.

    Args:
        where: Conditions, all of which must hold. A key with a value: the metadata has this value. A key with a dict of
            operators: ``$eq``, ``$ne``, ``$gt``, ``$gte``, ``$lt``, ``$lte`` (numbers with numbers, text with text), ``$in``,
            ``$nin`` (any, none of a list or set), ``$contains`` (the metadata is a list that holds the value). ``$and`` and
            ``$or``: a list of such dicts. Without the key, only ``$ne``, ``$nin`` and the value ``None`` hold.

    Raises:
        ValueError: If it is no dict, an operator is unknown, or a value does not fit its operator.
    """
    if not isinstance(where, Mapping):
        raise ValueError(f'where is {where!r}, but a dict is needed, such as {{"year": 2020}}.')
    return _joined([_condition(key, value) for key, value in where.items()], " AND ", "1")


def _condition(key: str, value: Any) -> Condition:
    if key in ("$and", "$or"):
        if not isinstance(value, Sequence) or not all(isinstance(part, Mapping) for part in value):
            raise ValueError(f"{key} has {value!r}, but a list of dicts is needed.")
        return _joined([condition_of(part) for part in value], f" {key[1:].upper()} ", "1" if key == "$and" else "0")
    if not isinstance(key, str) or key.startswith("$"):
        raise ValueError(f"A filter has the key {key!r}, but a metadata key, '$and' or '$or' is needed.")
    if not isinstance(value, Mapping):
        value = {"$eq": value}
    return _joined([_compared(key, operator, operand) for operator, operand in value.items()], " AND ", "1")


def _compared(key: str, operator: str, value: Any) -> Condition:
    if operator not in _OPERATORS:
        raise ValueError(f"The filter of {key!r} has the operator {operator!r}, but one of {_OPERATORS} is needed.")
    if operator in ("$in", "$nin"):
        if isinstance(value, str | bytes) or not isinstance(value, Sequence | Set):
            raise ValueError(f"The filter of {key!r} has {operator} {value!r}, but a list or a set is needed.")
        values = [_checked(key, one) for one in value]
        listed = f"{_VALUE} IN (SELECT value FROM json_each(?))"  # NULL if there is no value
        missing = f"{_VALUE} IS NULL" if None in values else "0"
        sql = f"({missing} OR COALESCE({listed}, 0))"
        keys = [key, key] if None in values else [key]
        given = [*keys, json.dumps([one for one in values if one is not None])]
        return (sql if operator == "$in" else f"NOT {sql}"), given
    value = _checked(key, value)
    if operator == "$contains":
        listed = _ENTRY.format("CASE WHEN entry.type = 'array' THEN entry.value ELSE '[]' END")
        return f"EXISTS (SELECT 1 FROM json_each(({listed})) AS element WHERE element.value IS ?)", [key, value]
    if operator in _COMPARISONS:
        if value is None:
            raise ValueError(f"The filter of {key!r} has {operator} None, but a number or a str is needed.")
        types = "'text'" if isinstance(value, str) else "'integer', 'real', 'true', 'false'"
        entry = _ENTRY.format("1")
        return f"EXISTS ({entry} AND entry.type IN ({types}) AND entry.value {_COMPARISONS[operator]} ?)", [key, value]
    return f"{_VALUE} {'IS' if operator == '$eq' else 'IS NOT'} ?", [key, value]


def plain(value: Any) -> Any:
    """A number or bool of NumPy as Python's own, which JSON and the database take; anything else as it is."""
    return value.item() if isinstance(value, np.number | np.bool_) else value


def _checked(key: str, value: Any) -> Any:
    """A value as the database reads it from JSON."""
    value = plain(value)
    if not isinstance(value, str | int | float | None):
        raise ValueError(
            f"The filter of {key!r} compares with a {type(value).__name__}, but a str, a number, a bool or None is needed."
        )
    if isinstance(value, int) and abs(value) >= 2**63:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"The filter of {key!r} compares with {value}, but a finite number is needed.")
    return value


def _joined(conditions: list[Condition], word: str, none: str) -> Condition:
    """In halves: the database takes an expression of any length, but none that is nested a thousand times."""
    if not conditions:
        return none, []
    if len(conditions) == 1:
        return conditions[0]
    middle = len(conditions) // 2
    (left, first), (right, second) = _joined(conditions[:middle], word, none), _joined(conditions[middle:], word, none)
    return f"({left}{word}{right})", [*first, *second]

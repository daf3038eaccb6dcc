"""Conditions on metadata, as a search passes them, in the language of the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COMPARISONS = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
_OPERATORS = ("$eq", "$ne", "$in", "$nin", "$contains", *_COMPARISONS)
_ENTRY = "SELECT {} FROM json_each(metadata) AS entry WHERE entry.key = ?"

Condition = tuple[str, list[Any]]
"""An SQL expression over the column ``metadata``, and its values."""


def condition_of(where: Mapping[str, Any]) -> Condition:
    """The SQL of a filter.

    Args:
        where: Conditions, all of which must hold. A key with a value: the metadata has this value. A key with a dict of
            operators: ``$eq``, ``$ne``, ``$gt``, ``$gte``, ``$lt``, ``$lte`` (numbers with numbers, text with text), ``$in``,
            ``$nin`` (any, none of a list), ``$contains`` (the metadata is a list that holds the value). ``$and`` and
            ``$or``: a list of such dicts. Without the key, only ``$ne``, ``$nin`` and the value ``None`` hold.

    Raises:
        ValueError: If an operator is unknown, or a value does not fit its operator.
    """
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
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"The filter of {key!r} has {operator} {value!r}, but a list is needed.")
        each, none, word = ("$eq", "0", " OR ") if operator == "$in" else ("$ne", "1", " AND ")
        return _joined([_compared(key, each, one) for one in value], word, none)
    if not isinstance(value, str | int | float | None):
        raise ValueError(
            f"The filter of {key!r} compares with a {type(value).__name__}, but a str, a number, a bool or None is needed."
        )
    if isinstance(value, int) and abs(value) >= 2**63:
        value = float(value)  # as the database reads it
    if operator == "$contains":
        listed = _ENTRY.format("CASE WHEN entry.type = 'array' THEN entry.value ELSE '[]' END")
        return f"EXISTS (SELECT 1 FROM json_each(({listed})) AS element WHERE element.value IS ?)", [key, value]
    if operator in _COMPARISONS:
        if value is None:
            raise ValueError(f"The filter of {key!r} has {operator} None, but a number or a str is needed.")
        types = "'text'" if isinstance(value, str) else "'integer', 'real', 'true', 'false'"
        entry = _ENTRY.format("1")
        return f"EXISTS ({entry} AND entry.type IN ({types}) AND entry.value {_COMPARISONS[operator]} ?)", [key, value]
    word = "IS" if operator == "$eq" else "IS NOT"
    return f"({_ENTRY.format('entry.value')}) {word} ?", [key, value]


def _joined(conditions: list[Condition], word: str, none: str) -> Condition:
    if not conditions:
        return none, []
    return f"({word.join(sql for sql, _ in conditions)})", [value for _, values in conditions for value in values]

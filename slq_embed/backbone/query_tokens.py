"""Which token ids stand for the latent queries: rows of the embedding table that no text uses."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, Literal

from transformers import ProcessorMixin

Form = Literal["adapter", "merged"]

OWN_TOKEN = re.compile(r"<\|slq_\d+\|>")
"""How query tokens are spelled where they get rows of their own."""
_RESERVED = re.compile(r"<\|?(reserved|unused|extra_id|special)[ _-]?(special_token)?[ _-]?\d+\|?>|\[unused\d+\]", re.I)


@dataclass(frozen=True)
class QueryTokens:
    """The tokens that a chat template appends.

    Args:
        strings: How the tokens are spelled in the template.
        ids: Their rows in the embedding table.
        source: ``"spare"`` (rows past the tokenizer's last id), ``"reserved"`` (tokens set aside by the
            tokenizer's makers) or ``"resized"`` (past the table's end: the merged form adds the rows).
    """

    strings: tuple[str, ...]
    ids: tuple[int, ...]
    source: Literal["spare", "reserved", "resized"]


def private_processor(processor: ProcessorMixin) -> ProcessorMixin:
    """A copy with its own tokenizer and image processor, so that the caller's stay as they are."""
    own = copy.copy(processor)
    own.tokenizer = copy.deepcopy(processor.tokenizer)
    own.image_processor = copy.deepcopy(processor.image_processor)
    return own


def allocate(tokenizer: Any, table_rows: int, count: int, form: Form) -> QueryTokens:
    """Choose tokens for the queries and teach them to a tokenizer.

    The rule: spare rows past the tokenizer's last id; else the highest tokens that the tokenizer's makers
    reserved (``<|reserved_special_token_7|>``, ``<unused7>`` and the like); else, for the merged form only,
    new rows at the table's end.

    Args:
        tokenizer: The tokenizer to teach, changed in place; it may know other query tokens already.
        table_rows: Rows of the backbone's embedding table.
        count: How many queries.
        form: The form in which the model will be saved.

    Raises:
        ValueError: If the adapter form is asked for and there are too few rows that no text uses.
    """
    strings = tuple(f"<|slq_{number}|>" for number in range(count))
    vocabulary = tokenizer.get_vocab()
    taught = sum(OWN_TOKEN.fullmatch(token) is not None for token in vocabulary)  # on another query set's tokenizer
    used = max(len(tokenizer), max(vocabulary.values()) + 1) - taught
    spare = table_rows - used
    if spare >= count or form == "merged":
        tokenizer.add_special_tokens({"additional_special_tokens": strings}, replace_extra_special_tokens=False)
        ids = tuple(int(number) for number in tokenizer.convert_tokens_to_ids(list(strings)))
        return QueryTokens(strings, ids, "spare" if max(ids) < table_rows else "resized")
    reserved = sorted((row, token) for token, row in vocabulary.items() if _RESERVED.fullmatch(token))
    reserved = [(row, token) for row, token in reserved if row < table_rows][-count:]
    if len(reserved) < count:
        raise ValueError(
            f"{count} latent queries need as many rows of the embedding table that no text uses, but this backbone "
            f"has {max(spare, 0)} spare rows and {len(reserved)} reserved tokens. Use form='merged', which saves "
            "the whole model with rows of its own, or fewer queries."
        )
    strings = tuple(token for _, token in reserved)
    # Being special makes them one token each, whatever stands beside them.
    tokenizer.add_special_tokens({"additional_special_tokens": strings}, replace_extra_special_tokens=False)
    return QueryTokens(strings, tuple(row for row, _ in reserved), "reserved")

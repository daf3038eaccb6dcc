"""Which token ids stand for the latent queries: rows of the embedding table that no text uses."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, Literal

from transformers import ProcessorMixin

from slq_embed.backbone.chat_template import is_slq_template
from slq_embed.backbone.families import tokenizer_of, with_template

Form = Literal["adapter", "merged"]

OWN_TOKEN = re.compile(r"<\|slq_\d+\|>")
"""How query tokens are spelled where they get rows of their own."""
_RESERVED = re.compile(
    r"<\|?(reserved|unused|extra_id|special)[ _-]?(special_token|token)?[ _-]?\d+\|?>|\[unused\d+\]"
    r"|<\uff5cplace\u2581holder\u2581no\u2581\d+\uff5c>",  # DeepSeek's, between wide bars
    re.IGNORECASE,
)


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


def private_processor(processor: ProcessorMixin) -> Any:
    """A copy with its own tokenizer and image processor, so that the caller's stay as they are."""
    if getattr(processor, "tokenizer", None) is None:  # a tokenizer: only text is read
        return copy.deepcopy(processor)
    own = copy.copy(processor)
    own.tokenizer = copy.deepcopy(processor.tokenizer)
    own.image_processor = copy.deepcopy(processor.image_processor)
    return with_template(own)


def free_rows(processor: Any, table_rows: int) -> tuple[int, int]:
    """How many rows of an embedding table no text uses: those past the tokenizer's last id, and reserved tokens.

    Args:
        processor: The processor, or a tokenizer; query tokens that it knows already do not count as used.
        table_rows: Rows of the embedding table.
    """
    tokenizer = tokenizer_of(processor)
    vocabulary = tokenizer.get_vocab()
    taught = sum(OWN_TOKEN.fullmatch(token) is not None for token in vocabulary)  # on another query set's tokenizer
    used = max(len(tokenizer), max(vocabulary.values()) + 1) - taught
    return max(table_rows - used, 0), len(_reserved(processor, table_rows))


def _reserved(processor: Any, table_rows: int) -> list[tuple[int, str]]:
    tokenizer = tokenizer_of(processor)
    in_use = set(tokenizer.special_tokens_map.values())  # Llama 3 is often padded with its last reserved token
    in_use |= {value for name, value in vars(processor).items() if name.endswith("_token") and isinstance(value, str)}
    written = str(getattr(processor, "chat_template", None) or tokenizer.chat_template)
    if is_slq_template(written):  # of another query set, whose tokens are its end
        written, _, _ = written.rpartition("{%- endif -%}")
    return sorted(
        (row, token)
        for token, row in tokenizer.get_vocab().items()
        if _RESERVED.fullmatch(token) and row < table_rows and token not in in_use and token not in written
    )


def _get_rows_of_their_own(tokenizer: Any, strings: tuple[str, ...]) -> bool:
    """Whether tokens that are added get ids that no other token has.

    A tokenizer numbers them by how many tokens it has. Where its ids have gaps, that can be the id of a token of text.
    """
    vocabulary = tokenizer.get_vocab()
    others = {row for token, row in vocabulary.items() if token not in strings}
    if len(vocabulary) == max(vocabulary.values()) + 1:  # no gaps
        return True
    trial = copy.deepcopy(tokenizer)
    trial.add_special_tokens({"additional_special_tokens": strings}, replace_extra_special_tokens=False)
    return others.isdisjoint(trial.convert_tokens_to_ids(list(strings)))


def allocate(processor: Any, table_rows: int, count: int, form: Form, can_grow: bool = True) -> QueryTokens:
    """Choose tokens for the queries and teach them to a tokenizer.

    The rule: spare rows past the tokenizer's last id; else the highest tokens that the tokenizer's makers
    reserved (``<|reserved_special_token_7|>``, ``<unused7>`` and the like) and that do not pad, end a text, stand
    for images or mark turns in the chat template; else, for the merged form only, new rows at the table's end. A
    row that a text can produce is never taken.

    Args:
        processor: Of the backbone, or a tokenizer. The tokenizer is taught, in place; it may know other query tokens already.
        table_rows: Rows of the backbone's embedding table.
        count: How many queries.
        form: The form in which the model will be saved.
        can_grow: Whether the merged form can add rows.

    Raises:
        ValueError: If no rows can be added and there are too few rows that no text uses.
    """
    tokenizer = tokenizer_of(processor)
    strings = tuple(f"<|slq_{number}|>" for number in range(count))
    spare, _ = free_rows(processor, table_rows)
    if not _get_rows_of_their_own(tokenizer, strings):
        spare, can_grow = 0, False
    merged = form == "merged" and can_grow
    if spare >= count or merged:
        tokenizer.add_special_tokens({"additional_special_tokens": strings}, replace_extra_special_tokens=False)
        ids = tuple(int(number) for number in tokenizer.convert_tokens_to_ids(list(strings)))
        return QueryTokens(strings, ids, "spare" if max(ids) < table_rows else "resized")
    reserved = _reserved(processor, table_rows)[-count:]
    if len(reserved) < count:
        raise ValueError(
            f"{count} latent queries need as many rows of the embedding table that no text uses, but this backbone "
            f"has {spare} spare rows and {len(reserved)} reserved tokens. Use "
            + (
                "form='merged', which saves the whole model with rows of its own, or fewer queries."
                if can_grow
                else "fewer queries, or another backbone: no rows can be added to its table."
            )
        )
    strings = tuple(token for _, token in reserved)
    # Being special makes them one token each, whatever stands beside them.
    tokenizer.add_special_tokens({"additional_special_tokens": strings}, replace_extra_special_tokens=False)
    return QueryTokens(strings, tuple(row for row, _ in reserved), "reserved")

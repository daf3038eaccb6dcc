"""Which rows the queries get in the vocabularies of published families, and that no text reaches them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

from slq_embed.backbone.chat_template import build_chat_template
from slq_embed.backbone.query_tokens import QueryTokens, allocate, free_rows
from tests.vocabularies import VOCABULARIES, Vocabulary, tokenizer_of

COUNT = 20
MAX_CHARS = 4000


PLAIN = ("Qwen3", "Llama 3", "SmolLM2")
"""One of each kind, because a vocabulary of that length takes seconds; ``make test-slow`` has them all."""


@pytest.fixture(params=[name if name in PLAIN else pytest.param(name, marks=pytest.mark.slow) for name in VOCABULARIES])
def vocabulary(request) -> Vocabulary:
    return VOCABULARIES[request.param]


def rendered_ids(tokenizer, text: str) -> list[int]:
    """Tokens of a text in the template of an SLQ model, as stock loading has them."""
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


def spellings(strings: list[str]) -> list[str]:
    """Texts that name tokens: alone, joined, one in another, cut at the longest text, in wide letters."""
    joined = "".join(strings)
    nested = "".join(f"{token[:2]}{token}{token[2:]}" for token in strings)
    wide = joined.replace("<", "\uff1c").replace(">", "\uff1e").replace("|", "\uff5c")
    return [strings[0], strings[-1], joined, " ".join(strings), nested, "x" * (MAX_CHARS - 5) + joined, wide]


def assert_no_text_reaches(tokenizer, tokens: QueryTokens, others: list[str]) -> None:
    template = build_chat_template(tokenizer, tokens.strings, max_text_chars=MAX_CHARS)
    tokenizer.chat_template = template
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    plain = [number for number in rendered_ids(tokenizer, "plain") if number in special]
    for text in spellings([*tokens.strings, *others]):
        ids = rendered_ids(tokenizer, text)
        assert ids[-COUNT:] == list(tokens.ids)
        assert [number for number in ids if number in special] == plain, text


def test_which_rows_are_taken(vocabulary):
    """Spare rows, else reserved tokens; without either, the adapter form refuses and the merged form adds rows."""
    tokenizer = tokenizer_of(vocabulary)
    assert len(tokenizer) == vocabulary.length
    assert free_rows(tokenizer, vocabulary.rows) == (vocabulary.rows - vocabulary.length, len(vocabulary.numbers))
    if vocabulary.taken is None:
        with pytest.raises(ValueError, match=r"has 0 spare rows and 0 reserved tokens. Use form='merged'"):
            allocate(tokenizer, vocabulary.rows, COUNT, "adapter")
        with pytest.raises(ValueError, match="no rows can be added to its table"):
            allocate(tokenizer, vocabulary.rows, COUNT, "merged", can_grow=False)
        tokens = allocate(tokenizer, vocabulary.rows, COUNT, "merged")
        assert (tokens.source, tokens.ids[0]) == ("resized", vocabulary.rows)
    else:
        tokens = allocate(tokenizer, vocabulary.rows, COUNT, "adapter")
        assert (tokens.source, tokens.ids[0]) == (vocabulary.source, vocabulary.taken)
        assert max(tokens.ids) < vocabulary.rows
    assert tokens.ids == tuple(range(tokens.ids[0], tokens.ids[0] + COUNT))
    assert set(tokens.ids).isdisjoint(vocabulary.controls.values())
    some = [vocabulary.reserved.format(number) for number in vocabulary.numbers[:3]]
    assert_no_text_reaches(tokenizer, tokens, [*vocabulary.controls, *some])


def tokenizer_with_gaps(*words: tuple[str, int]):
    """Ids 0 to 255 are bytes; between the words there are ids without a token."""
    vocab = {letter: row for row, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | dict(words)
    merges = [(word[0], word[1:]) for word, _ in words]
    built = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built)


def test_a_gap_in_the_ids_does_not_give_the_queries_a_row_of_text():
    """Such a tokenizer numbers an added token by how many it has: 257, 258, ..., and 258 is a word."""
    tokenizer = tokenizer_with_gaps(("zz", 258))
    assert tokenizer("zz").input_ids == [258]
    with pytest.raises(ValueError, match=r"0 spare rows and 0 reserved tokens.*no rows can be added"):
        allocate(tokenizer, 310, 4, "adapter")
    with pytest.raises(ValueError, match="no rows can be added"):
        allocate(tokenizer, 310, 4, "merged")
    assert tokenizer("zz").input_ids == [258]


def test_rows_in_a_gap_are_free():
    tokenizer = tokenizer_with_gaps(("zz", 300))
    tokens = allocate(tokenizer, 310, 4, "adapter")
    assert tokens.ids == (257, 258, 259, 260)
    assert not {*tokens.ids} & {*tokenizer("zz" * 9 + "abc").input_ids}


@pytest.mark.parametrize("role", ["pad_token", "eos_token", "image_token"])
def test_a_reserved_token_that_has_a_role_is_not_taken(role):
    """Llama 3 is often padded with its last reserved token; a query at that row would be found at each place of padding."""
    last = "<|reserved_special_token_29|>"
    small = Vocabulary(300, 300, {"<|im_start|>": 0, "<|im_end|>": 1}, "<|reserved_special_token_{}|>", range(30), 270)
    built = tokenizer_of(small)
    roles = {"extra_special_tokens": {role: last}} if role == "image_token" else {role: last}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=built.backend_tokenizer, **roles)
    assert getattr(tokenizer, role) == last
    assert free_rows(tokenizer, 300) == (0, 29)
    tokens = allocate(tokenizer, 300, 4, "adapter")
    assert tokens.ids == (295, 296, 297, 298)
    assert getattr(tokenizer, role) == last
    assert allocate(tokenizer, 300, 4, "adapter") == tokens


@pytest.mark.parametrize("where", ["the template of the tokenizer", "the template of the processor", "its image token"])
def test_a_reserved_token_that_every_chat_writes_is_not_taken(where):
    """What is loaded by plain Sentence Transformers would find a query at each of them."""
    last = "<|reserved_special_token_29|>"
    small = Vocabulary(300, 300, {"<|im_start|>": 0, "<|im_end|>": 1}, "<|reserved_special_token_{}|>", range(30), 270)
    tokenizer = tokenizer_of(small)
    processor = SimpleNamespace(tokenizer=tokenizer, chat_template="{{ messages }}")
    if where == "its image token":
        processor.image_token = last
    else:
        owner = tokenizer if "tokenizer" in where else processor
        processor.chat_template = None
        owner.chat_template = f"{{{{ messages }}}}{last}"
    assert free_rows(processor, 300) == (0, 29)
    assert allocate(processor, 300, 4, "adapter").ids == (295, 296, 297, 298)


def test_another_query_set_takes_the_same_reserved_tokens():
    small = Vocabulary(300, 300, {"<|im_start|>": 0, "<|im_end|>": 1}, "<|reserved_special_token_{}|>", range(30), 270)
    tokenizer = tokenizer_of(small)
    tokens = allocate(tokenizer, 300, 4, "adapter")
    tokenizer.chat_template = build_chat_template(tokenizer, tokens.strings, max_text_chars=10)
    assert allocate(tokenizer, 300, 4, "adapter") == tokens

"""What must hold of prompts that are computed in several steps; the rest is tested with vLLM: make test-vllm."""

import pytest
import torch

from vllm_slq.record import read_record
from vllm_slq.tail import ends_with, keep_tail

RECORD = {"tokens": {"ids": [7, 8, 9]}, "pooling": "mean"}


@pytest.mark.parametrize("steps", [[10], [5, 5], [7, 3], [8, 2], [6, 1, 1, 1, 1], [1] * 10])
def test_the_states_at_the_last_positions_however_a_prompt_is_cut(steps):
    prompt = torch.randn(10, 4)
    kept, start, found = [], 0, None
    for size in steps:
        assert found is None
        found = keep_tail(kept, prompt[start : start + size], start + size, 10, 3)
        start += size
    assert found is not None
    assert torch.equal(found, prompt[-3:])
    assert not kept


def test_a_prompt_that_was_put_off_begins_anew():
    prompt = torch.randn(10, 4)
    kept = []
    assert keep_tail(kept, prompt[:9], 9, 10, 3) is None
    found = keep_tail(kept, prompt, 10, 10, 3)
    assert found is not None
    assert torch.equal(found, prompt[-3:])


def test_what_is_kept_is_a_copy():
    prompt = torch.zeros(10, 4)
    kept = []
    keep_tail(kept, prompt[:9], 9, 10, 3)
    prompt += 1
    assert not kept[0].any()


def test_positions_that_were_never_computed_are_missed():
    found = keep_tail([], torch.randn(1, 4), 10, 10, 3)
    assert found is not None
    assert len(found) == 1


@pytest.mark.parametrize(
    ("ids", "length", "right"),
    [([1, 7, 8, 9], 4, True), ([1, 7, 8, 9, 5], 4, True), ([7, 8, 9, 1], 4, False), ([8, 9], 2, False)],
)
def test_whether_a_prompt_ends_with_the_queries(ids, length, right):
    assert ends_with(torch.tensor(ids), length, [7, 8, 9]) is right


def test_the_record_of_a_folder():
    assert read_record(RECORD, "folder").count == 3
    assert read_record({**RECORD, "pooling": "last"}, "folder").count == 1
    assert read_record({**RECORD, "projection": 16}, "folder").projection == 16
    weighted = read_record({**RECORD, "pooling": "weighted", "query_scores": [0.5, 0.0, 1.5]}, "folder")
    assert (weighted.count, weighted.scores) == (3, (0.5, 0.0, 1.5))


@pytest.mark.parametrize(
    ("values", "said"),
    [({"pooling": "max"}, "Upgrade vllm-slq"), ({"pooling": "weighted", "query_scores": [1.0]}, "3 queries, but 1")],
)
def test_a_pooling_that_does_not_fit_is_refused(values, said):
    with pytest.raises(ValueError, match=said):
        read_record({**RECORD, **values}, "folder")


@pytest.mark.parametrize(
    ("parts", "inside"), [({}, False), ({"deep_queries": True}, True), ({"query_adapter": {}}, False)]
)
def test_what_acts_inside_the_layers_is_known(parts, inside):
    assert read_record({**RECORD, **parts}, "folder").acts_inside is inside
    assert read_record({**RECORD, "query_adapter": {"rank": 8}}, "folder").query_adapter


def test_queries_with_a_token_type_of_their_own_are_refused():
    with pytest.raises(ValueError, match="cannot be served by vLLM: its queries have a token type"):
        read_record({**RECORD, "query_token_type": 1}, "folder")


def test_a_folder_without_a_record_is_refused():
    with pytest.raises(ValueError, match="no SLQ model"):
        read_record(None, "folder")

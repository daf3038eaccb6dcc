"""The first module alone: what it asks of the processor, and what a state dict holds."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from tokenizers import processors

from slq_embed import SLQEncoder, SymmetricInfoNCELoss
from tests.families import others
from tests.families.building import write


def test_a_template_that_writes_the_first_token_gets_no_second(encoder):
    """Of tokenizers that add a first token by themselves, as transformers' own chat call has it."""
    tokenizer = encoder.tokenizer
    plain = encoder.preprocess(["a red circle"])["input_ids"]
    first = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert plain[0, 0] == first, "the template begins with it"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", first)]
    )
    assert encoder.preprocess(["a red circle"])["input_ids"].shape[1] == plain.shape[1] + 1
    tokenizer.bos_token = "<|im_start|>"
    assert torch.equal(encoder.preprocess(["a red circle"])["input_ids"], plain)


@pytest.mark.parametrize("trained", [False, True])
def test_a_temperature_travels_in_the_state(encoder, trained):
    other = encoder.with_queries(4, seed=9)
    if trained:
        SymmetricInfoNCELoss(other, temperature=0.3)
        encoder.load_state_dict(other.state_dict())
        assert encoder.temperature == pytest.approx(0.3)
    else:
        SymmetricInfoNCELoss(encoder, temperature=0.2)
        encoder.load_state_dict(other.state_dict())
        assert encoder.transformer.log_temperature.item() == pytest.approx(math.log(0.2))
    assert torch.equal(encoder.queries, other.queries)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_queries_where_they_enter_as_token_ids(tmp_path, copy_of):
    folder = write(tmp_path, others.gemma4())
    encoder = SLQEncoder.from_backbone(folder, num_queries=4, seed=0, device="cpu")
    assert encoder.transformer.query_inputs().ndim == 1
    expected = encoder.encode(["a red circle"])
    again = copy_of(encoder)
    with torch.no_grad():
        again.queries.neg_()
    assert np.abs(again.encode(["a red circle"]) - expected).max() > 0.01
    assert np.array_equal(encoder.encode(["a red circle"]), expected)


def test_queries_of_another_width_are_refused(encoder):
    with pytest.raises(ValueError, match=r"shape \(4, 16\), but \(number of queries, 32\) is needed"):
        encoder.with_queries(init=torch.zeros(4, 16))


@pytest.mark.parametrize("kept", [True, False])
def test_columns_that_a_loss_joins_are_embedded_as_alone(encoder, kept):
    """The host fills the shorter texts up on the right; queries behind that padding were 0.3 off."""
    columns = [["a", "a red circle"], ["b", "a much longer text about red circles"], ["a blue square", "c"]]
    encoder.train(kept)
    with torch.set_grad_enabled(kept):
        joined = embed_columns(encoder, [encoder.preprocess(column) for column in columns], separate_first=False)
        alone = [encoder(encoder.preprocess(column))["sentence_embedding"] for column in columns]
    for ours, expected in zip(joined, alone, strict=True):
        assert (ours - expected).abs().max() < 1e-5

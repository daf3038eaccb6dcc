"""The cached loss: what it gives is what the plain one gives, with the memory of a chunk."""

from __future__ import annotations

import math

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from slq_embed import SymmetricInfoNCELoss
from slq_embed.training import CachedSymmetricInfoNCELoss
from tests.training import toy_pairs, toy_train

TEXTS = ["a", "bb", "ccc", "dd d", "e"]


def step(encoder, loss, images, labels=None, scale=1.0, negatives=()) -> tuple[float, torch.Tensor, float]:
    """Value and gradients of one step, its loss scaled as gradient accumulation does."""
    encoder.train()
    encoder.zero_grad()
    columns = [encoder.preprocess(column) for column in ([*images, "x"], TEXTS, *negatives)]
    value = loss(columns, labels)
    (value * scale).backward()
    return value.item(), encoder.queries.grad.clone(), encoder.transformer.log_temperature.grad.item()


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 0, 1, 2, 2])])
@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_value_and_gradients_are_those_of_the_plain_loss(encoder, images, chunk, labels):
    """Those of the temperature too, and both scaled with the loss."""
    plain = step(encoder, SymmetricInfoNCELoss(encoder), images, labels, scale=0.25)
    cached = step(encoder, CachedSymmetricInfoNCELoss(encoder, mini_batch_size=chunk), images, labels, scale=0.25)
    assert cached[0] == pytest.approx(plain[0], rel=1e-5)
    assert (plain[1] - cached[1]).norm() < 1e-4 * plain[1].norm()
    assert cached[2] == pytest.approx(plain[2], rel=1e-3)
    assert abs(plain[2]) > 1e-3


def test_two_batches_before_a_backward_pass_have_their_own_gradients(encoder):
    batches = [["a", "bb", "ccc"], ["d", "e e", "f"]], [["g", "h", "i i", "j"], ["k", "l l", "m", "n"]]
    found = []
    encoder.train()
    for loss in (SymmetricInfoNCELoss(encoder), CachedSymmetricInfoNCELoss(encoder, mini_batch_size=2)):
        encoder.zero_grad()
        first, second = (loss([encoder.preprocess(column) for column in batch]) for batch in batches)
        with torch.no_grad():
            loss([encoder.preprocess(column) for column in batches[0]])
        (first + 2 * second).backward()
        found.append((encoder.queries.grad.clone(), encoder.transformer.log_temperature.grad.item()))
    assert (found[0][0] - found[1][0]).norm() < 1e-4 * found[0][0].norm()
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-3)


def test_hard_negatives_and_several_positives_are_those_of_the_plain_loss(encoder, images):
    labels, negatives = torch.tensor([0, 0, 1, 2, 2]), [TEXTS[::-1], ["f", "g g", "h", "i i i", "j"]]
    options = {"labels": labels, "negatives": negatives}
    plain = step(encoder, SymmetricInfoNCELoss(encoder, positives="all"), images, **options)
    cached = step(encoder, CachedSymmetricInfoNCELoss(encoder, mini_batch_size=2, positives="all"), images, **options)
    assert cached[0] == pytest.approx(plain[0], rel=1e-5)
    assert (plain[1] - cached[1]).norm() < 1e-4 * plain[1].norm()
    others = [
        step(encoder, SymmetricInfoNCELoss(encoder, positives="all"), images, labels=labels)[0],
        step(encoder, SymmetricInfoNCELoss(encoder), images, **options)[0],
    ]
    assert all(abs(plain[0] - other) > 1e-3 for other in others)


def test_matryoshka_weights_reach_the_temperature_too(encoder, images):
    def weighted(loss):
        return MatryoshkaLoss(encoder, loss, matryoshka_dims=[32, 8, 4], matryoshka_weights=[1, 0.5, 3])

    plain = step(encoder, weighted(SymmetricInfoNCELoss(encoder)), images)
    cached = step(encoder, weighted(CachedSymmetricInfoNCELoss(encoder, mini_batch_size=2)), images)
    assert cached[0] == pytest.approx(plain[0], rel=1e-5)
    assert (plain[1] - cached[1]).norm() < 1e-4 * plain[1].norm()
    assert cached[2] == pytest.approx(plain[2], rel=1e-3)


def test_an_evaluation_has_the_same_value_and_no_gradient(encoder, images):
    loss = CachedSymmetricInfoNCELoss(encoder, mini_batch_size=2)
    expected = step(encoder, loss, images)[0]
    with torch.no_grad():
        value = loss([encoder.preprocess([*images, "x"]), encoder.preprocess(TEXTS)])
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert not value.requires_grad


def test_only_a_chunk_is_differentiated_at_a_time(encoder, images):
    batches = []
    hook = encoder.backbone.base_model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    step(encoder, CachedSymmetricInfoNCELoss(encoder, mini_batch_size=2), images)
    hook.remove()
    queries = [rows for rows, length in batches if length == 4]
    assert queries == 2 * [2, 2, 1, 2, 2, 1]


def test_the_trainer_learns_with_it_and_the_temperature_moves(encoder, tmp_path):
    loss = CachedSymmetricInfoNCELoss(encoder, mini_batch_size=3)
    trainer = toy_train(
        encoder, toy_pairs(), tmp_path, loss=loss, max_steps=20, learning_rate=0.1, per_device_train_batch_size=8
    )
    values = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert values[-1] < 0.75 * values[0]
    assert abs(math.log(encoder.temperature / 0.07)) > 0.05
    assert loss.get_config_dict()["mini_batch_size"] == 3


def test_a_clamped_temperature_can_come_back(encoder, images):
    loss = CachedSymmetricInfoNCELoss(encoder, mini_batch_size=2)
    with torch.no_grad():
        encoder.transformer.log_temperature.fill_(-30)
    assert step(encoder, loss, images)[2] != 0
    assert loss.temperature == pytest.approx(0.01)


def test_what_does_not_fit_is_refused(encoder):
    with pytest.raises(ValueError, match="mini_batch_size is 0, but at least 1"):
        CachedSymmetricInfoNCELoss(encoder, mini_batch_size=0)
    with pytest.raises(ValueError, match="compares two columns, but the batch has 1"):
        CachedSymmetricInfoNCELoss(encoder)([encoder.preprocess(["a"])])
    with pytest.raises(ValueError, match='needs a column "label"'):
        CachedSymmetricInfoNCELoss(encoder, positives="all")([encoder.preprocess(["a"]) for _ in range(2)])

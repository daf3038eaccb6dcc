"""A query adapter leaves the backbone alone: its bits, its modules and its answers, in every thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from slq_embed import QueryAdapter
from slq_embed.training import learning_rate_mapping
from tests.checkpoints import FAMILIES
from tests.contract.test_invariants import digest
from tests.integration.test_one_backbone import generated
from tests.parts import SMALL, build, copy_of_weights, furthest, on, structure, trained
from tests.training import toy_pairs, toy_train
from tests.untouched import Untouched


@pytest.mark.parametrize("kind", FAMILIES)
def test_building_training_and_encoding_leave_no_trace(checkpoint, images, mixed, kind, tmp_path):
    untouched, plain = Untouched(checkpoint(kind)), build(checkpoint, kind)
    backbone = plain.backbone
    asked = [untouched.read([images[0], "a red circle"]), untouched.read(["two green stars"])]
    expected = [generated(untouched.model, inputs) for inputs in asked]
    plain.encode(mixed)
    modules, weights = structure(backbone), digest(backbone)
    settings = backbone.config.to_dict(), backbone.generation_config.to_dict()

    def check() -> None:
        assert structure(backbone) == modules
        assert digest(backbone) == weights
        assert (backbone.config.to_dict(), backbone.generation_config.to_dict()) == settings
        for inputs, outputs in zip(asked, expected, strict=True):
            assert all(map(torch.equal, generated(backbone, inputs), outputs)), "logits and tokens"
            with torch.no_grad():
                assert torch.equal(backbone(**inputs).logits, untouched.model(**inputs).logits)

    encoder = plain.with_queries(seed=1, projection=16, query_adapter=SMALL)
    check()
    before = copy_of_weights(encoder)
    rates = learning_rate_mapping(encoder)
    toy_train(encoder, toy_pairs(), tmp_path, max_steps=2, learning_rate_mapping=rates)
    after = encoder.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == before.keys()
    assert not any(weight.requires_grad for weight in backbone.parameters())
    assert not any(weight.grad is not None for weight in backbone.parameters())
    encoder.encode(mixed)
    encoder.save_pretrained(tmp_path / "slq")
    check()
    with pytest.raises(ValueError, match="rank is 99"):
        plain.with_queries(query_adapter=QueryAdapter(rank=99))
    check()


def test_there_is_one_copy_of_the_weights(checkpoint, mixed):
    encoder = build(checkpoint, query_adapter=True, deep_queries=True)
    addresses = {weight.data_ptr() for weight in encoder.backbone.parameters()}
    own = {weight.data_ptr() for weight in encoder.parameters()}
    encoder.encode(mixed)
    assert {weight.data_ptr() for weight in encoder.transformer.query_decoder.parameters()} <= addresses | own
    assert not addresses & own


@contextmanager
def in_the_background(work):
    """Repeat work in a thread until the block ends; it has run at least twice then."""
    ended, runs, errors = threading.Event(), [], []

    def repeat() -> None:
        try:
            while not ended.is_set() or len(runs) < 2:
                work()
                runs.append(1)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield runs
    finally:
        ended.set()
        thread.join()
    assert not errors, errors


def test_answers_are_bit_identical_while_another_thread_embeds(checkpoint, images, mixed):
    untouched = Untouched(checkpoint())
    inputs = untouched.read([images[0], "a red circle"])
    expected = generated(untouched.model, inputs)
    encoder = trained(build(checkpoint, query_adapter=True, deep_queries=True))
    rows = encoder.encode(mixed)
    found = []
    with in_the_background(lambda: found.append(encoder.encode(mixed))) as runs:
        for _ in range(8):
            assert all(map(torch.equal, generated(encoder.backbone, inputs), expected))
    assert runs
    assert all(furthest(other, rows) < 1e-6 for other in found)


def test_encoders_on_one_backbone_embed_at_once(checkpoint, mixed):
    """Not through the lock that encoding takes, but in the forward pass itself."""
    plain = build(checkpoint)
    encoders = [
        plain,
        on(plain, 1, query_adapter=SMALL),
        on(plain, 2, query_adapter=True, projection=16),
        on(plain, 3, deep_queries=True),
    ]
    features = [encoder.preprocess(mixed) for encoder in encoders]

    def forward(number: int) -> torch.Tensor:
        with torch.inference_mode():
            return encoders[number].eval()(dict(features[number]))["sentence_embedding"]

    def encode(number: int) -> np.ndarray:
        return encoders[number].encode(mixed)

    for work in (forward, encode):
        expected = [work(number) for number in range(3)]
        with ThreadPoolExecutor(3) as pool:
            for number, rows in enumerate(pool.map(work, [*range(3)] * 4)):
                assert furthest(rows, expected[number % 3]) < 1e-6

"""Prefixes that are kept: the same embeddings and gradients, and the backbone does not run again."""

from __future__ import annotations

import copy
import multiprocessing
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from datasets import Image
from sentence_transformers.sentence_transformer import losses

import slq_embed.modules.latent_query_transformer as latent_query_transformer
import slq_embed.prefix.source as prefix_source
import slq_embed.store.folder as entries_in_a_folder
from slq_embed import PrefixStore, SLQEncoder
from tests.checkpoints import FAMILIES
from tests.forks import forked, needs_fork
from tests.training import toy_pairs, toy_train
from tests.unit.prefix.rows import flip

BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


@contextmanager
def counting(monkeypatch):
    """How many rows go through the language model and the vision tower."""
    rows: Counter = Counter()

    def counted(name, run):
        def call(decoder, features, *rest):
            rows[name] += len(features["input_ids"])
            return run(decoder, features, *rest)

        return call

    with monkeypatch.context() as patch:
        for name in ("run_prefix", "run_vision"):
            patch.setattr(prefix_source, name, counted(name, getattr(prefix_source, name)))
        whole = counted("run_all_positions", latent_query_transformer.run_all_positions)
        patch.setattr(latent_query_transformer, "run_all_positions", whole)
        yield rows


def build(checkpoint, kind="qwen3_vl", **options):
    settings = {"num_queries": 4, "seed": 0, "device": "cpu"} | options
    return SLQEncoder.from_backbone(checkpoint(kind), **settings)


@pytest.mark.parametrize("where", ["memory", "folder"])
@pytest.mark.parametrize("level", ["keys_values", "vision"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_read_back_gives_the_same_embedding(checkpoint, mixed, kind, level, where, tmp_path, monkeypatch):
    encoder = build(checkpoint, kind)
    expected = encoder.encode(mixed)
    encoder.prefix_store = PrefixStore(tmp_path if where == "folder" else None, level=level)
    first = encoder.encode(mixed)
    with counting(monkeypatch) as rows:
        again = encoder.encode(mixed, batch_size=5)
        one = np.stack([encoder.encode(value) for value in mixed])
    assert np.abs(first - expected).max() < 1e-6
    assert np.abs(again - expected).max() < 1e-6
    assert np.abs(one - expected).max() < 1e-6
    images, texts = 4, 2
    if level == "keys_values":
        assert not rows
        assert encoder.prefix_store.counts.reused == 2 * len(mixed)
    else:  # the language model runs again, the tower does not
        assert rows == {"run_prefix": 2 * len(mixed)}
        assert encoder.prefix_store.counts.reused == 2 * images
        assert len(encoder.prefix_store) == len(mixed) - texts


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.03), ("int8", 0.05)])
@pytest.mark.parametrize("level", ["keys_values", "vision"])
def test_half_and_quarter_precision_stay_near(checkpoint, mixed, level, precision, tolerance, tmp_path):
    encoder = build(checkpoint)
    exact = PrefixStore(level=level)
    encoder.prefix_store = exact
    expected = encoder.encode(mixed)
    encoder.prefix_store = PrefixStore(tmp_path, level=level, precision=precision)
    encoder.encode(mixed)
    found = encoder.encode(mixed)
    assert 0 < np.abs(found - expected).max() < tolerance
    assert encoder.prefix_store.nbytes < {"bfloat16": 0.62, "int8": 0.55}[precision] * exact.nbytes + 20_000


@pytest.mark.parametrize("level", ["keys_values", "vision"])
def test_the_host_trainer_runs_each_prefix_once_in_all_epochs(checkpoint, level, tmp_path, monkeypatch):
    def train(store):
        encoder = build(checkpoint)
        encoder.prefix_store = store
        trainer = toy_train(encoder, toy_pairs(), tmp_path, num_train_epochs=3, max_steps=-1)
        return encoder.queries.detach(), [e["loss"] for e in trainer.state.log_history if "loss" in e]

    expected, expected_losses = train(None)
    with counting(monkeypatch) as rows:
        found, found_losses = train(PrefixStore(tmp_path / "prefixes", level=level))
    assert found_losses == pytest.approx(expected_losses, rel=1e-4)
    assert (found - expected).abs().max() < 1e-4
    if level == "keys_values":
        assert rows == {"run_prefix": 16}  # 8 images and 8 texts
    else:
        assert rows == {"run_prefix": 48, "run_vision": 8}
    with counting(monkeypatch) as rows:  # another run, with other settings, from the same folder
        encoder = build(checkpoint, num_queries=6, seed=1)
        encoder.prefix_store = PrefixStore(tmp_path / "prefixes", level=level)
        toy_train(encoder, toy_pairs(), tmp_path, learning_rate=0.5, max_steps=2)
    assert rows == ({} if level == "keys_values" else {"run_prefix": 16})


def test_workers_see_what_a_folder_holds(checkpoint, tmp_path, monkeypatch):
    encoder = build(checkpoint)
    encoder.prefix_store = PrefixStore(tmp_path / "prefixes")
    with counting(monkeypatch) as rows:
        toy_train(encoder, toy_pairs(), tmp_path, num_train_epochs=3, max_steps=-1, dataloader_num_workers=2)
    assert rows == {"run_prefix": 16}


@pytest.mark.parametrize("level", ["keys_values", "vision"])
def test_a_damaged_prefix_is_computed_again_in_training(checkpoint, level, tmp_path, monkeypatch):
    encoder = build(checkpoint)
    encoder.prefix_store = PrefixStore(tmp_path / "prefixes", level=level)
    toy_train(encoder, toy_pairs(), tmp_path, num_train_epochs=1, max_steps=-1)
    files = sorted((tmp_path / "prefixes").glob("??/*.safetensors"))
    assert len(files) == (16 if level == "keys_values" else 8)
    for file in files[:3]:
        flip(file, file.stat().st_size // 2)
    with counting(monkeypatch) as rows:
        toy_train(encoder, toy_pairs(), tmp_path, num_train_epochs=2, max_steps=-1)
    assert rows["run_prefix" if level == "keys_values" else "run_vision"] == 3
    assert encoder.prefix_store.counts.damaged == 3


def test_damage_that_is_found_after_preprocessing_is_an_error(encoder, images, tmp_path):
    """As when a worker has preprocessed: the inputs are gone, so nothing can be computed again."""
    encoder.prefix_store = PrefixStore(tmp_path)
    encoder.encode(images)
    features = encoder.preprocess(images)
    encoder.prefix_store = PrefixStore(tmp_path)
    file = next(tmp_path.glob("??/*.safetensors"))
    flip(file, file.stat().st_size // 2)
    with pytest.raises(RuntimeError, match="gone or damaged"):
        encoder(features)


def test_a_stored_prefix_is_opened_once_a_step(encoder, mixed, tmp_path, monkeypatch):
    encoder.prefix_store = PrefixStore(tmp_path)
    encoder.encode(mixed)
    opened = []
    open_entry = entries_in_a_folder.safe_open
    monkeypatch.setattr(
        entries_in_a_folder, "safe_open", lambda path, *rest: opened.append(path) or open_entry(path, *rest)
    )
    encoder.train()
    encoder(encoder.preprocess(mixed))
    assert len(opened) == len(set(opened)) == len(mixed)


def test_undecoded_images_are_decoded_only_to_be_computed(checkpoint, tmp_path, monkeypatch):
    pairs = toy_pairs()
    pairs.dataset = pairs.dataset.cast_column("image", Image(decode=False))
    encoder = build(checkpoint)
    encoder.prefix_store = PrefixStore()
    decoded = []
    monkeypatch.setattr(
        "slq_embed.inputs.images._to_rgb", lambda image, name, draft: decoded.append(name) or image.convert("RGB")
    )
    toy_train(encoder, pairs, tmp_path, num_train_epochs=3, max_steps=-1)
    assert len(decoded) == 8


@pytest.mark.parametrize("stored", [False, True])
def test_the_second_pass_of_gradcache_runs_no_prefix(encoder, images, monkeypatch, stored):
    if stored:
        encoder.prefix_store = PrefixStore()

    def gradient(loss):
        encoder.queries.grad = None
        columns = [encoder.preprocess([*images, images[0]]), encoder.preprocess(["a", "bb", "ccc", "dd d", "e"])]
        loss(columns, None).backward()
        return encoder.queries.grad.clone()

    encoder.train()
    plain = gradient(losses.MultipleNegativesRankingLoss(encoder, **BOTH))
    for _ in range(2):
        if not stored:
            encoder.transformer.source.memory.clear()
        with counting(monkeypatch) as rows:
            cached = gradient(losses.CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=2, **BOTH))
        assert (plain - cached).norm() < 1e-4 * plain.norm()
        assert rows == ({} if stored else {"run_prefix": 9})  # 4 images, one of them twice, and 5 texts
    assert not copy.deepcopy(encoder).transformer.source.memory.rows, "they may be gigabytes"
    encoder.eval()
    assert not encoder.transformer.source.memory.rows


def test_columns_that_are_processed_otherwise_share_no_prefix(encoder, images):
    options = [{}, {"processing_kwargs": {"image": {"do_rescale": False}}}]
    encoder.train()
    with torch.no_grad():
        together = [encoder(encoder.preprocess(images, **option))["sentence_embedding"] for option in options]
    expected = [encoder.encode(images, **option) for option in options]
    for found, alone in zip(together, expected, strict=True):
        assert np.abs(found.numpy() - alone).max() < 1e-5
    assert np.abs(expected[0] - expected[1]).max() > 1e-3


def test_a_step_that_does_not_fit_is_run_again(encoder, images, monkeypatch):
    encoder.train()
    encoder.transformer.source.memory.budget = 1
    loss = losses.CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=2, **BOTH)
    with counting(monkeypatch) as rows:
        loss([encoder.preprocess(images), encoder.preprocess(["a", "bb", "ccc", "d"])], None).backward()
    assert rows == {"run_prefix": 16}


def test_captions_of_one_image_share_its_prefix_and_its_processing(encoder, images, monkeypatch):
    processed = []
    process = encoder.transformer.reader.process
    monkeypatch.setattr(
        encoder.transformer.reader,
        "process",
        lambda rows, texts, indices, *rest: processed.extend(indices) or process(rows, texts, indices, *rest),
    )
    batch = [images[0], images[1].copy(), images[0].copy(), images[1], images[0]]
    encoder.train()
    with counting(monkeypatch) as rows:
        found = encoder(encoder.preprocess(batch))["sentence_embedding"]
    assert processed == [0, 1]
    assert rows == {"run_prefix": 2}
    encoder.eval()
    assert np.abs(found.detach().numpy() - encoder.encode(batch)).max() < 1e-6


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_prefix_stops_at_the_last_keys(checkpoint, kind):
    """The last layer's MLP runs for the queries alone."""
    encoder = build(checkpoint, kind)
    last = encoder.backbone.base_model.language_model.layers[-1].mlp
    lengths = []
    last.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    encoder.train()
    encoder(encoder.preprocess(["a text", "another, longer text"]))
    assert lengths == [4]


def test_what_encoding_kept_can_be_trained_on(checkpoint, tmp_path, monkeypatch):
    encoder, pairs = build(checkpoint), toy_pairs()
    encoder.prefix_store = PrefixStore()
    encoder.encode([*pairs.dataset["image"], *pairs.dataset["text"]])
    with counting(monkeypatch) as rows:
        toy_train(encoder, pairs, tmp_path)
    assert not rows


def test_a_name_covers_all_that_matters_and_nothing_else(checkpoint, images, tmp_path, monkeypatch):
    store = PrefixStore(tmp_path / "prefixes")
    inputs = [images[0], "a text"]

    def computed(encoder, **options):
        before = store.counts.computed
        encoder.prefix_store = store
        encoder.encode(inputs, **options)
        return store.counts.computed - before

    assert computed(build(checkpoint)) == 2
    for same in ({"seed": 3}, {"num_queries": 7}, {"pooling": "last"}, {"init": "zeros"}, {"form": "merged"}):
        assert computed(build(checkpoint, **same)) == 0, same
    assert computed(build(checkpoint), prompt="Find it.") == 2
    assert computed(build(checkpoint, instructions={"text": "Say {text}."})) == 1
    assert computed(build(checkpoint, max_pixels=1024)) == 2
    assert computed(build(checkpoint, dtype=torch.bfloat16)) == 2
    assert computed(build(checkpoint, attn_implementation="eager")) == 2
    smaller = {"processing_kwargs": {"image": {"size": {"shortest_edge": 256, "longest_edge": 512}}}}
    assert computed(build(checkpoint), **smaller) == 2
    later = build(checkpoint)
    assert computed(later) == 0
    later.processor.image_processor.size["longest_edge"] = 512  # after the store was attached
    assert computed(later) == 2
    changed = build(checkpoint)
    with torch.no_grad():  # one weight, deep inside
        next(p for n, p in changed.backbone.named_parameters() if "down_proj" in n)[0, 0] += 1e-3
    assert computed(changed) == 2
    other = PrefixStore(tmp_path / "prefixes", precision="int8")
    encoder = build(checkpoint)
    encoder.prefix_store = other
    encoder.encode(inputs)
    assert other.counts.reused == 0


def test_what_is_over_the_budget_is_computed_again(encoder, mixed, tmp_path):
    expected = encoder.encode(mixed)
    for store in (PrefixStore(budget=30_000), PrefixStore(tmp_path, budget="30KB")):
        encoder.prefix_store = store
        for _ in range(2):
            assert np.abs(encoder.encode(mixed) - expected).max() < 1e-6
        assert 0 < len(store) < len(mixed)
        assert store.nbytes <= 30_000
        assert store.counts.computed == len(mixed) + store.counts.over_budget // 2
        assert f"over the budget {store.counts.over_budget}" in repr(store)


def test_what_cannot_be_kept_is_not_prepared(encoder, mixed, tmp_path, monkeypatch):
    packed = []
    pack = prefix_source.pack_row
    monkeypatch.setattr(prefix_source, "pack_row", lambda row, *rest: packed.append(row) or pack(row, *rest))
    for store in (PrefixStore(budget=30_000), PrefixStore(tmp_path, budget="30KB")):
        encoder.prefix_store = store
        encoder.encode(mixed)
        assert store._entries.full
        packed.clear()
        encoder.encode(mixed)
        assert not packed
        assert store.counts.over_budget == 2 * (len(mixed) - len(store))


@pytest.mark.parametrize("level", ["keys_values", "vision"])
def test_a_trainers_autocast_does_not_reach_what_is_kept(checkpoint, mixed, level):
    encoder, other = build(checkpoint), build(checkpoint)
    encoder.prefix_store, other.prefix_store = PrefixStore(level=level), PrefixStore(level=level)
    other.encode(mixed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoder.train()
        encoder(encoder.preprocess(mixed))
    keys = encoder.transformer.prefix_keys(mixed)
    found, expected = encoder.prefix_store._entries.read(keys), other.prefix_store._entries.read(keys)
    assert len(found) == len(expected) > 0
    name = "states" if level == "keys_values" else "features"
    for key in found:
        assert found[key][name].dtype == torch.float32
        assert (found[key][name] - expected[key][name]).abs().max() < 1e-5


def test_a_store_of_keys_and_values_refuses_a_backbone_on_several_devices(encoder):
    encoder.backbone.register_parameter("elsewhere", torch.nn.Parameter(torch.empty(0, device="meta")))
    with pytest.raises(ValueError, match=r'several devices \(cpu, meta\).*level="vision"'):
        encoder.prefix_store = PrefixStore()
    assert encoder.prefix_store is None
    encoder.prefix_store = None


def test_a_store_that_leaves_before_its_batch_is_missed(encoder, images):
    encoder.prefix_store = PrefixStore()
    encoder.encode(images)
    features = encoder.preprocess(images)
    encoder.prefix_store = None
    with pytest.raises(RuntimeError, match="Do not attach or detach a store while a model trains"):
        encoder(features)


def _encode(encoder, folder, inputs, start, results):
    encoder.prefix_store = PrefixStore(folder)
    start.wait()
    embeddings = encoder.encode(inputs, batch_size=4)
    results.put((embeddings.tolist(), encoder.prefix_store.counts.computed))


@needs_fork
def test_processes_that_share_a_folder_compute_each_prefix_once_in_all(checkpoint, tmp_path):
    encoder, pairs = build(checkpoint), toy_pairs()
    inputs = [*pairs.dataset["image"], *pairs.dataset["text"]]
    expected = encoder.encode(inputs)
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(2), context.SimpleQueue()
    job = (_encode, encoder, tmp_path, inputs, start, results)
    with forked(*job), forked(*job):
        outputs = [results.get() for _ in range(2)]
    for embeddings, _ in outputs:
        assert np.abs(np.array(embeddings) - expected).max() < 1e-6
    assert sum(computed for _, computed in outputs) == len(inputs) == 16

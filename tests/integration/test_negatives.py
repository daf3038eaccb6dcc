"""Hard negatives, several positives and a teacher's scores, from images and texts to a trained model."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import (
    DistillKLDivLoss,
    GISTEmbedLoss,
    MarginMSELoss,
    MultipleNegativesRankingLoss,
    TripletDistanceMetric,
    TripletLoss,
)
from sentence_transformers.util import mine_hard_negatives

from slq_embed import SLQEncoder, SymmetricInfoNCELoss, pretrained
from slq_embed.data import DistinctImageBatchSampler, ImageTextPairs, from_records
from slq_embed.generation import build_reranker
from slq_embed.toy import captions, render, sample_scenes
from slq_embed.training import mine_negatives, teacher_scores
from tests.training import arguments

pytest.importorskip("faiss")

SCENES = sample_scenes(24, "train")


@pytest.fixture(scope="module")
def trained() -> SLQEncoder:
    return SLQEncoder(pretrained("slq-tiny"))


@pytest.fixture(scope="module")
def backbone() -> SLQEncoder:
    return SLQEncoder.from_backbone(pretrained("mllm-tiny"), num_queries=4, seed=0)


@pytest.fixture
def model(backbone) -> SLQEncoder:
    return backbone.with_queries(4, seed=0)


@pytest.fixture(scope="module")
def pairs() -> ImageTextPairs:
    return from_records([(str(n), render(scene), captions(scene)[:2]) for n, scene in enumerate(SCENES)])


@pytest.fixture(scope="module")
def mined(trained, pairs) -> ImageTextPairs:
    return mine_negatives(trained, pairs, num_negatives=2)


@pytest.fixture(scope="module")
def scored(backbone, mined) -> ImageTextPairs:
    judge = build_reranker(backbone, instruction="{document}is there {query}?", activation_fn=torch.nn.Sigmoid())
    return teacher_scores(judge, mined.dataset.select(range(8)), batch_size=4)


def number_of(image: Any, known: list[np.ndarray]) -> int:
    return next(n for n, pixels in enumerate(known) if np.array_equal(pixels, np.asarray(image)))


def test_images_that_match_best_become_negatives(trained, pairs, mined):
    """As counted from the whole matrix of cosines."""
    pictures = pairs.dataset["image"][::2]
    known = [np.asarray(image) for image in pictures]
    cosines = trained.similarity(trained.encode(list(pairs.dataset["text"])), trained.encode(list(pictures)))
    assert mined.report() == "nothing was skipped"
    assert mined.dataset[:4]["anchor"] == list(pairs.dataset["text"][:4]), "a batch at once, as the trainer reads it"
    for number, row in enumerate(mined.dataset):
        order = [c for c in cosines[number].argsort(descending=True).tolist() if c != number // 2]
        assert row["anchor"] == pairs.dataset[number]["text"]
        assert number_of(row["positive"], known) == row["label"] == number // 2
        assert [number_of(row[f"negative_{n}"], known) for n in (1, 2)] == order[:2]


def test_images_can_search_texts(trained, pairs):
    own = [set(captions(scene)[:2]) for scene in SCENES]
    formatted = pairs.dataset.with_format("numpy")  # would give arrays in place of images
    found = mine_negatives(trained, formatted, anchor="image", positive="text", num_negatives=3).dataset
    assert len(found) == len(pairs.dataset)
    for row in found:
        assert row["anchor"].size == (64, 64)
        assert row["positive"] in own[row["label"]]
        assert not own[row["label"]] & {row[f"negative_{n}"] for n in (1, 2, 3)}


def test_inputs_of_several_images_search(trained):
    pictures = [[render(scene), render(SCENES[0])] for scene in SCENES[:6]]
    columns = Features({"query": {"images": [Image()], "text": Value("string")}, "text": Value("string")})
    queries = [{"images": several, "text": "now in red"} for several in pictures]
    texts = [captions(scene)[0] for scene in SCENES[:6]]
    rows = Dataset.from_dict({"query": queries, "text": texts}, features=columns)
    found = mine_negatives(trained, rows, anchor="query", positive="text", num_negatives=1, duplicate_score=None)
    order = trained.similarity(trained.encode(queries), trained.encode(texts)).argsort(descending=True).tolist()
    expected = [next(texts[n] for n in row if n != number) for number, row in enumerate(order)]
    assert list(found.dataset["negative_1"]) == expected


@pytest.mark.parametrize("options", [{}, {"relative_margin": 0.05}, {"absolute_margin": 0.1, "range_max": 8}])
def test_texts_get_the_negatives_that_the_host_finds(trained, options):
    texts = Dataset.from_dict(
        {
            "anchor": [captions(scene)[0] for scene in SCENES],
            "positive": [captions(scene)[1] for scene in SCENES],
        }
    )
    host = mine_hard_negatives(
        texts, trained, num_negatives=2, output_format="n-tuple", verbose=False, **{"range_max": 20, **options}
    )
    ours = mine_negatives(
        trained, texts, anchor="anchor", positive="positive", num_negatives=2, duplicate_score=None, **options
    )
    assert list(ours.dataset.remove_columns("label")) == list(host)
    assert len(ours.skipped) == len(texts) - len(host)


def test_equal_images_are_one_candidate_and_bad_ones_are_named(trained, tmp_path):
    for number, scene in enumerate(SCENES[:6]):
        render(scene).save(tmp_path / f"{number}.png")
    (tmp_path / "5.png").write_bytes(b"no image")
    render(SCENES[6]).save(tmp_path / "6.png")
    paths = [str(tmp_path / f"{n}.png") for n in (0, 1, 2, 3, 4, 5)]
    content = [{"bytes": (tmp_path / "6.png").read_bytes(), "path": name} for name in ("a.png", "b.png")]
    texts = [captions(scene)[0] for scene in SCENES[:8]]
    columns = Features({"image": Image(), "text": Value("string")})
    rows = Dataset.from_dict({"image": [*paths, *content], "text": texts}, features=columns)
    found = mine_negatives(trained, rows, num_negatives=4, duplicate_score=None)
    assert [row.name for row in found.skipped] == ["row 5"]
    assert "5.png' is not an image" in found.skipped[0].reason
    for row in found.dataset:
        negatives = [np.asarray(row[f"negative_{n}"].convert("RGB")).tobytes() for n in (1, 2, 3, 4)]
        assert len(set(negatives)) == 4, "an image in two rows with equal bytes is one candidate"


def test_composed_rows_can_be_mined(trained):
    """As load_mmeb_train gives them: an image and a text in each column, either of which may be missing."""
    both = {"image": Image(), "text": Value("string")}
    rows = Dataset.from_list(
        [
            {
                "anchor": {"image": render(scene), "text": "describe it"},
                "positive": {"image": None, "text": captions(scene)[0]},
            }
            for scene in SCENES[:6]
        ],
        Features({"anchor": both, "positive": both}),
    )
    found = mine_negatives(trained, rows, anchor="anchor", positive="positive", num_negatives=2, duplicate_score=None)
    first = found.dataset[0]
    assert first["anchor"]["image"].size == (64, 64)
    assert first["positive"] == {"image": None, "text": captions(SCENES[0])[0]}
    assert first["negative_1"]["text"] in [captions(scene)[0] for scene in SCENES[1:6]]


def train(model: SLQEncoder, dataset: Any, loss: Any, output: Any, **settings: Any) -> list[float]:
    before = model.queries.detach().clone()
    trainer = SentenceTransformerTrainer(model, arguments(output, **settings), train_dataset=dataset, loss=loss)
    trainer.train()
    assert not torch.equal(model.queries, before)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert np.isfinite(losses).all()
    return losses


def test_losses_take_mined_rows_as_they_are(model, mined, tmp_path):
    distinct = {"batch_sampler": DistinctImageBatchSampler, "max_steps": 2}
    train(model, mined.dataset, SymmetricInfoNCELoss(model), tmp_path, **distinct)
    train(model, mined.dataset, MultipleNegativesRankingLoss(model), tmp_path, **distinct)
    triplets = mined.dataset.select_columns(["anchor", "positive", "negative_1"])
    train(model, triplets, TripletLoss(model, TripletDistanceMetric.COSINE, 0.2), tmp_path, max_steps=2)
    again = pickle.loads(pickle.dumps(mined.dataset))  # as a worker gets it
    assert again[0]["negative_1"] == mined.dataset[0]["negative_1"]


def test_hard_negatives_are_seen_by_the_loss(model, pairs, mined, tmp_path):
    """The first step's loss is higher with them than without, and both directions can be trained together."""
    settings = {"batch_sampler": DistinctImageBatchSampler, "max_steps": 1, "learning_rate": 1e-9}
    (hard,) = train(model, mined.dataset, SymmetricInfoNCELoss(model), tmp_path, **settings)
    columns = mined.dataset.select_columns(["anchor", "positive", "label"])
    (easy,) = train(model, columns, SymmetricInfoNCELoss(model), tmp_path, **settings)
    assert hard > easy + 0.1
    both = {"texts": mined.dataset, "images": pairs.dataset}
    train(model, both, SymmetricInfoNCELoss(model), tmp_path, **settings)


def test_siblings_can_be_positives(model, pairs, tmp_path):
    settings = {"batch_sampler": "group_by_label", "max_steps": 1, "learning_rate": 1e-9}
    (several,) = train(model, pairs.dataset, SymmetricInfoNCELoss(model, positives="all"), tmp_path, **settings)
    (own,) = train(model, pairs.dataset, SymmetricInfoNCELoss(model), tmp_path, **settings)
    assert several > own + 0.1, "with siblings as positives, the best softmax is one half for each"


def test_a_guide_finds_false_negatives_in_the_batch(model, trained, pairs, tmp_path):
    settings = {"batch_sampler": DistinctImageBatchSampler, "max_steps": 2}
    before = trained.queries.detach().clone()
    train(model, pairs.dataset, GISTEmbedLoss(model, trained), tmp_path, **settings)
    assert torch.equal(trained.queries, before)


def test_scores_are_the_rerankers(backbone, mined, scored):
    assert scored.dataset.column_names == ["anchor", "positive", "negative_1", "negative_2", "scores"]
    assert len(scored.dataset) == 8
    judge = build_reranker(backbone, instruction="{document}is there {query}?")
    for row in scored.dataset:
        candidates = [row["positive"], row["negative_1"], row["negative_2"]]
        expected = torch.tensor(judge.predict([(row["anchor"], candidate) for candidate in candidates])).sigmoid()
        assert row["scores"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert np.ptp([row["scores"] for row in scored.dataset]) > 0.1


@pytest.mark.parametrize("name", ["listwise", "margins"])
def test_a_models_scores_come_nearer_to_the_teachers(model, scored, tmp_path, name):
    losses = {"listwise": DistillKLDivLoss(model, student_temperature=0.1), "margins": MarginMSELoss(model)}
    settings = {"max_steps": 12, "per_device_train_batch_size": 8}
    history = train(model, scored.dataset, losses[name], tmp_path, **settings)
    assert history[-1] < 0.7 * history[0]


def test_rows_that_a_teacher_cannot_read_are_named(backbone, tmp_path, caplog):
    render(SCENES[0]).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    good, bad = str(tmp_path / "good.png"), str(tmp_path / "bad.png")
    rows = Dataset.from_dict(
        {"text": ["a", "b", None, "d"], "image": [good, bad, good, good], "negative": ["x", "y", "z", "w"]},
        features=Features({"text": Value("string"), "image": Image(), "negative": Value("string")}),
    )
    judge = build_reranker(backbone)
    found = teacher_scores(judge, rows)
    assert [row.name for row in found.skipped] == ["row 1", "row 2"]
    assert "An input is a NoneType" in found.skipped[1].reason
    assert list(found.dataset["text"]) == ["a", "d"]
    assert np.shape(found.dataset["scores"]) == (2, 2)
    assert "2 skipped: row 1" in caplog.text
    with pytest.raises(ValueError, match="No row could be scored: 1 skipped: row 0"):
        teacher_scores(judge, rows.select([1]))
    with pytest.raises(ValueError, match=r"has the columns \['text', 'image'\], but an anchor, a positive"):
        teacher_scores(judge, rows.remove_columns("negative"))
    with pytest.raises(ValueError, match="The rows are streamed, but a teacher scores a Dataset that can be counted"):
        teacher_scores(judge, rows.to_iterable_dataset())

"""Evaluators in the host's trainer and in ``model.evaluate``, for an SLQ model and for a plain Sentence Transformer."""

from __future__ import annotations

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator, SequentialEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from slq_embed import SLQEncoder, SymmetricInfoNCELoss, pretrained
from slq_embed.data import load_mmeb_train
from slq_embed.evaluation import (
    CIRREvaluator,
    FashionIQEvaluator,
    ImageTextRetrievalEvaluator,
    KARRBenchEvaluator,
    MMEBEvaluator,
    MMEBTask,
    ZeroShotClassificationEvaluator,
)
from slq_embed.toy import COLOURS, Scene, Thing, render
from tests import published
from tests.training import toy_pairs, toy_train

KINDS = [Thing(colour, "circle") for colour in list(COLOURS)[:6]]
NAMES = [f"{thing.colour} circle" for thing in KINDS]


@pytest.fixture(scope="module")
def evaluators() -> dict[str, SentenceEvaluator]:
    """Each on pictures of six circles that slq-tiny tells apart."""
    images = [render(Scene("single", thing, detail="big"), seed=0) for thing in KINDS]
    texts = [f"a big {name}" for name in NAMES]
    ahead = [(n + 1) % 6 for n in range(6)]
    changes = [f"make it {KINDS[n].colour}" for n in ahead]
    task = MMEBTask(
        [{"text": text} for text in texts], [{"image": image} for image in images], [[n, ahead[n]] for n in range(6)]
    )
    return {
        "retrieval": ImageTextRetrievalEvaluator(images, texts, range(6), name="retrieval"),
        "karr": KARRBenchEvaluator(images, texts, ["logic"] * 3 + ["functional"] * 3, name="karr"),
        "cirr": CIRREvaluator(images, range(6), changes, ahead, [range(6)] * 6, name="cirr"),
        "fashion": FashionIQEvaluator(
            images,
            ["dress"] * 6,
            range(6),
            [[change, "is a circle"] for change in changes],
            ahead,
            ["dress"] * 6,
            name="fashion",
        ),
        "mmeb": MMEBEvaluator({"GQA": task}, name="mmeb"),
        "zero_shot": ZeroShotClassificationEvaluator(
            images, range(6), NAMES, ["a big {}", "a small {}"], name="zero_shot"
        ),
    }


@pytest.fixture(scope="module")
def model():
    return SLQEncoder(pretrained("slq-tiny"), device="cpu")


@pytest.mark.parametrize("name", ["retrieval", "karr", "cirr", "fashion", "mmeb", "zero_shot"])
def test_a_plain_sentence_transformer_is_measured_alike(model, evaluators, name, tmp_path):
    """It is the same model, loaded without this package's classes."""
    evaluator = evaluators[name]
    metrics = model.evaluate(evaluator, str(tmp_path))
    assert evaluator.greater_is_better
    assert evaluator.primary_metric in metrics
    assert evaluator.primary_metric.startswith(f"{name}_")
    assert all(key.startswith(f"{name}_") for key in metrics)
    assert len(list(tmp_path.glob("**/*_results.csv"))) == 1
    assert evaluator(SentenceTransformer(pretrained("slq-tiny"), device="cpu")) == pytest.approx(metrics)


def test_a_model_that_knows_the_pictures_does_well(model, evaluators):
    assert evaluators["retrieval"](model)["retrieval_mean_recall"] > 0.9
    assert evaluators["karr"](model)["karr_logic_text_to_image_recall@5"] == 1
    assert evaluators["mmeb"](model)["mmeb_mean"] > 0.8
    assert evaluators["zero_shot"](model)["zero_shot_accuracy@1"] > 0.8


def test_the_trainer_chooses_the_best_model_by_any_of_them(encoder, evaluators, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_cirr_recall@5"}
    both = SequentialEvaluator(
        [evaluators["cirr"], evaluators["zero_shot"]], main_score_function=lambda scores: scores[0]
    )
    trainer = toy_train(encoder, toy_pairs(), tmp_path, evaluator=both, **settings)
    measured = [entry for entry in trainer.state.log_history if "eval_cirr_recall@5" in entry]
    assert len(measured) == 2
    assert all("eval_zero_shot_accuracy@1" in entry for entry in measured)
    assert trainer.state.best_metric == max(entry["eval_cirr_recall@5"] for entry in measured)
    encoder.save_pretrained(tmp_path / "saved")
    assert "Zero Shot Classification" in (tmp_path / "saved" / "README.md").read_text("utf8")


@pytest.mark.parametrize("negatives", [False, True])
def test_mmeb_rows_train(encoder, tmp_path, negatives):
    """Images with texts on one side, texts on the other, and a negative where there is one."""
    published.mmeb_train(tmp_path / "data", "OK-VQA", count=5, negatives=negatives)
    pairs = load_mmeb_train(tmp_path / "data", "OK-VQA")
    before = encoder.queries.detach().clone()
    loss = MultipleNegativesRankingLoss(encoder) if negatives else SymmetricInfoNCELoss(encoder)
    toy_train(encoder, pairs, tmp_path / "out", loss=loss, max_steps=1)
    assert (encoder.queries != before).any()

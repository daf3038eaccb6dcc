"""KARR-Bench, CIRR, FashionIQ, MMEB and zero-shot classification: every metric computed by hand."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

from slq_embed.evaluation import (
    MMEB_TASKS,
    CIRREvaluator,
    FashionIQEvaluator,
    KARRBenchEvaluator,
    MMEBEvaluator,
    MMEBTask,
    ZeroShotClassificationEvaluator,
)
from slq_embed.evaluation.mmeb import MMEB_GROUPS, mmeb_means
from tests.unit.evaluation.canned import CannedModel, image


def one_hot(position, size):
    return torch.eye(size)[position].tolist()


def test_karr_bench_as_a_whole_and_by_category(tmp_path):
    """Twelve pairs: the first six queries hit, the next three are at rank 2, the others at the last rank."""
    rows = {(None, n): one_hot(n, 12) for n in range(12)}
    for n in range(12):
        scores = [0.0] * 12
        scores[n] = 1.0
        if n >= 6:
            scores[0] = 2.0
        if n >= 9:
            scores = [3.0] * 12
            scores[n] = 1.0
        rows[f"query {n}", None] = scores
    categories = ["Tool/appliance"] * 8 + ["functional"] * 4
    evaluator = KARRBenchEvaluator(
        [image(n) for n in range(12)], [f"query {n}" for n in range(12)], categories, name="karr"
    )
    metrics = evaluator(CannedModel(rows), str(tmp_path))
    assert metrics["karr_text_to_image_recall@1"] == 6 / 12
    assert metrics["karr_text_to_image_recall@5"] == metrics["karr_text_to_image_recall@10"] == 9 / 12
    assert metrics["karr_tool_appliance_text_to_image_recall@1"] == 6 / 8
    assert metrics["karr_tool_appliance_text_to_image_recall@5"] == 1
    assert metrics["karr_functional_text_to_image_recall@1"] == 0
    assert metrics["karr_functional_text_to_image_recall@10"] == 1 / 4
    # Image 0's column is 1 for its own query, 2 for 6 to 8, and 3 for 9 to 11: rank 7.
    assert metrics["karr_functional_image_to_text_recall@10"] == 1
    assert metrics["karr_image_to_text_recall@1"] == 0
    assert metrics["karr_image_to_text_recall@5"] == 11 / 12
    assert metrics["karr_mean_recall"] == pytest.approx((0.5 + 0.75 + 0.75 + 0 + 11 / 12 + 1) / 6)
    assert evaluator.primary_metric == "karr_mean_recall"
    assert (tmp_path / "karr_bench_karr_results.csv").read_text().count("\n") == 2
    whole = KARRBenchEvaluator([image(n) for n in range(12)], [f"query {n}" for n in range(12)])
    assert set(whole(CannedModel(rows))) == {name[5:] for name in metrics if "tool" not in name and "func" not in name}
    some = KARRBenchEvaluator(whole.images, whole.texts, [None, *categories[1:8], *[None] * 4], name="karr")
    expected = {name: value for name, value in metrics.items() if "functional" not in name}
    expected |= {"karr_tool_appliance_text_to_image_recall@1": 5 / 7, "karr_tool_appliance_image_to_text_recall@5": 1}
    assert some(CannedModel(rows)) == pytest.approx(expected)
    assert some.get_config_dict() == {"pairs": 12, "categories": 1}


@pytest.mark.parametrize(("texts", "categories"), [(["a"], None), (["a", "b"], ["x"]), ([], None)])
def test_karr_bench_needs_one_text_and_one_category_an_image(texts, categories):
    with pytest.raises(ValueError, match="each image needs one text, and one category or none"):
        KARRBenchEvaluator([1, 2][: 2 if texts else 0], texts, categories)


@pytest.fixture
def cirr():
    """Sixty images on a line: query 0 (reference 0) prefers 0, 1, 2, ...; query 1 (reference 5) 59, 58, ..."""
    rows = {(None, n): [float(n)] for n in range(60)}
    rows |= {("more", 0): [-1.0], ("less", 5): [1.0]}
    return CannedModel(rows), {
        "images": [image(n) for n in range(60)],
        "references": [0, 5],
        "texts": ["more", "less"],
        "targets": [1, 7],
        "subsets": [[0, 40, 2, 1, 30], [59, 7, 5, 6, 58]],
        "names": [f"dev-{n}" for n in range(60)],
        "pair_ids": [12063, 7],
    }


def test_cirr_leaves_the_reference_out(cirr):
    """Query 0's target is first once the reference, which scores highest, is removed. Query 1's is at rank 52 of 59."""
    model, data = cirr
    metrics = CIRREvaluator(**data, name="cirr")(model)
    assert [metrics[f"cirr_recall@{k}"] for k in (1, 5, 10, 50)] == [0.5] * 4
    assert [metrics[f"cirr_subset_recall@{k}"] for k in (1, 2, 3)] == [0.5, 0.5, 1]
    assert metrics["cirr_mean_recall"] == 0.5
    assert ("query", ("more", 0)) in model.encoded
    data["targets"] = [1, 11]  # without the reference, 48 images score higher: rank 49
    assert CIRREvaluator(**data)(model)["recall@50"] == 1
    data["targets"] = [1, 9]  # rank 51
    assert CIRREvaluator(**data)(model)["recall@50"] == 0.5
    del data["subsets"]
    assert "subset_recall@1" not in CIRREvaluator(**data)(model)


def test_cirr_writes_what_the_test_server_takes(cirr):
    """A JSON file a metric: 50 names and 3 names a pair, the best first, never the reference."""
    model, data = cirr
    del data["targets"]
    evaluator = CIRREvaluator(**data)
    with pytest.raises(ValueError, match="write the submissions instead"):
        evaluator(model)
    files = evaluator.submissions(model)
    assert list(files) == ["recall", "recall_subset"]
    assert list(files["recall"]) == ["version", "metric", "12063", "7"]
    assert files["recall"]["version"] == "rc2"
    assert files["recall"]["12063"] == [f"dev-{n}" for n in range(1, 51)]
    assert files["recall"]["7"] == [f"dev-{n}" for n in range(59, 9, -1)]
    expected = {"12063": ["dev-1", "dev-2", "dev-30"], "7": ["dev-59", "dev-58", "dev-7"]}
    assert files["recall_subset"] == {"version": "rc2", "metric": "recall_subset"} | expected
    del data["subsets"]
    assert CIRREvaluator(**data).submissions(model) == {"recall": files["recall"]}
    del data["names"]
    with pytest.raises(ValueError, match="A submission needs names and pair_ids"):
        CIRREvaluator(**data).submissions(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": ["one"]}, "Each query needs one of each, but there are other numbers .*references: 2, texts: 1"),
        ({"targets": [1, 60]}, "targets holds 60, but there are 60 images: pass indices from 0 to 59"),
        ({"references": [-1, 2]}, "references holds -1"),
        ({"subsets": [[1], [99]]}, "subsets holds 99"),
        ({"names": ["a"]}, "There are 1 names, but 60 images"),
    ],
)
def test_cirr_refuses_lists_that_do_not_fit(cirr, change, message):
    with pytest.raises(ValueError, match=message):
        CIRREvaluator(**cirr[1] | change)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_indices_and_labels_may_be_arrays_and_tensors(cirr, fashion, kind):
    model, data = cirr
    data["subsets"] = [[0, 40, 2, 1, 30], [59, 7, 5, 6, 58]]
    lists = {name: kind(data[name]) for name in ("references", "targets", "subsets")}
    assert CIRREvaluator(**data | lists)(model) == CIRREvaluator(**data)(model)
    model, data = fashion
    lists = {name: kind(data[name]) for name in ("references", "targets")}
    assert FashionIQEvaluator(**data | lists)(model) == FashionIQEvaluator(**data)(model)
    images = np.zeros((3, 8, 8, 3), np.uint8)
    assert ZeroShotClassificationEvaluator(images, kind([0, 1, 0]), ["x", "y"]).labels.tolist() == [0, 1, 0]
    assert len(KARRBenchEvaluator(images, np.array(["a", "b", "c"])).texts) == 3


@pytest.fixture
def fashion():
    """Sixty dresses and sixty shirts on a line, two queries for dresses and one for shirts."""
    rows = {(None, n): [1.0, float(n % 60)] for n in range(120)}
    # The two orders of a query point to opposite ends; only their sum decides.
    rows |= {("is red, is long", 3): [0.0, 2.0], ("is long, is red", 3): [0.0, -3.0]}  # sum: the lowest first
    rows |= {("new, old", 4): [0.0, 3.0], ("old, new", 4): [0.0, -1.0]}  # the highest first
    rows |= {("a, b", 70): [0.0, 1.0], ("b, a", 70): [0.0, 1.0]}
    return CannedModel(rows), {
        "images": [image(n) for n in range(120)],
        "image_categories": ["dress"] * 60 + ["shirt"] * 60,
        "references": [3, 4, 70],
        "captions": [["is red.", " is long"], ["new", "old?"], ["a", "b"]],
        "targets": [9, 49, 60 + 9],
        "categories": ["dress", "dress", "shirt"],
    }


def test_fashion_iq_adds_both_orders_and_ranks_within_the_category(fashion):
    """Targets are at rank 10, 11 and 51 of their categories."""
    model, data = fashion
    metrics = FashionIQEvaluator(**data, name="fiq")(model)
    assert metrics["fiq_dress_recall@10"] == 0.5
    assert metrics["fiq_dress_recall@50"] == 1
    assert metrics["fiq_shirt_recall@10"] == metrics["fiq_shirt_recall@50"] == 0
    assert metrics["fiq_mean_recall@10"] == 0.25
    assert metrics["fiq_mean_recall@50"] == 0.5
    assert metrics["fiq_mean_recall"] == 0.375
    data["targets"] = [3, 49, 60 + 10]  # the reference of query 0 stays in its ranking, at rank 4
    metrics = FashionIQEvaluator(**data)(model)
    assert (metrics["dress_recall@10"], metrics["shirt_recall@50"]) == (0.5, 1)


def test_fashion_iq_refuses_lists_that_do_not_fit(fashion):
    data = fashion[1]
    with pytest.raises(ValueError, match="Query 2 is of the category 'shirt', but its target of 'dress'"):
        FashionIQEvaluator(**data | {"targets": [9, 49, 9]})
    with pytest.raises(ValueError, match=r"images: 120, image_categories: 1"):
        FashionIQEvaluator(**data | {"image_categories": ["dress"]})
    with pytest.raises(ValueError, match="Query 1 has the captions 'no', but a list of two is needed"):
        FashionIQEvaluator(**data | {"captions": [["new", "old"], "no", ["a", "b"]]})
    with pytest.raises(ValueError, match="references holds 120"):
        FashionIQEvaluator(**data | {"references": [3, 4, 120]})


def mmeb_tasks():
    rows = {(str(n), None): [float(n)] for n in range(6)} | {("<ask>", 0): [1.0], ("ask", 1): [-1.0]}
    queries = [{"image": image(0), "text": "<ask>"}, {"image": image(1), "text": "ask"}]
    candidates = [str(n) for n in range(6)]
    return (
        CannedModel(rows),
        {
            "ImageNet-1K": MMEBTask(queries, candidates, [[5, 1, 2], [5, 1, 2]]),  # right, wrong
            "VOC2007": MMEBTask(queries[:1], candidates, [[1, 5]]),  # wrong, although 5 is not the right one of any row
            "GQA": MMEBTask(queries[:1], candidates, [[4, 3]]),
            "MSCOCO": MMEBTask(queries[1:], candidates, [[2, 2]]),  # equal: the first one counts
        },
    )


def test_mmeb_counts_the_first_candidate_among_the_rows_own():
    model, tasks = mmeb_tasks()
    evaluator = MMEBEvaluator(tasks, name="mmeb")
    metrics = evaluator(model)
    scores = {"ImageNet-1K": 0.5, "VOC2007": 0.0, "GQA": 1.0, "MSCOCO": 1.0}
    assert {name: metrics[f"mmeb_{name}_precision@1"] for name in scores} == scores
    assert metrics["mmeb_classification"] == 0.25
    assert metrics["mmeb_vqa"] == metrics["mmeb_grounding"] == 1
    assert metrics["mmeb_in_distribution"] == 0.5
    assert metrics["mmeb_out_of_distribution"] == 1
    assert metrics["mmeb_mean"] == 2.5 / 4
    assert "mmeb_retrieval" not in metrics
    assert evaluator.primary_metric == "mmeb_mean"
    model.rows = {key: [np.nan] for key in model.rows}
    assert MMEBEvaluator(tasks)(model)["mean"] == 0


def test_each_number_is_below_its_name_where_the_columns_differ(tmp_path):
    """Tasks that are measured one after the other have one file. Its first row was of another task."""
    model, tasks = mmeb_tasks()
    for names in (["GQA"], ["VOC2007"], ["VOC2007", "GQA"]):
        MMEBEvaluator({name: tasks[name] for name in names})(model, str(tmp_path), epoch=len(names))
    with (tmp_path / "mmeb_results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "1", "2"]
    assert [row["GQA_precision@1"] for row in rows] == ["1.0", "", "1.0"]
    assert [row["VOC2007_precision@1"] for row in rows] == ["", "0.0", "0.0"]
    assert [row["mean"] for row in rows] == ["1.0", "0.0", "0.5"]


def test_mmeb_has_36_tasks_and_means_over_tasks():
    """Means by group that VLM2Vec-7B is published with give its published overall mean only when tasks weigh equally."""
    assert len(MMEB_TASKS) == len(set(MMEB_TASKS)) == 36
    assert [sum(map(len, halves.values())) for halves in MMEB_GROUPS.values()] == [10, 10, 12, 4]
    assert sum(len(halves["in_distribution"]) for halves in MMEB_GROUPS.values()) == 20
    published = dict(zip(MMEB_GROUPS, (61.2, 49.9, 67.4, 86.1), strict=True))
    scores = {task: published[g] for g, halves in MMEB_GROUPS.items() for tasks in halves.values() for task in tasks}
    means = mmeb_means(scores)
    assert means["retrieval"] == pytest.approx(67.4)
    assert means["mean"] == pytest.approx(62.9, abs=0.05)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "MMEB has no task .*It has: ImageNet-1K, N24News"),
        ({"ImageNet": MMEBTask(["q"], ["c"], [[0]])}, r"MMEB has no task \['ImageNet'\]"),
        ({"GQA": MMEBTask(["q"], ["c"], [])}, "GQA has 1 queries and 0 rows of candidates"),
        ({"GQA": MMEBTask(["q"], ["c"], [[]])}, "each query needs a row with at least one"),
        ({"GQA": MMEBTask(["q"], ["c"], [[1]])}, "GQA has 1 candidates, but a row of `own` holds other indices"),
    ],
)
def test_mmeb_refuses_what_does_not_fit(tasks, message):
    with pytest.raises(ValueError, match=message):
        MMEBEvaluator(tasks)


def test_classification_averages_the_prompts_of_a_class():
    """The prompts of a class have different lengths: each counts alike. Seven classes, so that top 5 can miss."""
    names = ["cat", "{dog}", "c", "d", "e", "f", "g"]
    rows = {(f"a {name}", None): one_hot(n, 7) for n, name in enumerate(names)}
    rows |= {(f"the {name}!", None): (9 * torch.eye(7)[(n + 1) % 7]).tolist() for n, name in enumerate(names)}
    rows["the g!", None] = one_hot(6, 7)
    # A class points between its own axis and the next one, but the last class along its own. Scores of image 0 (times
    # the root of 2) are 1, 1.5, .5, 0, 0, 0, 0, those of image 3 are -3, -2, .1, .3, .5, .7, .57.
    rows |= {(None, 0): [0.0, 1, 0.5, 0, 0, 0, 0], (None, 3): [-1.0, -2, 0, 0.1, 0.2, 0.3, 0.4]}
    model = CannedModel(rows)

    def measure(labels, **options):
        images = [image(0), image(3)]
        return ZeroShotClassificationEvaluator(images, labels, names, ["a {}", "the {}!"], **options)(model)

    assert measure([1, 1], name="zoo") == {"zoo_accuracy@1": 0.5, "zoo_accuracy@5": 0.5}
    assert measure([4, 5])["accuracy@5"] == 1
    assert measure([5, 5])["accuracy@5"] == 0.5
    assert measure([1, 5])["accuracy@1"] == 1


@pytest.mark.parametrize("labels", [[0, 2], [0], [-1, 0]])
def test_classification_refuses_labels_and_templates_that_do_not_fit(labels):
    with pytest.raises(ValueError, match="Pass for each image the index of its class"):
        ZeroShotClassificationEvaluator([b"a", b"b"], labels, ["x", "y"])
    with pytest.raises(ValueError, match=r"labels has the str 'y'.*class_names\.index\(label\)"):
        ZeroShotClassificationEvaluator([b"a", b"b"], ["y", "x"], ["x", "y"])
    for templates in ("a {}", [], ["no name"]):
        with pytest.raises(ValueError, match=r"a list of texts with \{\} for the name is needed"):
            ZeroShotClassificationEvaluator([b"a", b"b"], [0, 1], ["x", "y"], templates)

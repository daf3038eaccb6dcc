from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from slq_embed.evaluation import (
    CIRREvaluator,
    FashionIQEvaluator,
    ImageTextRetrievalEvaluator,
    KARRBenchEvaluator,
    ZeroShotClassificationEvaluator,
)


class Canned:
    """Gives prepared vectors for images (numbers) and texts."""

    def __init__(self, images, texts):
        self.vectors = {"image": images, "text": texts}
        self.model_card_data = self

    def set_evaluation_metrics(self, *args):
        self.stored = args

    def encode_document(self, inputs, **kwargs):
        return self.vectors["image"]

    def encode_query(self, inputs, **kwargs):
        assert all(set(value) == {"text"} for value in inputs), "texts must go as texts, never as paths"
        return self.vectors["text"]


def test_several_captions_an_image_count_as_in_coco(tmp_path):
    images = torch.eye(3)
    # Image 0 has two captions: one right, one that looks like image 1. Image 2's caption is ranked last.
    texts = torch.tensor([[1.0, 0.1, 0.0], [0.1, 1.0, 0.0], [0.0, 1.0, 0.2], [1.0, 0.9, 0.0]])
    evaluator = ImageTextRetrievalEvaluator([b"a", b"b", b"c"], list("wxyz"), [0, 0, 1, 2], name="toy")
    metrics = evaluator(Canned(images, texts), str(tmp_path), 1, 5)
    assert metrics["toy_text_to_image_recall@1"] == 0.5
    assert metrics["toy_text_to_image_recall@5"] == 1
    assert metrics["toy_image_to_text_recall@1"] == pytest.approx(1 / 3)
    assert evaluator.primary_metric == "toy_mean_recall"
    assert metrics["toy_mean_recall"] == pytest.approx(np.mean([v for k, v in metrics.items() if "recall@" in k]))
    # The texts' images are ranked 1, 2, 1 and 3. The images' best texts are ranked 1, 2 and 4: image 0 has texts 0
    # and 1, and ranks text 3 between them; to image 2, three texts are equal, and its own is the last of them.
    assert metrics["toy_text_to_image_mrr@10"] == pytest.approx((1 + 1 / 2 + 1 + 1 / 3) / 4)
    assert metrics["toy_text_to_image_ndcg@10"] == pytest.approx((1 + 1 / np.log2(3) + 1 + 1 / 2) / 4)
    assert metrics["toy_image_to_text_mrr@10"] == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)
    two_texts = (1 + 1 / 2) / (1 + 1 / np.log2(3))
    assert metrics["toy_image_to_text_ndcg@10"] == pytest.approx((two_texts + 1 / np.log2(3) + 1 / np.log2(5)) / 3)
    evaluator(Canned(images, texts), str(tmp_path), 2, 10)
    lines = (tmp_path / "image_text_retrieval_toy_results.csv").read_text().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("epoch,steps,text_to_image_recall@1")


@pytest.mark.parametrize("image_of", [[0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 3]])
def test_a_mapping_that_does_not_fit_is_refused(image_of):
    with pytest.raises(ValueError, match="Pass the index of its image for each text"):
        ImageTextRetrievalEvaluator([b"a", b"b", b"c"], list("wxyz"), image_of)


def test_indices_may_be_of_any_integer_type_and_one_str_is_no_list():
    for image_of in (np.array([0, 1, 1]), torch.tensor([0, 1, 1]), (0, True, 1)):
        assert ImageTextRetrievalEvaluator([b"a", b"b"], list("xyz"), image_of).image_of.tolist() == [0, 1, 1]
    with pytest.raises(TypeError, match="float"):
        ImageTextRetrievalEvaluator([b"a", b"b"], list("xyz"), [0, 0.5, 1])
    with pytest.raises(ValueError, match="texts is the str 'xyz', but a list"):
        ImageTextRetrievalEvaluator([b"a", b"b"], "xyz", [0, 1, 1])
    with pytest.raises(ValueError, match=r"texts has \['x', 'y'\], but each text is a str.*index of its image"):
        ImageTextRetrievalEvaluator([b"a", b"b"], [["x", "y"], ["z"]], [0, 1])


@pytest.mark.parametrize("images", [["photos/0.png", Path("photos/1.png")], "photos"])
def test_a_path_that_is_a_str_is_refused(images):
    """It would be encoded as a text, and measured as if it were the image."""
    with pytest.raises(ValueError, match=r"images has the str 'photos.*always a text.*pathlib\.Path"):
        ImageTextRetrievalEvaluator(images, ["x", "y"], [0, 1])
    allowed = [Path("photos/0.png"), {"image": "photos/1.png"}]
    assert len(ImageTextRetrievalEvaluator(allowed, ["x", "y"], [0, 1]).images) == 2
    refused = [
        lambda: KARRBenchEvaluator(images, ["x", "y"]),
        lambda: CIRREvaluator(images, [0], ["x"]),
        lambda: FashionIQEvaluator(images, ["a", "a"], [0], [["x", "y"]], [1], ["a"]),
        lambda: ZeroShotClassificationEvaluator(images, [0, 0], ["x"]),
    ]
    for build in refused:
        with pytest.raises(ValueError, match="images has the str"):
            build()

"""Checked by mypy, not run: the public API as a typed program uses it."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from slq_embed import SLQEncoder, SymmetricInfoNCELoss, pretrained
from slq_embed.data import ImageTextPairs, from_folder, load_cirr, load_mmeb_eval, retrieval_set
from slq_embed.evaluation import CIRREvaluator, ImageTextRetrievalEvaluator, MMEBEvaluator
from slq_embed.generation import answer, build_reranker
from slq_embed.training import mine_negatives, teacher_scores


def use(folder: Path, image: Image.Image) -> float | None:
    model: SLQEncoder = SLQEncoder.from_backbone(pretrained("mllm-tiny"), num_queries=8, pooling="mean", form="adapter")
    queries: torch.nn.Parameter = model.queries
    assert queries.shape[0] == len(model.queries)
    loss: SymmetricInfoNCELoss = SymmetricInfoNCELoss(model, 0.07, gather_across_devices=True)
    pairs: ImageTextPairs = from_folder(folder, strict=True)
    evaluator = ImageTextRetrievalEvaluator(*retrieval_set(pairs), name="photos")
    metrics: dict[str, float] = evaluator(model)
    mined: ImageTextPairs = mine_negatives(model, pairs, anchor="image", positive="text", relative_margin=0.05)
    scored: ImageTextPairs = teacher_scores(build_reranker(model), mined, activation_fn=torch.nn.Sigmoid())
    SymmetricInfoNCELoss(model, positives="all")
    assert scored.report()
    metrics |= CIRREvaluator(**vars(load_cirr(folder, limit=10)), embeddings_folder=folder)(model)
    metrics |= MMEBEvaluator(load_mmeb_eval(folder, ["GQA"], limit=10), name="mmeb")(model)
    model.save_pretrained(folder / "slq", form="merged")
    again = SLQEncoder(folder / "slq", backbone=model.backbone)
    build_reranker(again, true_token="Yes", false_token="No").rank("a cat", [image])
    text: str = answer(again, "what is it?", [image], max_new_tokens=16)
    assert text
    return again.temperature if metrics else loss.temperature

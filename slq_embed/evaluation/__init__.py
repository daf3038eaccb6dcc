"""Evaluation: what Sentence Transformers does not have, and models for mteb."""

from slq_embed.evaluation.benchmark import mteb_model
from slq_embed.evaluation.classification import ZeroShotClassificationEvaluator
from slq_embed.evaluation.composed import CIRREvaluator, FashionIQEvaluator
from slq_embed.evaluation.encoding import EvaluatorOptions
from slq_embed.evaluation.karr_bench import KARRBenchEvaluator
from slq_embed.evaluation.mmeb import MMEB_TASKS, MMEBEvaluator, MMEBTask
from slq_embed.evaluation.modality_gap import ModalityGap, measure_modality_gap, project_to_plane
from slq_embed.evaluation.ranking import best_ranks, top_k
from slq_embed.evaluation.retrieval import ImageTextRetrievalEvaluator

__all__ = [
    "MMEB_TASKS",
    "CIRREvaluator",
    "EvaluatorOptions",
    "FashionIQEvaluator",
    "ImageTextRetrievalEvaluator",
    "KARRBenchEvaluator",
    "MMEBEvaluator",
    "MMEBTask",
    "ModalityGap",
    "ZeroShotClassificationEvaluator",
    "best_ranks",
    "measure_modality_gap",
    "mteb_model",
    "project_to_plane",
    "top_k",
]

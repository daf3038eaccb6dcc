"""Evaluation: what the host does not have, and models for mteb."""

from slq_embed.evaluation.benchmark import mteb_model
from slq_embed.evaluation.retrieval import ImageTextRetrievalEvaluator, best_ranks

__all__ = ["ImageTextRetrievalEvaluator", "best_ranks", "mteb_model"]

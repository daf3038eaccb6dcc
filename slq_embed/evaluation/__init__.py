"""Evaluation: what the host does not have, and models for mteb."""

from slq_embed.evaluation.benchmark import mteb_model
from slq_embed.evaluation.ranking import best_ranks, top_k
from slq_embed.evaluation.retrieval import ImageTextRetrievalEvaluator

__all__ = ["ImageTextRetrievalEvaluator", "best_ranks", "mteb_model", "top_k"]

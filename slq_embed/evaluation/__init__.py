"""Evaluators that the host does not have."""

from slq_embed.evaluation.retrieval import ImageTextRetrievalEvaluator, best_ranks

__all__ = ["ImageTextRetrievalEvaluator", "best_ranks"]

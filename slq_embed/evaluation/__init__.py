"""Evaluators that the host does not have."""

from slq_embed.evaluation.retrieval import ImageTextRetrievalEvaluator

__all__ = ["ImageTextRetrievalEvaluator"]

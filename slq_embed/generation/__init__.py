"""Answering and reranking with the backbone that embeds, and with the same copy of its weights."""

from slq_embed.generation.answering import answer
from slq_embed.generation.reranking import RERANK_INSTRUCTION, build_reranker

__all__ = ["RERANK_INSTRUCTION", "answer", "build_reranker"]

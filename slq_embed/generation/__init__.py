"""What the backbone does beside embedding: it answers and reranks, with the same copy of the weights."""

from slq_embed.generation.answering import answer
from slq_embed.generation.reranking import RERANK_INSTRUCTION, build_reranker

__all__ = ["RERANK_INSTRUCTION", "answer", "build_reranker"]

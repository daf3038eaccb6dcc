"""SLQ models in LangChain: texts, images, and both together, as vectors of one space."""

from langchain_slq.embeddings import SLQEmbeddings

__all__ = ["SLQEmbeddings"]

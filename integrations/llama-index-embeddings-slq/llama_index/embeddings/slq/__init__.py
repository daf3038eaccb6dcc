"""SLQ models as embeddings of LlamaIndex."""

from llama_index.embeddings.slq.base import SLQEmbedding

__all__ = ["SLQEmbedding"]

"""A search index of images and texts."""

from slq_embed.index.index import EmbeddingIndex, Hit
from slq_embed.index.inputs import image_files

__all__ = ["EmbeddingIndex", "Hit", "image_files"]

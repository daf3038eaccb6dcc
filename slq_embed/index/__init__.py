"""A search index of images and texts."""

from slq_embed.index.index import EmbeddingIndex
from slq_embed.index.inputs import image_files
from slq_embed.index.table import Hit

__all__ = ["EmbeddingIndex", "Hit", "image_files"]

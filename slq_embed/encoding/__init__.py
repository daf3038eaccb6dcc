"""Encoding: one stream, and what collects it."""

from slq_embed.encoding.protocol import encoder_digest, resolve_prompt
from slq_embed.encoding.stream import EncodedBatch
from slq_embed.encoding.to_file import EncodedFile

__all__ = ["EncodedBatch", "EncodedFile", "encoder_digest", "resolve_prompt"]

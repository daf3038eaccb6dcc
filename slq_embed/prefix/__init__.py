"""Prefixes: what the frozen backbone makes of an input before any query, kept for the next time."""

from slq_embed.prefix.store import PrefixStore

__all__ = ["PrefixStore"]

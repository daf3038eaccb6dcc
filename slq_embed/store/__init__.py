"""The store: prefixes kept for the next time, in memory or in a folder that processes share."""

from slq_embed.store.prefix_store import PrefixStore

__all__ = ["PrefixStore"]

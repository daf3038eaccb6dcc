"""Keeps cached queries apart from cached texts, which LlamaIndex looks up under the same key."""

from __future__ import annotations

from typing import Any

from llama_index.core.storage.kvstore.types import BaseKVStore


class QueryCache:
    """The part of a key-value store that a cache of embeddings needs, in collections of its own.

    Args:
        store: Where entries are kept; a collection ``"embeddings"`` becomes ``"embeddings_query"``.
    """

    def __init__(self, store: BaseKVStore) -> None:
        self._store = store

    def get(self, key: str, collection: str) -> dict[str, Any] | None:
        """Look a query up."""
        return self._store.get(key, collection=f"{collection}_query")

    def put(self, key: str, val: dict[str, Any], collection: str) -> None:
        """Keep a query."""
        self._store.put(key, val, collection=f"{collection}_query")

    async def aget(self, key: str, collection: str) -> dict[str, Any] | None:
        """Look a query up."""
        return await self._store.aget(key, collection=f"{collection}_query")

    async def aput(self, key: str, val: dict[str, Any], collection: str) -> None:
        """Keep a query."""
        await self._store.aput(key, val, collection=f"{collection}_query")

"""Runs an embedding call beside the event loop, without taking all of the loop's threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar
from weakref import WeakKeyDictionary

P = ParamSpec("P")
T = TypeVar("T")

_TURNS: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
_AT_ONCE = 2  # one computes, one reads its input; a model is locked, so more would only wait in a thread


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Await a function that runs in one of the loop's threads, at most two of which are taken at once.

    The host starts all batches of a call together. Each in a thread, they would take every thread of the loop's
    executor, and others (name resolution is one) would wait for the last batch.

    Args:
        function: What to run.
        *args: Its arguments.
        **kwargs: Its arguments.
    """
    async with _TURNS.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(_AT_ONCE)):
        return await asyncio.to_thread(function, *args, **kwargs)

"""Processes that are forked from the one that tests: they start in milliseconds, where importing slq_embed takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked here")


@contextmanager
def forked(work: Callable[..., Any], *args: Any) -> Iterator[BaseProcess]:
    """Run a function in a forked process, and end it with the block."""
    process = multiprocessing.get_context("fork").Process(target=_work, args=(work, args))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def _work(work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # the threads of the parent are not there
    work(*args)

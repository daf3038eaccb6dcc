from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scripts import EXAMPLES


@pytest.fixture
def run_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Call an example's ``main`` in this process; returns what it prints.

    A process of its own would spend 8 s on imports. The working folder is ``tmp_path``, the settings are the small ones.
    """
    monkeypatch.setenv("SLQ_SMOKE", "1")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> str:
        example = importlib.import_module(name)
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a script shows warnings of libraries, and goes on
            example.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run

"""The documentation as built: public names are described, and it needs no network. `make docs` builds it and runs this."""

from __future__ import annotations

import inspect
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import slq_embed
from tests.contract.test_docs import public_modules

SITE = os.environ.get("SITE")
pytestmark = pytest.mark.skipif(SITE is None, reason="no site: make docs builds it and runs this")


@pytest.fixture(scope="module")
def site() -> Path:
    return Path(str(SITE))


def public_names(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Public names of a module and of its classes, with what they stand for."""
    for name in module.__all__:
        if name.startswith("_"):
            continue
        value = getattr(module, name)
        yield name, value
        if inspect.isclass(value):
            for member, attribute in vars(value).items():
                function = getattr(attribute, "fget", None) or getattr(attribute, "__func__", attribute)
                # A second name of a method, such as one that a host asks for, is described under the first.
                if inspect.isfunction(function) and function.__name__ == member and not member.startswith("_"):
                    yield f"{name}.{member}", attribute


def test_every_public_name_is_in_the_reference(site):
    """mkdocstrings lists what it describes in objects.inv, and describes only what has a docstring."""
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    described = {line.split()[0] for line in inventory.splitlines()}
    missing = []
    for module in public_modules():
        for name, value in public_names(module):
            own_path = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
            if f"{module.__name__}.{name}" not in described and own_path not in described:
                missing.append(f"{module.__name__}.{name}")
    assert len(list(public_names(slq_embed))) > 10, "the names are looked for where there are none"
    assert not missing, f"not in the reference: {missing}. Write a docstring; see docs/reference/"


def test_the_site_needs_no_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loads = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?https?://[^\">]+", page.read_text("utf8")
        )
        assert not loads, f"{page.relative_to(site)} loads {loads}"

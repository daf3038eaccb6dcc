"""Links for the reference: the docstrings name other objects as Sphinx does, and mkdocstrings reads Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

LOGGER = griffe.get_logger(__name__)
OWN = ("slq_embed", "langchain_slq", "llama_index.embeddings.slq")
ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Turns ``:class:`~package.Name``` into a link; a name of this package that does not exist is a warning."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite all docstrings of a package."""
        for scope in _objects(pkg):
            if scope.docstring is not None and scope.path.startswith(OWN):
                scope.docstring.value = ROLE.sub(lambda match, scope=scope: _link(match, scope), scope.docstring.value)


def _objects(scope: griffe.Object) -> Iterator[griffe.Object]:
    yield scope
    for member in scope.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _link(match: re.Match[str], scope: griffe.Object) -> str:
    short, name = match[1], match[2]
    text = f"<code>{name.rsplit('.', 1)[-1] if short else name}</code>"
    package = scope.package
    if "." in name and name.split(".")[0] != package.name:
        return text  # of another library
    target = _find(name.removeprefix(f"{package.name}."), package) if "." in name else None
    while target is None and scope is not None:
        target, scope = _find(name, scope), scope.parent
    if target is None:
        LOGGER.warning("A docstring refers to %s, which does not exist", match[0])
        return text
    return f'<autoref optional identifier="{target.canonical_path}">{text}</autoref>'  # where it is in the reference


def _find(name: str, scope: Any) -> Any:
    try:
        return scope[name]
    except KeyError:
        return None

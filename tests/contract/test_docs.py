"""The documentation holds: snippets run and print what the page shows, links lead somewhere, public names are described."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import io
import json
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import slq_embed
import slq_embed.evaluation
from slq_embed.toy import Scene, Thing, captions, render, sample_scenes

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", *sorted((ROOT / "integrations").glob("*/README.md"))]
PAGES = [*READMES, *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(
    r"(?:^<!-- snippet: needs (?P<need>[^>\n]+) -->\n)?^```python\n(?P<code>.*?)^```\n(?:\n*^```text\n(?P<output>.*?)^```$)?",
    flags=re.M | re.S,
)
AVAILABLE = {
    "the hub": False,
    "a server": False,
    "pypdfium2": find_spec("pypdfium2") is not None,
    "torchao": find_spec("torchao") is not None,
    "mteb_model": find_spec("mteb") is not None and hasattr(slq_embed.evaluation, "mteb_model"),
}
"""What a marker may name. A block that needs what is missing is only compiled."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def pages_with_blocks() -> list[Path]:
    return [page for page in PAGES if "```py" in page.read_text("utf8")]


@pytest.fixture(scope="module")
def photos() -> dict[str, bytes]:
    """Files of a folder of images: the first one shows a big red circle."""
    files, rows = {}, []
    scenes = [Scene("single", Thing("red", "circle"), detail="big"), *sample_scenes(69, "train")]
    for number, scene in enumerate(scenes):
        render(scene).save(image := io.BytesIO(), "PNG")
        files[f"{number}.png"] = image.getvalue()
        rows.append(json.dumps({"image": f"{number}.png", "captions": captions(scene)[:2]}))
    return {**files, "captions.jsonl": "\n".join(rows).encode()}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The toy model is so small that handing work to threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", pages_with_blocks(), ids=name_of)
def test_the_blocks_of_a_page_run_and_print_what_it_shows(page, photos, tmp_path, monkeypatch):
    """Blocks of a page build on each other."""
    text = page.read_text("utf8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```py"), "a block is not closed, or does not begin with ```python"
    (tmp_path / "photos").mkdir()
    for name, content in photos.items():
        (tmp_path / "photos" / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        line = text.count("\n", 0, block.start("code"))
        code = re.sub(r"max_steps=\d+", "max_steps=2", block["code"])
        compiled = compile("\n" * line + code, name_of(page), "exec")  # so that errors give the line of the page
        if block["need"] is not None and not AVAILABLE[block["need"]]:
            continue
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()) as printed:
            warnings.simplefilter("ignore")
            exec(compiled, names)
        shown = block["output"] or ""
        assert doctest.OutputChecker().check_output(shown, printed.getvalue(), doctest.ELLIPSIS), (
            f"{name_of(page)}, line {line + 1}: the page shows\n{shown}but the block prints\n{printed.getvalue()}"
        )


@pytest.mark.parametrize("page", pages_with_blocks(), ids=name_of)
def test_the_blocks_of_a_page_import_public_names_only(page):
    public = {module.__name__: set(module.__all__) for module in public_modules()}
    for block in BLOCK.finditer(page.read_text("utf8")):
        if block["need"] == "mteb_model" and not AVAILABLE["mteb_model"]:
            continue
        for node in ast.walk(ast.parse(block["code"])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "slq_embed":
                names = {alias.name for alias in node.names}
                assert names <= public.get(node.module or "", set()), f"{node.module} does not export all of {names}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf8").splitlines()) <= 200


@pytest.mark.parametrize("page", [*READMES, *OTHERS], ids=name_of)
def test_links_to_files_lead_somewhere(page):
    """mkdocs checks the pages in docs/; these stand outside."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text("utf8")):
        path = page.parent / target if target else page
        assert path.exists(), f"{name_of(page)} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(path), f"{name_of(page)} links to {target}#{anchor}: no such heading"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text("utf8")
    commands = {
        target
        for page in [*PAGES, *OTHERS]
        for line in re.findall(r"^make ([a-z -]+)", page.read_text("utf8"), flags=re.M)
        for target in line.split()
    }
    assert {"demo", "test", "docs"} <= commands
    for target in commands:
        assert f"\n{target}:" in makefile, f"make {target} is named, but does not exist"


def public_modules() -> list[ModuleType]:
    """Folders and files at the top of the package that list their public names."""
    package = ROOT / "slq_embed"
    names = [path.parent.name for path in package.glob("*/__init__.py")] + [path.stem for path in package.glob("*.py")]
    modules = [slq_embed, *(importlib.import_module(f"slq_embed.{name}") for name in sorted(names) if name[0] != "_")]
    return [module for module in modules if hasattr(module, "__all__")]


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


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The documentation, built as `make docs` builds it; a warning is an error."""
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


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
    for page in site.rglob("*.html"):
        loads = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?https?://[^\">]+", page.read_text("utf8")
        )
        assert not loads, f"{page.relative_to(site)} loads {loads}"

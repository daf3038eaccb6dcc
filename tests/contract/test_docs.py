"""The documentation holds: snippets run and print what the page shows, and links lead somewhere."""

from __future__ import annotations

import ast
import doctest
import importlib
import io
import re
import shutil
import warnings
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
    "the output of Ray": False,  # tests/integration/test_embed_corpus_ray.py runs it
    "pypdfium2": find_spec("pypdfium2") is not None,
    "torchao": find_spec("torchao") is not None,
    "vector databases": all(map(find_spec, ("lancedb", "pymilvus", "milvus_lite", "qdrant_client"))),
    "mteb_model": find_spec("mteb") is not None and hasattr(slq_embed.evaluation, "mteb_model"),
}
"""What a marker may name. A block that needs what is missing is only compiled."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def pages_with_blocks() -> list[Path]:
    return [page for page in PAGES if "```py" in page.read_text("utf8")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the pages use, made as a reader makes it: by the first block of "Get started"."""
    block = BLOCK.search((ROOT / "docs" / "get-started.md").read_text("utf8"))
    assert block is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("reader"))
        exec(block["code"], {})
    return folder / "photos"


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
    shutil.copytree(photos, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        line = text.count("\n", 0, block.start("code"))
        code = re.sub(r"max_steps=\d+", "max_steps=2", block["code"])
        code = re.sub(r"train_batch_size=\d+", "train_batch_size=8", code)
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


def test_vllm_is_told_the_precision():
    """By default it rounds float32 weights to float16: the comparison on the page would print False."""
    lines = [line for page in PAGES for line in re.findall(r"^vllm serve .*", page.read_text("utf8"), flags=re.M)]
    assert len(lines) == 2
    assert all("--dtype float32" in line for line in lines)


def public_modules() -> list[ModuleType]:
    """Folders and files at the top of the package that list their public names."""
    package = ROOT / "slq_embed"
    names = [path.parent.name for path in package.glob("*/__init__.py")] + [path.stem for path in package.glob("*.py")]
    modules = [slq_embed, *(importlib.import_module(f"slq_embed.{name}") for name in sorted(names) if name[0] != "_")]
    return [module for module in modules if hasattr(module, "__all__")]

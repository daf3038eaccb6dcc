"""Folders with a head or an adapter, where slq_embed is not installed: the same vectors, or an error that says how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from packaging.version import Version
from sentence_transformers import SentenceTransformer

from slq_embed import QueryAdapter, SLQEncoder, pretrained
from tests import checkpoints
from tests.parts import PARTS, SMALL, build, furthest, trained

CASES = {
    f"{form}-{pooling}-16": ("qwen3_vl", form, {"pooling": pooling, "projection": 16})
    for form in ("adapter", "merged")
    for pooling in ("mean", "last", "weighted")
}
CASES |= {f"{form}-weighted": ("internvl", form, {"pooling": "weighted"}) for form in ("adapter", "merged")}
CASES["as wide as the backbone"] = ("qwen3_vl", "adapter", {"projection": 32})
CASES |= {kind: (kind, "adapter", {"projection": 16}) for kind in ("qwen2_vl", "internvl")}
ADAPTERS = {kind: (kind, "adapter", {"query_adapter": SMALL}) for kind in ("qwen3_vl", "fast_vlm")}
ADAPTERS |= {
    "head": ("qwen3_vl", "adapter", {"query_adapter": SMALL, "projection": 16}),
    "tower": ("qwen2_5_vl", "adapter", {"query_adapter": SMALL}),  # whose tower has layers of the same names
    "last": ("internvl", "adapter", {"query_adapter": SMALL, "pooling": "last"}),
    "last-head": ("qwen2_vl", "adapter", {"query_adapter": SMALL, "pooling": "last", "projection": 12}),
    "deep": ("qwen3_vl", "adapter", {"deep_queries": True}),
    "deep-last": ("internvl", "adapter", {"deep_queries": True, "pooling": "last", "projection": 12}),
    "deep-merged": ("qwen2_vl", "merged", {"deep_queries": True}),
    "merged": ("qwen2_5_vl", "merged", {"query_adapter": SMALL}),
    "merged-all": ("qwen3_vl", "merged", PARTS["all"]),
    "all": ("qwen2_5_vl", "adapter", PARTS["all"]),
}
if Version(transformers.__version__) < Version("5.23"):  # refused there
    ADAPTERS = {name: case for name, case in ADAPTERS.items() if "query_adapter" not in case[2]}
HALF = ("heads/adapter-mean-16", "heads/adapter-last-16", "heads/merged-mean-16", "heads/adapter-weighted-16")
HALF += ("adapters/qwen3_vl", "adapters/head", "adapters/last-head", "adapters/all", "adapters/merged-all")
HALF = tuple(name for name in HALF if name.startswith("heads/") or name.removeprefix("adapters/") in ADAPTERS)
SCRIPT = """
import contextlib, io, json, pathlib, re, sys
import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

root = pathlib.Path(sys.argv[1])
half = sys.argv[2:]
rows = json.loads((root / "inputs.json").read_text("utf8"))
inputs = [{key: Image.open(root / value) if key == "image" else value for key, value in row.items()} for row in rows]
inputs = [next(iter(row.values())) if len(row) == 1 else row for row in inputs]
for folder in sorted(root.glob("[ha]*s/*/")):
    trust = {"trust_remote_code": True} if folder.parent.name == "adapters" else {}
    model = SentenceTransformer(str(folder), device="cpu", **trust)
    np.save(folder / "theirs.npy", model.encode(inputs, batch_size=4))
    if folder.name in ("head", "merged-last-16"):
        (snippet,) = re.findall(r"```python\\n(.*?)```", (folder / "README.md").read_text("utf8"), flags=re.S)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(snippet, {})
        (folder / "printed.txt").write_text(printed.getvalue())
    if f"{folder.parent.name}/{folder.name}" in half:
        try:
            model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.bfloat16}, **trust)
            np.save(folder / "half.npy", model.encode(inputs, convert_to_tensor=True).float().numpy())
        except Exception as error:
            (folder / "half.txt").write_text(repr(error))
assert not any(name.startswith("slq_embed") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def elsewhere(checkpoint, images, tmp_path_factory) -> Path:
    """A folder for each case with ``ours.npy`` and what one process that never imports slq_embed makes of it."""
    root = tmp_path_factory.mktemp("elsewhere")
    rows = [{"text": "hello"}, {"text": "a longer text about red circles"}, {"image": "0.png"}, {"image": "1.png"}]
    rows += [{"text": "now in blue", "image": "0.png"}, {"image": "1.png", "text": "larger"}, {"text": ""}]
    (root / "inputs.json").write_text(json.dumps(rows), "utf8")
    for number, image in enumerate(images):
        image.save(root / f"{number}.png")
    inputs = [{key: root / value if key == "image" else value for key, value in row.items()} for row in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checkpoints.TEXT, "num_hidden_layers", 4)
        deep = checkpoints.build(root / "deep", "qwen2_5_vl")
    for group, cases in (("heads", CASES), ("adapters", ADAPTERS)):
        for name, (kind, form, options) in cases.items():
            backbone = deep if name in ("deep", "merged") else checkpoint(kind)
            encoder = trained(SLQEncoder.from_backbone(backbone, num_queries=4, seed=0, device="cpu", **options))
            encoder.save_pretrained(root / group / name, form=form)
            np.save(root / group / name / "ours.npy", encoder.encode(inputs))
    command = [sys.executable, "-c", SCRIPT, str(root), *HALF]
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "code")}  # where the host copies a folder's own code to
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stderr
    return root


@pytest.mark.parametrize("case", CASES)
def test_a_head_needs_nothing_but_sentence_transformers(elsewhere, case):
    folder = elsewhere / "heads" / case
    ours = np.load(folder / "ours.npy")
    assert ours.shape == (7, CASES[case][2].get("projection", 32))
    assert furthest(np.load(folder / "theirs.npy"), ours) < 1e-6


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_needs_its_own_code_and_nothing_more(elsewhere, case):
    folder = elsewhere / "adapters" / case
    ours = np.load(folder / "ours.npy")
    assert furthest(np.load(folder / "theirs.npy"), ours) < 1e-6


@pytest.mark.parametrize("case", ["heads/merged-last-16", *(["adapters/head"] if "head" in ADAPTERS else [])])
def test_the_snippet_of_the_model_card_runs_there(elsewhere, case):
    assert "tensor([[1.0" in (elsewhere / case / "printed.txt").read_text()


def test_the_model_card_of_an_adapter_says_what_loading_it_needs(checkpoint, tmp_path):
    encoder = build(checkpoint, query_adapter=QueryAdapter(rank=2, targets=["q_proj", "o_proj"]))
    encoder.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "slq_query_adapter.py" in card
    assert "no custom code" not in card
    assert "rank 2 on 4 linear layers" in card
    assert "vLLM serves a folder of `slq_embed.saving.export_vllm` right" in card
    assert f"| Parameters trained | {4 * 32 + 4 * 2 * (32 + 32)} |" in card


@pytest.mark.parametrize("case", HALF)
def test_half_precision_works_there_too(elsewhere, case):
    """A backbone is loaded in the precision that it was saved in, and most are saved in bfloat16."""
    folder = elsewhere / case
    assert not (folder / "half.txt").exists(), (folder / "half.txt").read_text()
    assert furthest(np.load(folder / "half.npy"), np.load(folder / "ours.npy")) < 0.15


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("parts", ["adapter", "both", "deep", "all"])
def test_a_stock_load_of_an_adapter_without_trust_is_refused(checkpoint, parts, form, tmp_path):
    build(checkpoint, **PARTS[parts]).save_pretrained(tmp_path, form=form)
    with pytest.raises(ValueError, match=r"trust_remote_code=True"):
        SentenceTransformer(str(tmp_path), device="cpu")


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("parts", PARTS)
def test_the_encoder_itself_needs_no_flag(checkpoint, mixed, parts, form, tmp_path):
    encoder = trained(build(checkpoint, form=form, **PARTS[parts]))
    encoder.save_pretrained(tmp_path)
    again = SLQEncoder(tmp_path, device="cpu")
    assert np.array_equal(again.encode(mixed), encoder.encode(mixed))
    assert again.slq_config.query_adapter == encoder.slq_config.query_adapter


def test_only_the_transformer_of_an_adapter_is_not_a_stock_module(checkpoint, tmp_path):
    build(checkpoint, **PARTS["both"]).save_pretrained(tmp_path)
    first, *others = (module["type"] for module in json.loads((tmp_path / "modules.json").read_text()))
    assert first == "slq_query_adapter.QueryAdapterTransformer"
    assert all(name.startswith("sentence_transformers.") for name in others)
    source = (tmp_path / "slq_query_adapter.py").read_text()
    assert "import slq_embed" not in source
    assert "from slq_embed" not in source
    assert len(source.splitlines()) < 80, "short enough to be read before it is trusted"


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("options", [{}, {"projection": False, "query_adapter": False}])
def test_queries_alone_need_no_class_of_their_own(checkpoint, options, form, tmp_path):
    build(checkpoint, **options).save_pretrained(tmp_path, form=form)
    assert not list(tmp_path.glob("*.py"))
    if form == "adapter":
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "TRAINABLE_TOKENS"


@pytest.mark.parametrize("parts", [{}, *PARTS.values()])
def test_a_newer_format_is_refused(checkpoint, parts, tmp_path):
    build(checkpoint, **parts).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "slq_config.json").read_text())
    (tmp_path / "slq_config.json").write_text(json.dumps(record | {"format_version": 3}))
    with pytest.raises(ValueError, match=r"has format 3, .* reads up to 2\. Upgrade slq-embed"):
        SLQEncoder(tmp_path, device="cpu")


def test_a_folder_of_format_1_is_read():
    record = json.loads((Path(pretrained("slq-tiny")) / "slq_config.json").read_text())
    assert record["format_version"] == 1
    assert not {"projection", "query_adapter"} & record.keys()
    again = SLQEncoder(pretrained("slq-tiny"), device="cpu").slq_config
    assert (again.projection, again.query_adapter) == (None, None)

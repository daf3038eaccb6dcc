"""Every family: what holds on a tiny backbone of its real configuration and processor classes.

The plain run measures two families of each kind of attention, ``make test-slow`` all of them and more of each. With
``SLQ_BACKBONES=FILE`` in the environment, the slow run writes what it measured.
"""

from __future__ import annotations

import json
import os
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

from slq_embed import QueryAdapter, SLQEncoder
from slq_embed.backbone.families import QUIRKS, decoder_of, load_backbone
from tests.families import FAMILIES, REPRESENTATIVES, discrete
from tests.families.building import write
from tests.families.language_models import PREFIX, WHOLE, language_model
from tests.families.limits import FULL, LIMITS, limit
from tests.families.measure import inside, measure
from tests.families.table import PAGE, RESULTS, page_with_table

# Older versions lay these out in other ways, or do not have them.
pytestmark = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="measured with 5.23")


def require_packages(name: str) -> None:
    package = QUIRKS[name].package if name in QUIRKS else None
    if package is not None and find_spec(package) is None:
        pytest.skip(f"needs {package}")


def limits_hold(name: str, differences: dict[str, float | None]) -> None:
    beyond = {key: value for key, value in differences.items() if value is not None and not value <= limit(name, key)}
    assert not beyond, f"{name}: {beyond}"


@pytest.fixture(scope="module")
def written() -> Any:
    """What the slow run measured; goes into the file that the environment names."""
    results: dict[str, Any] = {}
    yield results
    if (path := os.environ.get("SLQ_BACKBONES")) and results:
        before = json.loads(Path(path).read_text("utf8"))["families"] if Path(path).exists() else {}
        families = {name: {**before, **results}[name] for name in FAMILIES if name in {**before, **results}}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        found = {"date": date.today().isoformat(), **versions, "limits": LIMITS, "families": families}
        Path(path).write_text(json.dumps(found, indent=2) + "\n", "utf8")


@pytest.mark.parametrize("name", sorted(REPRESENTATIVES))
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of processors, with NumPy 2
def test_representatives(name, tmp_path, monkeypatch):
    require_packages(name)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "code"))
    result = measure(name, write(tmp_path / "backbone", FAMILIES[name][1]()), tmp_path, full=False)
    assert result["schedule"] == "prefix"
    assert set(result["differences"]) == set(LIMITS) - set(FULL)
    limits_hold(name, result["differences"])


@pytest.mark.parametrize("name", ["glm4v_moe", "gemma3n", "kimi_k25", "llama4", "qwen3_5_moe"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_what_acts_inside_the_layers_finds_its_place(name, tmp_path, monkeypatch):
    """Experts, several streams of states, latents of all positions, a head within, gates of one number: a part of the slow test."""
    require_packages(name)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "code"))
    limits_hold(name, inside(name, write(tmp_path / "backbone", FAMILIES[name][1]()), tmp_path))


def test_images_that_change_with_the_padding_of_a_batch_are_refused(tmp_path):
    """Emu 3: norms and convolutions over a padded image give it other tokens."""
    folder = write(tmp_path, discrete.emu3())
    with pytest.raises(ValueError, match="this emu3: it gives an input other embeddings in a batch than alone"):
        SLQEncoder.from_backbone(folder, num_queries=4, device="cpu")


@pytest.mark.parametrize("name", ["paddleocr_vl", "video_llama_3"])
def test_max_pixels_shrinks_images_of_what_is_built_like_qwen_vl(name, tmp_path):
    folder = write(tmp_path, FAMILIES[name][1]())
    image = Image.new("RGB", (96, 96))

    def tokens(**options: int) -> int:
        encoder = SLQEncoder.from_backbone(folder, num_queries=4, device="cpu", **options)
        return encoder.preprocess([image])["input_ids"].shape[1]

    assert tokens(max_pixels=16 * 16) < tokens()


def test_layers_that_are_narrower_than_the_rank_are_left_out(tmp_path):
    require_packages("gemma3n")
    decoder = decoder_of(load_backbone(str(write(tmp_path, FAMILIES["gemma3n"][1]()))))
    two, eight = ({name.rpartition(".")[2] for name in QueryAdapter(rank=rank).layers(decoder)} for rank in (2, 8))
    assert two - eight == {"correction_coefs", "prediction_coefs", "modality_router"}
    with pytest.raises(ValueError, match="a rank from 1 to 2, the width of the narrowest target"):
        QueryAdapter(rank=8, targets=["q_proj", "correction_coefs"]).layers(decoder)


def test_a_target_that_gets_no_positions_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("slq_embed.modules.query_adapter._OF_ALL_POSITIONS", set())
    folder = write(tmp_path, FAMILIES["kimi_k25"][1]())
    encoder = SLQEncoder.from_backbone(folder, num_queries=4, query_adapter=QueryAdapter(rank=2), device="cpu")
    with pytest.raises(
        ValueError, match=r"target language_model\.layers\.0\.self_attn\.kv_b_proj gets numbers of shape \("
    ):
        encoder.encode(["a", "b"])


def test_targets_that_peft_takes_for_experts_are_named(tmp_path):
    folder = write(tmp_path, language_model("longcat_flash"))
    with pytest.raises(
        ValueError, match=r"It leaves out layers\.0\.\S+, whose name it gives to experts\. Name other targets"
    ):
        SLQEncoder.from_backbone(folder, num_queries=4, query_adapter=QueryAdapter(rank=2), device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_family(name, tmp_path, monkeypatch, written):
    require_packages(name)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "code"))
    kind, build = FAMILIES[name]
    result = measure(name, write(tmp_path / "backbone", build()), tmp_path)
    assert set(result["differences"]) == set(LIMITS)
    written[name] = {"kind": kind, **result}
    assert result["schedule"] == "prefix"
    limits_hold(name, result["differences"])


def test_the_page_counts_the_language_models():
    page = PAGE.read_text("utf8")
    assert f"each of {len(PREFIX) + len(WHOLE)} kinds" in page
    assert f"Of these, {len(PREFIX)} take the schedule `prefix`" in page


def test_the_page_shows_what_was_measured():
    """After a change: measure again, then ``python -m tests.families.table``."""
    results = json.loads(RESULTS.read_text("utf8"))
    assert list(results["families"]) == list(FAMILIES)
    assert results["limits"] == LIMITS
    page = PAGE.read_text("utf8")
    assert page_with_table(page, results) == page
    for name, row in results["families"].items():
        assert row["schedule"] == "prefix"
        assert set(row["differences"]) == set(LIMITS)
        limits_hold(name, row["differences"])

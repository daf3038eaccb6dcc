"""Saving into a folder that holds an earlier save: what is loaded is the later model, and nothing is left of the other."""

from __future__ import annotations

import itertools
from functools import partialmethod
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel

from slq_embed import SLQEncoder
from tests.families import FAMILIES
from tests.families.building import write
from tests.parts import PARTS, build, files, furthest, trained

LOADS_ADAPTERS = Version(transformers.__version__) >= Version("5.23")  # older ones are refused
MODELS = {
    "adapter": {},
    "merged": {"form": "merged"},
    "merged head": {"form": "merged", "projection": 16},
    "last": {"pooling": "last"},
    "all": PARTS["all"],
    "merged adapter": {"form": "merged", **PARTS["adapter"]},
}


def test_the_later_save_is_what_is_loaded(checkpoint, mixed, tmp_path):
    """Every kind after every other one leaves the files of a save into an empty folder; those load as the same model."""
    backbone, name, models = build(checkpoint).backbone, str(checkpoint("qwen3_vl")), {}
    for seed, (kind, options) in enumerate(MODELS.items(), start=1):
        fresh = SLQEncoder.from_backbone(backbone, num_queries=4, seed=seed, backbone_name=name, **options)
        models[kind] = trained(fresh, seed)
        models[kind].save_pretrained(tmp_path / kind)
        expected = models[kind].encode(mixed)
        assert furthest(SLQEncoder(tmp_path / kind, device="cpu").encode(mixed), expected) < 1e-5
        trusted = "query_adapter" in options
        if not trusted or LOADS_ADAPTERS:
            stock = SentenceTransformer(str(tmp_path / kind), device="cpu", trust_remote_code=trusted)
            assert furthest(stock.encode(mixed), expected) < 1e-5
    for first, second in itertools.permutations(MODELS, 2):
        folder = tmp_path / f"{first}, then {second}"
        models[first].save_pretrained(folder)
        models[second].save_pretrained(folder)
        assert files(folder) == files(tmp_path / second), folder.name


def test_a_save_that_fails_leaves_the_earlier_one(checkpoint, mixed, tmp_path, monkeypatch):
    first = trained(build(checkpoint, form="merged"))
    first.save_pretrained(tmp_path)
    before, save = files(tmp_path), PreTrainedModel.save_pretrained
    (tmp_path / ".unfinished-x").mkdir()
    (tmp_path / ".unfinished-x" / "model.safetensors").write_bytes(b"of a save that was killed")

    def fail(self, folder, **options):
        save(self, folder, **options)
        (Path(folder) / "model.safetensors").write_bytes(b"a part")
        raise OSError("No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        trained(build(checkpoint, form="merged"), 2).save_pretrained(tmp_path)
    assert files(tmp_path) == before
    assert furthest(SLQEncoder(tmp_path, device="cpu").encode(mixed), first.encode(mixed)) < 1e-5


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_save_that_ends_between_two_files_gives_no_mixture(checkpoint, mixed, tmp_path, monkeypatch, form):
    """New queries beside the head or the scores of before would give wrong vectors without a word."""
    first = trained(build(checkpoint, form=form, projection=16, pooling="weighted"))
    first.save_pretrained(tmp_path)
    later = trained(first.with_queries(seed=2), 2)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def fail(*args, **options):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(first.processor), "save_pretrained", fail)
        with pytest.raises(OSError, match="No space left"):
            later.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    replace = Path.replace
    for done in (0, 1, 6):
        with monkeypatch.context() as patch:
            calls = iter(range(done))
            patch.setattr(
                Path, "replace", lambda *args, calls=calls: replace(*args) if next(calls, None) is not None else fail()
            )
            with pytest.raises(OSError, match="No space left"):
                later.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"slq_config\.json is damaged, or a save was ended before it was whole"):
            SLQEncoder(tmp_path, device="cpu")
        with pytest.raises(ValueError, match="Expecting value"):
            SentenceTransformer(str(tmp_path), device="cpu")
    later.save_pretrained(tmp_path)
    assert files(tmp_path) == sorted(before)
    assert furthest(SLQEncoder(tmp_path, device="cpu").encode(mixed), later.encode(mixed)) < 1e-5


def test_a_file_is_no_folder_to_save_in(encoder, tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ValueError, match=r"saved as a folder, but .*model is a file\. Give another path"):
        encoder.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


@pytest.mark.parametrize("before", ["in several files", "in one file"])
def test_weights_in_another_number_of_files_are_replaced(checkpoint, mixed, tmp_path, before, monkeypatch):
    size = {"in several files": "20KB", "in one file": "1GB"}
    model, save = trained(build(checkpoint, form="merged")), PreTrainedModel.save_pretrained
    model.backbone.save_pretrained(tmp_path, max_shard_size=size.pop(before))
    monkeypatch.setattr(
        PreTrainedModel, "save_pretrained", partialmethod(save, max_shard_size=size.popitem()[1])
    )  # as it is beyond 50 GB
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() != (tmp_path / "model.safetensors.index.json").exists()
    assert furthest(SLQEncoder(tmp_path, device="cpu").encode(mixed), model.encode(mixed)) < 1e-5


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("parts", [*PARTS, "types"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of a processor, with NumPy 2
def test_what_plain_sentence_transformers_saves_again_is_the_same_model(checkpoint, mixed, parts, form, tmp_path):
    """Or it refuses: of a whole model with an adapter, it would save the adapter alone."""
    if parts == "types":
        backbone = write(tmp_path / "backbone", FAMILIES["paligemma"][1]())
        model, mixed = SLQEncoder.from_backbone(backbone, num_queries=4, seed=0, device="cpu"), ["a", "a b c"]
    else:
        model = trained(build(checkpoint, **PARTS[parts]))
        if model.slq_config.query_adapter is not None and not LOADS_ADAPTERS:
            pytest.skip("older transformers are refused")
    model.save_pretrained(tmp_path / "ours", form=form)
    trust = {"trust_remote_code": not model.slq_config.is_stock, "device": "cpu"}
    loaded = SentenceTransformer(str(tmp_path / "ours"), **trust)
    if form == "merged" and model.slq_config.query_adapter is not None:
        with pytest.raises(ValueError, match="would save the adapter alone"):
            loaded.save_pretrained(str(tmp_path / "theirs"))
        return
    loaded.save_pretrained(str(tmp_path / "theirs"))
    assert furthest(SentenceTransformer(str(tmp_path / "theirs"), **trust).encode(mixed), model.encode(mixed)) < 1e-5


def test_other_files_stay(checkpoint, tmp_path):
    model = build(checkpoint)
    mine = [tmp_path / name for name in ("notes.txt", "2_notes.txt", "3_drafts/first.txt")]
    (tmp_path / "3_drafts").mkdir()
    for path in mine:
        path.write_text("mine")
    (tmp_path / "config.json").write_text("{}")  # of no saved SLQ model
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert all(path.read_text() == "mine" for path in mine)


def test_a_merged_model_on_a_loaded_backbone_is_saved_beside_that(checkpoint, mixed, tmp_path):
    """A merged folder does not know where its backbone is: it holds only the last part of the name."""
    model = build(checkpoint)
    model.save_pretrained(tmp_path / "merged", form="merged")
    again = SLQEncoder(tmp_path / "merged", backbone=model.backbone)
    again.save_pretrained(tmp_path / "adapter", form="adapter")
    loaded = SLQEncoder(tmp_path / "adapter", device="cpu")
    assert loaded.slq_config.backbone == str(checkpoint("qwen3_vl"))
    assert furthest(loaded.encode(mixed), model.encode(mixed)) < 1e-5


def test_the_adapter_form_is_not_written_over_its_backbone(checkpoint, tmp_path):
    build(checkpoint, form="merged").save_pretrained(tmp_path)
    again = SLQEncoder(tmp_path, device="cpu")
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"names its backbone, which is .* itself\. Save to another folder"):
        again.save_pretrained(tmp_path, form="adapter")
    assert files(tmp_path) == before
    again.save_pretrained(tmp_path)
    assert files(tmp_path) == before


def test_a_backbone_without_a_name_is_said_wherever_it_is_saved(checkpoint, tmp_path, monkeypatch):
    model = build(checkpoint)
    model.slq_config.backbone = ""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="built in memory and has no name"):
        model.save_pretrained(".")

"""Building from a backbone: what passes through, what is refused, what people pass in."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoProcessor

import slq_embed
from slq_embed import SLQEncoder, pretrained
from slq_embed.backbone.families import family_of
from slq_embed.prefix.features import lay_out, select_rows
from tests.families import qwen
from tests.families.building import write
from tests.families.language_models import language_model
from tests.parts import offloading

SHA = "0123456789abcdef0123456789abcdef01234567"


def test_the_public_names():
    classes = ["PrefixStore", "QueryAdapter", "SLQEncoder", "SymmetricInfoNCELoss"]
    assert slq_embed.__all__ == [*classes, "__version__", "pretrained"]
    assert issubclass(SLQEncoder, SentenceTransformer)


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    """A hub cache that holds one repository, as a download leaves it."""
    repository = tmp_path / "hub" / "models--org--tiny-vl"
    shutil.copytree(checkpoint(), repository / "snapshots" / SHA)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    return str(tmp_path / "hub")


def test_a_hub_name_is_loaded_and_recorded_with_its_commit(hub, tmp_path):
    encoder = SLQEncoder.from_backbone(
        "org/tiny-vl", num_queries=4, dtype=torch.bfloat16, max_pixels=32 * 32, cache_folder=hub, local_files_only=True
    )
    assert (encoder.slq_config.backbone, encoder.slq_config.revision) == ("org/tiny-vl", SHA)
    assert encoder.backbone.dtype == torch.bfloat16
    encoder.save_pretrained(tmp_path / "slq")
    assert f"org/tiny-vl at revision {SHA}" in (tmp_path / "slq" / "README.md").read_text()
    same = {"model_kwargs": {"dtype": torch.bfloat16}}
    again = SLQEncoder(tmp_path / "slq", cache_folder=hub, local_files_only=True, **same)
    assert np.abs(again.encode(["a"]) - encoder.encode(["a"])).max() < 1e-6
    with pytest.raises(OSError, match=r"was trained on the backbone 'org/tiny-vl'"):
        SLQEncoder(tmp_path / "slq", cache_folder=str(tmp_path / "empty"), local_files_only=True)


def test_options_pass_through(checkpoint):
    encoder = SLQEncoder.from_backbone(
        checkpoint(),
        num_queries=7,
        device="cpu",
        dtype=torch.bfloat16,
        attn_implementation="eager",
        model_kwargs={"low_cpu_mem_usage": True},
        processor_kwargs={"model_max_length": 77},
        prompts={"query": "find"},
        similarity_fn_name="dot",
        truncate_dim=16,
    )
    assert len(encoder.queries) == 7
    assert encoder.backbone.config._attn_implementation == "eager"
    assert encoder.backbone.dtype == torch.bfloat16
    assert encoder.queries.dtype == torch.float32
    assert (encoder.prompts["query"], encoder.similarity_fn_name, encoder.truncate_dim) == ("find", "dot", 16)
    assert encoder.encode("a").shape == (16,)
    assert encoder.get_embedding_dimension() == 16


def test_a_missing_package_of_a_family_is_named(checkpoint, monkeypatch):
    folder = checkpoint("fast_vlm")
    monkeypatch.setitem(sys.modules, "timm", None)  # as where it is not installed
    with pytest.raises(
        ImportError, match=r"'fast_vlm', which needs the package timm, .* pip install 'slq-embed\[timm\]'"
    ):
        SLQEncoder.from_backbone(folder)


def test_a_device_map_is_left_in_charge(checkpoint):
    encoder = SLQEncoder.from_backbone(checkpoint(), num_queries=4, device_map="cpu")
    assert encoder.encode(["a"]).shape == (1, 32)


@pytest.mark.parametrize("parts", [{}, {"projection": 8, "deep_queries": True}], ids=["queries", "more"])
def test_a_backbone_that_is_not_in_memory_trains_and_encodes_the_same(checkpoint, mixed, parts, tmp_path):
    """Half of its layers are on the disk; on GPUs they would be on several."""
    settings = {"num_queries": 4, "seed": 0, **parts}
    results = []
    for place in ({"device": "cpu"}, offloading(tmp_path)):
        encoder = SLQEncoder.from_backbone(checkpoint(), **settings, **place)
        embeddings = encoder.encode(mixed)
        encoder.train()
        encoder(encoder.preprocess(mixed))["sentence_embedding"][:, 0].sum().backward()
        results.append((embeddings, {name: weight.grad for name, weight in encoder.named_parameters()}))
    assert any(weight.is_meta for weight in encoder.backbone.parameters())
    (one, gradients), (other, gradients_of_other) = results
    assert np.array_equal(one, other)
    assert gradients.keys() == gradients_of_other.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0
        assert torch.equal(gradient, gradients_of_other[name])


def test_max_pixels_bounds_the_image(checkpoint, images):
    small = SLQEncoder.from_backbone(checkpoint(), num_queries=4, max_pixels=16 * 16)
    large = SLQEncoder.from_backbone(checkpoint(), num_queries=4)
    sizes = [len(lay_out(model.preprocess([images[1]]))["pixel_values"]) for model in (small, large)]
    assert sizes[0] < sizes[1]
    with pytest.raises(ValueError, match=r"max_pixels=100 does not apply to internvl"):
        SLQEncoder.from_backbone(checkpoint("internvl"), num_queries=4, max_pixels=100)


@pytest.mark.parametrize("build", [qwen.qwen3_5, qwen.qwen3_5_moe, qwen.qwen3_vl_moe, qwen.qwen2_5_omni_thinker])
def test_families_like_qwen_vl_have_this_bound_and_read_a_batch_at_once(build, images, tmp_path, monkeypatch):
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("measured with transformers 5.23")
    folder = write(tmp_path, build())
    small = SLQEncoder.from_backbone(folder, num_queries=4, max_pixels=16 * 16, device="cpu")
    large = SLQEncoder.from_backbone(folder, num_queries=4, device="cpu")
    monkeypatch.setattr("slq_embed.inputs.reader.process_one_by_one", lambda *args: pytest.fail("one by one"))
    sizes = [len(lay_out(model.preprocess([images[1], "a"]))["pixel_values"]) for model in (small, large)]
    assert sizes[0] < sizes[1]


def test_internvl_reads_one_tile_unless_told_otherwise(checkpoint, images):
    encoder = SLQEncoder.from_backbone(checkpoint("internvl"), num_queries=4)
    assert len(lay_out(encoder.preprocess([images[1]]))["pixel_values"]) == 1
    tiled = SLQEncoder.from_backbone(checkpoint("internvl"), num_queries=4, image_kwargs={"crop_to_patches": True})
    assert len(lay_out(tiled.preprocess([images[1]]))["pixel_values"]) > 1
    whole, together = tiled.preprocess(images[:3]), np.stack([tiled.encode(image) for image in images[:3]])
    last = tiled(select_rows(whole, [2, 0]))["sentence_embedding"].detach().numpy()
    assert np.abs(last - together[[2, 0]]).max() < 1e-5


@pytest.mark.parametrize("init", ["normal", "zeros", "tokens"])
def test_initialisations(checkpoint, init):
    queries = [SLQEncoder.from_backbone(checkpoint(), num_queries=50, init=init, seed=s).queries for s in (0, 0, 1)]
    assert torch.equal(queries[0], queries[1])
    assert torch.equal(queries[0], queries[2]) == (init == "zeros")
    if init == "normal":
        assert queries[0].std().item() == pytest.approx(32**-0.5, rel=0.1)


def test_queries_of_ones_own(checkpoint):
    mine = torch.arange(96.0).view(3, 32)
    assert torch.equal(SLQEncoder.from_backbone(checkpoint(), init=mine).queries, mine)
    with pytest.raises(ValueError, match="num_queries is 0"):
        SLQEncoder.from_backbone(checkpoint(), num_queries=0)
    with pytest.raises(ValueError, match="init is 'ones'"):
        SLQEncoder.from_backbone(checkpoint(), init="ones")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.T5Config(), "encoder-decoder"),
        (transformers.MllamaConfig(), "cross-attention"),
        (transformers.IdeficsConfig(), "cross-attention"),
        (transformers.Qwen2_5OmniConfig(), "only the thinker reads: save it alone"),
        (transformers.Blip2Config(), "reads no text without an image"),
        (transformers.InstructBlipConfig(), "reads no text without an image"),
        (transformers.Kosmos2Config(), "reads no text without an image"),
        (transformers.GotOcr2Config(), "reads no text without an image"),
        (transformers.GitConfig(), "puts an image before all tokens of its sequence"),
        (transformers.FuyuConfig(), "writes tokens of its own after every text with an image"),
        (transformers.EvollaConfig(), "reads proteins, through cross-attention"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_an_unsupported_backbone_gets_one_clear_error(config, reason, tmp_path):
    with pytest.raises(
        ValueError, match=rf"{config.model_type}.*{reason}.*Use one of these families: qwen3_vl \(Qwen/"
    ):
        family_of(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        SLQEncoder.from_backbone(tmp_path)


def test_every_form_of_input(encoder, images, tmp_path):
    images[0].save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    same = [images[0], path, {"image": images[0]}, {"image": path}, {"image": str(path)}, {"image": path.read_bytes()}]
    embeddings = encoder.encode(same)
    assert np.abs(embeddings - embeddings[0]).max() < 1e-6
    for value in same:
        assert np.abs(encoder.encode(value) - embeddings[0]).max() < 1e-6
    assert np.abs(encoder.encode("text") - encoder.encode({"text": "text"})).max() < 1e-6
    assert encoder.encode({"text": "t", "image": path}).shape == (32,)
    assert encoder.encode([]).shape == (0,)
    assert encoder.encode(["a", "b"], convert_to_tensor=True).shape == (2, 32)


@pytest.mark.parametrize("image", [Image.new("RGB", (1, 1)), Image.new("RGB", (1, 900)), Image.new("L", (3000, 2000))])
def test_odd_images_encode(encoder, image):
    assert np.isfinite(encoder.encode(image)).all()


def test_a_bad_input_is_named_by_its_index(encoder, images, tmp_path):
    with pytest.raises(ValueError, match=r"Input 1 of 3: There is no image file .*gone\.png"):
        encoder.preprocess([images[0], tmp_path / "gone.png", "text"])
    with pytest.raises(ValueError, match=r"Input 0(?: of 1)?: An input is a float"):
        encoder.encode([0.5], prompt="a prompt must not be lost on the way")


def test_progress_bars_are_the_hosts(encoder, capsys):
    encoder.encode(["a", "b"], show_progress_bar=True)
    assert "Batches" in capsys.readouterr().err


def test_the_embedded_models_load(caplog):
    with caplog.at_level(logging.WARNING):
        retriever = SentenceTransformer(pretrained("slq-tiny"), device="cpu")
    near, far = retriever.similarity(
        retriever.encode(["a red circle"]),
        retriever.encode(["an item with the hue of blood and the outline of a coin", "two green stars"]),
    )[0]
    assert near > far
    processor = AutoProcessor.from_pretrained(pretrained("mllm-tiny"))
    rows = SLQEncoder(pretrained("slq-tiny")).backbone.get_input_embeddings().weight.shape[0]
    assert rows - len(processor.tokenizer) >= 64
    with pytest.raises(ValueError, match=r"No model 'clip' ships.*mllm-tiny, slq-tiny, slq-tiny-head"):
        pretrained("clip")


@pytest.mark.parametrize("name", ["slq-tiny", "slq-tiny-head"])
def test_the_trained_models_share_the_file_of_mllm_tiny(name):
    """What trained them left the backbone alone, so its answers are those of mllm-tiny."""
    before = load_file(f"{pretrained('mllm-tiny')}/model.safetensors")
    where = json.loads(Path(pretrained(name), "model.safetensors.index.json").read_text())["weight_map"]
    assert set(where) == set(before)
    (table,) = (key for key, file in where.items() if file != "../mllm-tiny/model.safetensors")
    assert table.endswith("embed_tokens.weight")
    model = SLQEncoder(pretrained(name), device="cpu")
    after = model.backbone.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if key != table)
    rows = (before[table] != after[table]).any(dim=1).nonzero().flatten().tolist()
    assert rows == list(model.slq_config.tokens.ids)
    assert sum(tensor.nbytes for tensor in before.values()) < 16_000_000
    assert all(tensor.dtype == torch.float32 for tensor in before.values())


def test_the_processor_of_another_encoder_is_refused(encoder):
    with pytest.raises(ValueError, match=r"appends latent queries already.*with_queries"):
        SLQEncoder.from_backbone(encoder.backbone, encoder.processor)


def test_a_backbone_whose_indexer_chooses_what_is_attended_to_runs_by_prefix(tmp_path):
    """GLM 5: some versions of transformers keep positions beside the indexer's keys."""
    folder = write(tmp_path, language_model("glm_moe_dsa"))
    assert SLQEncoder.from_backbone(folder, num_queries=4, device="cpu").transformer.schedule == "prefix"

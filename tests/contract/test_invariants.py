"""The six invariants of the design, each on every family in the table."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from slq_embed import SLQEncoder
from slq_embed.backbone.families import FAMILIES as TABLE
from tests.checkpoints import FAMILIES
from tests.training import toy_pairs, toy_train


def build(checkpoint, kind: str, **options) -> SLQEncoder:
    return SLQEncoder.from_backbone(checkpoint(kind), num_queries=4, seed=0, device="cpu", **options)


def digest(model: torch.nn.Module) -> str:
    whole = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        whole.update(name.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def test_every_family_of_the_table_is_tested():
    assert set(FAMILIES) == set(TABLE)


@pytest.mark.parametrize("kind", FAMILIES)
def test_training_changes_the_queries_and_leaves_the_backbone_bit_equal(checkpoint, kind, tmp_path):
    """1: N x H numbers train; weights and ordinary-token logits are the same bits before and after."""
    encoder = build(checkpoint, kind)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = encoder.backbone(input_ids=ids).logits
    weights, queries = digest(encoder.backbone), encoder.queries.detach().clone()
    settings = encoder.backbone.config.to_dict(), encoder.backbone.generation_config.to_dict()
    assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) == 4 * 32
    toy_train(encoder, toy_pairs(), tmp_path, max_steps=3)
    assert not torch.equal(queries, encoder.queries.detach())
    assert digest(encoder.backbone) == weights
    assert (encoder.backbone.config.to_dict(), encoder.backbone.generation_config.to_dict()) == settings
    with torch.no_grad():
        assert torch.equal(encoder.backbone(input_ids=ids).logits, logits)
    assert not any(parameter.requires_grad for parameter in encoder.backbone.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_an_embedding_depends_on_its_input_alone(checkpoint, mixed, kind, attention):
    """2: not on the batch's size, neighbours, order or padding."""
    encoder = build(checkpoint, kind, attn_implementation=attention)
    together = encoder.encode(mixed)
    alone = np.stack([encoder.encode(value) for value in mixed])
    backwards = encoder.encode(mixed[::-1], batch_size=4)[::-1]
    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(together - backwards).max() < 1e-5
    assert np.abs(together[0] - together[1]).max() > 0.01, "the checkpoint must tell inputs apart"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_prefix_path_equals_all_positions_in_value_and_gradient(checkpoint, mixed, kind, attention):
    """3: the frozen prefix, run once without autograd, changes neither embeddings nor gradients."""
    encoder = build(checkpoint, kind, attn_implementation=attention)
    module = encoder.transformer
    features = module.preprocess(mixed)
    weight = torch.randn(len(mixed), 32, generator=torch.Generator().manual_seed(1))
    embeddings, gradients = [], []
    for states in (module.query_states(module.prefix(features)), module.all_positions(features)):
        module.queries.grad = None
        embedding = torch.nn.functional.normalize(states.mean(dim=1), dim=-1)
        (embedding * weight).sum().backward()
        embeddings.append(embedding.detach())
        gradients.append(module.queries.grad.clone())
    assert (embeddings[0] - embeddings[1]).abs().max() < 1e-6
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()
    assert gradients[1].norm() > 0


STOCK = """
import json, pathlib, sys
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer

root = pathlib.Path(sys.argv[1])
rows = json.loads((root / "inputs.json").read_text("utf8"))
inputs = [{key: Image.open(root / value) if key == "image" else value for key, value in row.items()} for row in rows]
inputs = [next(iter(row.values())) if len(row) == 1 else row for row in inputs]
for folder in sorted(root.glob("*/*/")):
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.tokenizer.padding_side == "left"
    np.save(folder / "together.npy", model.encode(inputs[:7]))
    np.save(folder / "alone.npy", np.stack([model.encode(value) for value in inputs]))
assert not any(name.startswith("slq_embed") for name in sys.modules)

# Here because a Python of its own would import the hosts once more.
import socket
import torch
def refuse(*a, **k): raise AssertionError("a socket was opened, or a GPU was touched")
torch.cuda._lazy_init = torch.cuda.init = socket.socket.connect = socket.create_connection = refuse
import slq_embed, slq_embed.data, slq_embed.evaluation
assert not torch.cuda.is_initialized()
(root / "modules.json").write_text(json.dumps(sorted(sys.modules)))
"""


@pytest.fixture(scope="module")
def stock_results(checkpoint, images, tmp_path_factory) -> Path:
    """A folder for each family with ``ours.npy`` and a saved folder for each form, with what stock loading makes of it.

    One process that never imports slq_embed loads all of them.
    """
    root = tmp_path_factory.mktemp("stock")
    rows: list[dict[str, str]] = [{"text": "hello"}, {"text": "a much longer text about red circles and blue squares"}]
    rows += [{"image": "0.png"}, {"image": "1.png"}]
    rows += [{"text": "now in blue", "image": "0.png"}, {"image": "1.png", "text": "larger"}, {"text": ""}]
    rows += [{"text": "x y " * 4000}, {"text": "x y " * 4000, "image": "2.png"}]
    (root / "inputs.json").write_text(json.dumps(rows), "utf8")
    for number, image in enumerate(images):
        image.save(root / f"{number}.png")
    inputs = [{key: root / value if key == "image" else value for key, value in row.items()} for row in rows]
    for kind in FAMILIES:
        encoder = build(checkpoint, kind, max_text_chars=3000)
        for form in ("adapter", "merged"):
            encoder.save_pretrained(root / kind / form, form=form)
        np.save(root / kind / "ours.npy", encoder.encode(inputs))
    process = subprocess.run([sys.executable, "-c", STOCK, str(root)], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return root


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_stock_loading_gives_the_same_embeddings(stock_results, kind, form):
    """4: for long texts and composed inputs too; none is zero.

    A batch here holds rows of like length: where padding runs to thousands of tokens, the implicit positions of
    stock loading cost plain-RoPE backbones up to 1e-5 of rounding, which the encoder's explicit ones avoid.
    """
    ours = np.load(stock_results / kind / "ours.npy")
    together, alone = (np.load(stock_results / kind / form / f"{name}.npy") for name in ("together", "alone"))
    assert together.shape == (7, 32)
    assert np.abs(together - ours[:7]).max() < 1e-6
    assert np.abs(alone - ours).max() < 1e-6
    assert np.linalg.norm(alone, axis=1).min() > 0.99


@pytest.mark.parametrize("kind", FAMILIES)
def test_text_is_only_ever_text(checkpoint, images, kind, tmp_path):
    """5: never opened as a file or URL, never read as a control token."""
    encoder = build(checkpoint, kind)
    module = encoder.transformer
    images[0].save(tmp_path / "photo.png")
    spelled = module.tokenizer.all_special_tokens + list(module.tokenizer.get_added_vocab())
    expected = module.tokenizer.decode(module.preprocess(["plain"])["input_ids"][0])
    texts = [str(tmp_path / "photo.png"), "https://example.com/a.png", *spelled, " ".join(spelled)]
    for text in texts:
        features = module.preprocess([text])
        assert "media" not in features
        read = module.tokenizer.decode(features["input_ids"][0])
        for token in spelled:
            assert read.count(token) == expected.count(token), f"{text!r} put {token!r} into the sequence"
        ids = features["input_ids"][0].tolist()
        assert not set(ids) & set(encoder.slq_config.tokens.ids)
    assert np.isfinite(encoder.encode(texts)).all()


def test_importing_opens_no_socket_and_touches_no_gpu_or_integration(stock_results):
    """6, in a process that refused both."""
    imported = json.loads((stock_results / "modules.json").read_text())
    assert "slq_embed.evaluation" in imported
    assert not {"langchain_core", "llama_index", "langchain_slq", "faiss"} & set(imported)

"""What holds on a tiny backbone: each invariant of the design with the difference that was measured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoProcessor

from slq_embed import PrefixStore, SLQEncoder
from slq_embed.backbone import check
from slq_embed.backbone.families import load_backbone

LIMITS = {
    "prefix path: value": 1e-5,
    "prefix path: gradient": 1e-4,
    "alone and in a batch": 1e-5,
    "prefix path: value, eager": 1e-5,
    "alone and in a batch, eager": 1e-5,
    "loaded again": 1e-6,
    "plain Sentence Transformers": 1e-5,
    "weights changed by training": 0.0,
    "control tokens from texts": 0.0,
    "plain Sentence Transformers, merged": 1e-5,
    "stored prefixes": 1e-5,
    "bfloat16 refused": 0.0,
}
"""Most that each may be."""
FULL = ("plain Sentence Transformers, merged", "stored prefixes", "bfloat16 refused")
"""Not measured in the plain test run."""

# The processor of PaliGemma spoils texts that stand in a batch with images.
ONE_KIND_A_BATCH = ("paligemma", "paligemma2")
# Its processor gives bfloat16 pixels whatever the model's precision, and the host passes them on.
HALF_ONLY = ("llama4",)


def inputs_for(encoder: SLQEncoder) -> list[Any]:
    """Texts, images of several shapes, and both, short and long."""
    texts: list[Any] = ["hello", "a much longer text about red circles, blue squares and everything else that there is"]
    if not encoder.transformer.reader.reads_images:
        return [*texts, ""]
    rng = np.random.default_rng(0)
    sizes = [(40, 50), (64, 32), (32, 96)]
    images = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
    return [*texts, *images, {"text": "now in blue", "image": images[0]}, {"image": images[1], "text": "larger"}]


def measure(name: str, folder: Path, scratch: Path, full: bool = True) -> dict[str, Any]:
    """Measure everything on one backbone.

    Args:
        name: Of the family.
        folder: Its checkpoint.
        scratch: An empty folder.
        full: Whether to measure what :data:`FULL` names too.

    Returns:
        ``schedule``, ``differences`` by the names of :data:`LIMITS`, and with ``full`` ``seconds`` of the self-check.
    """
    encoder = SLQEncoder.from_backbone(folder, num_queries=4, seed=0, device="cpu")
    inputs = inputs_for(encoder) if full else inputs_for(encoder)[:6]
    found: dict[str, float | None] = {}
    found |= _exact(encoder, inputs)
    found["weights changed by training"] = _trained(encoder, inputs)
    found["control tokens from texts"] = _spelled(encoder)
    again, stock = _saved(name, encoder, inputs, scratch / "adapter")
    found |= {"loaded again": again, "plain Sentence Transformers": stock}
    result = {"schedule": encoder.transformer.schedule, "differences": found}
    if full:
        encoder.slq_config.form = "merged"
        again, stock = _saved(name, encoder, inputs, scratch / "merged")
        found |= {
            "loaded again": max(again, found["loaded again"] or 0.0),
            "plain Sentence Transformers, merged": stock,
        }
        found["stored prefixes"] = _stored(encoder, inputs, scratch)
        half = check(load_backbone(str(folder), dtype=torch.bfloat16), AutoProcessor.from_pretrained(folder))
        found["bfloat16 refused"] = float(half.schedule is None)
        result["seconds"] = round(check(encoder.backbone, AutoProcessor.from_pretrained(folder)).seconds, 1)
    encoder.backbone.set_attn_implementation("eager")
    eager = _exact(encoder, inputs)
    found |= {f"{name}, eager": value for name, value in eager.items() if f"{name}, eager" in LIMITS}
    return result


def _exact(encoder: SLQEncoder, inputs: list[Any]) -> dict[str, float]:
    """The schedules against each other, and each input alone against a batch in another order."""
    value, gradient = _schedules(encoder, inputs)
    alone = np.stack([encoder.encode(one) for one in inputs])
    batches = encoder.encode(inputs[::-1], batch_size=4)[::-1]
    return {
        "prefix path: value": value,
        "prefix path: gradient": gradient,
        "alone and in a batch": _furthest(alone, batches),
    }


def _furthest(first: Any, second: Any) -> float:
    assert np.shape(first) == np.shape(second)
    return float(np.abs(np.asarray(first) - np.asarray(second)).max())


def _schedules(encoder: SLQEncoder, inputs: list[Any]) -> tuple[float, float]:
    """How far the prefix path in a batch is from all positions of each input alone, in value and gradient."""
    module = encoder.transformer
    weights = torch.randn(32, generator=torch.Generator().manual_seed(1))

    def run(batches: list[list[Any]], states: Callable[[Any], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        values, gradient = [], torch.zeros(())
        for batch in batches:
            mean = states(module.preprocess(batch, keyed=False)).mean(dim=1)
            vectors = torch.nn.functional.normalize(mean, dim=-1)
            gradient = gradient + torch.autograd.grad((vectors @ weights).sum(), module.queries)[0]
            values.append(vectors.detach())
        return torch.cat(values), gradient

    ours, ours_gradient = run([inputs], lambda features: module.query_states(module.prefix(features)))
    theirs, theirs_gradient = run([[one] for one in inputs], module.all_positions)
    assert theirs_gradient.norm() > 0
    assert _furthest(theirs[0], theirs[1]) > 0.01, "the checkpoint must tell inputs apart"
    size = float((ours_gradient - theirs_gradient).norm() / theirs_gradient.norm())
    return _furthest(ours, theirs), size


def _digest(model: torch.nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in model.state_dict().items()
    }


def _trained(encoder: SLQEncoder, inputs: list[Any]) -> float:
    """How many tensors of the backbone two steps change; the queries must change."""
    before, queries = _digest(encoder.backbone), encoder.queries.detach().clone()
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert [parameter.shape for parameter in trained] == [queries.shape]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    encoder.train()
    for _ in range(2):
        embeddings = encoder(encoder.preprocess(inputs))["sentence_embedding"]
        (embeddings[0] @ embeddings[1] - embeddings[0] @ embeddings[-1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    encoder.eval()
    assert torch.isfinite(encoder.queries).all()
    assert not torch.equal(queries, encoder.queries.detach())
    after = _digest(encoder.backbone)
    return float(sum(after[name] != value for name, value in before.items()))


def _spelled(encoder: SLQEncoder) -> float:
    """How many control tokens texts that spell them bring into their sequences."""
    tokenizer = encoder.transformer.tokenizer
    controls = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
    ids = set(tokenizer.convert_tokens_to_ids(controls))

    def count(text: str) -> int:
        return sum(number in ids for number in encoder.preprocess([text])["input_ids"][0].tolist())

    plain = count("plain")
    return float(sum(max(0, count(text) - plain) for text in [*controls, " ".join(controls)]))


def _saved(name: str, encoder: SLQEncoder, inputs: list[Any], folder: Path) -> tuple[float, float | None]:
    """How far a saved folder is from the model in memory: loaded again, and in plain Sentence Transformers."""
    expected = encoder.encode(inputs)
    encoder.save_pretrained(folder)
    again = _furthest(SLQEncoder(folder, device="cpu").encode(inputs), expected)
    batches = [inputs[:2], inputs[2:]] if name in ONE_KIND_A_BATCH else [inputs]
    options = {"trust_remote_code": not encoder.slq_config.is_stock, "device": "cpu"}
    if name in HALF_ONLY:
        options["model_kwargs"] = {"dtype": torch.bfloat16}
        expected = SLQEncoder(folder, device="cpu", model_kwargs=options["model_kwargs"]).encode(inputs)
    stock = SentenceTransformer(str(folder), **options)
    encoded = np.concatenate([stock.encode(batch) for batch in batches])
    assert np.linalg.norm(encoded, axis=1).min() > 0.99
    apart = max(_furthest(encoded, expected), _furthest(np.stack([stock.encode(one) for one in inputs]), expected))
    if name in HALF_ONLY:
        assert apart < 0.1, f"{apart} is more than the error of bfloat16"
        return again, None
    return again, apart


def _stored(encoder: SLQEncoder, inputs: list[Any], scratch: Path) -> float | None:
    """How far embeddings from stored keys and values are from others, or None where they cannot be stored."""
    expected = encoder.encode(inputs)
    encoder.prefix_store = PrefixStore(scratch / "store")
    try:
        first = encoder.encode(inputs)
        again = encoder.encode(inputs)
    except ValueError as error:
        if "a store cannot keep" not in str(error):
            raise
        return None
    finally:
        store, encoder.prefix_store = encoder.prefix_store, None
    assert store is not None
    assert store.counts.reused == len(inputs)
    return max(_furthest(first, again), _furthest(first, expected))

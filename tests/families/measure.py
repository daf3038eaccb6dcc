"""What holds on a tiny backbone: each invariant of the design with the difference that was measured."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from transformers import AutoProcessor

from slq_embed import PrefixStore, SLQEncoder
from slq_embed.backbone import check
from slq_embed.backbone.families import load_backbone
from slq_embed.backbone.self_check import examine
from tests.families import FAMILIES
from tests.families.building import without_spare_rows, write
from tests.families.limits import (
    ALONE_ONLY,
    HALF_ONLY,
    LIMITS,
    MERGED_ONLY,
    NOTHING_INSIDE,
    ONE_KIND_A_BATCH,
    WHOLE_ONLY,
)
from tests.parts import PARTS, trained


def inputs_for(encoder: SLQEncoder) -> list[Any]:
    """Texts, images of several shapes, and both, short and long."""
    texts: list[Any] = ["hello", "a much longer text about red circles, blue squares and everything else that there is"]
    if not encoder.transformer.reader.reads_images:
        return [*texts, ""]
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in [(40, 50), (64, 32), (32, 96)]]
    first, second, third, negative = map(Image.fromarray, [*pixels, 255 - pixels[0]])
    # The last two before the third image differ in their pixels only.
    composed = [{"text": "now in blue", "image": first}, {"image": negative, "text": "now in blue"}]
    return [*texts, first, second, *composed, third, {"image": second, "text": "larger"}]


def media_for(encoder: SLQEncoder) -> dict[str, list[Any]]:
    """Inputs of several images, and videos, where the backbone reads them."""
    if not encoder.transformer.reader.reads_images:
        return {}
    rng = np.random.default_rng(1)
    pixels = [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in [(40, 50), (64, 32), (32, 96)]]
    first, second, third = map(Image.fromarray, pixels)
    several = [{"image": [first, second], "text": "a b"}, {"image": [second, first], "text": "a b"}, "hello"]
    found = {"several images": [*several, {"text": "three", "image": [third, first, second]}]}
    if encoder.transformer.reader.reads_videos:
        frames = rng.integers(0, 255, (8, 40, 48, 3), dtype=np.uint8)
        videos = [
            {"array": part, "video_metadata": {"fps": 2.0, "total_num_frames": 8}} for part in (frames, 255 - frames)
        ]
        found["videos"] = [{"video": videos[0]}, {"video": videos[0], "text": "a b"}, {"video": videos[1]}]
    return found


def measure(name: str, folder: Path, scratch: Path, full: bool = True) -> dict[str, Any]:
    """Measure everything on one backbone.

    Args:
        name: Of the family.
        folder: Its checkpoint.
        scratch: An empty folder.
        full: Whether to measure what :data:`tests.families.limits.FULL` names too.

    Returns:
        ``schedule``, ``differences`` by the names of :data:`tests.families.limits.LIMITS`, and with ``full`` ``seconds`` of the self-check.
    """
    logits = _logits(load_backbone(str(folder)))
    encoder = _encoder(name, folder)
    inputs = inputs_for(encoder) if full else inputs_for(encoder)[:6]
    found: dict[str, float | None] = {}
    found |= _exact(encoder, inputs)
    found["weights changed by training"] = _trained(encoder, inputs)
    found["logits changed by training"] = float((logits != _logits(encoder.backbone)).sum())
    found["control tokens from texts"] = _spelled(encoder)
    again, stock = _saved(name, encoder, inputs, scratch / "adapter")
    found |= {"loaded again": again, "plain Sentence Transformers": None if name in MERGED_ONLY else stock}
    result = {"schedule": encoder.transformer.schedule, "differences": found}
    if full:
        found |= dict.fromkeys(("several images", "videos"))
        found |= {key: _media(name, encoder, rows, scratch / "adapter") for key, rows in media_for(encoder).items()}
        encoder.slq_config.form = "merged"
        again, stock = _saved(name, encoder, inputs, scratch / "merged")
        found |= {
            "loaded again": max(again, found["loaded again"] or 0.0),
            "plain Sentence Transformers, merged": stock,
        }
        found["no spare rows"] = _grown(name, inputs[1:3], scratch / "grown")
        found |= inside(name, folder, scratch)
        found["cached loss: gradient"] = _cached(encoder, inputs)
        mixed = [*inputs, *media_for(encoder).get("several images", [])[:2]]
        found["stored prefixes"] = _stored(encoder, mixed, scratch, "keys_values")
        found["stored features of the vision tower"] = _stored(encoder, mixed, scratch, "vision")
        found |= _half(name, folder, inputs[:5], scratch / "half")
        result["seconds"] = round(check(encoder.backbone, AutoProcessor.from_pretrained(folder)).seconds, 1)
    encoder.backbone.set_attn_implementation("eager")
    eager = _exact(encoder, inputs)
    found |= {f"{name}, eager": value for name, value in eager.items()}
    return result


def _encoder(name: str, folder: Path, **options: Any) -> SLQEncoder:
    """An encoder of four queries, in the merged form where the other one is refused."""
    options = {"num_queries": 4, "seed": 0, "device": "cpu", **options}
    if name not in MERGED_ONLY:
        return SLQEncoder.from_backbone(folder, **options)
    with pytest.raises(ValueError, match=MERGED_ONLY[name]):
        SLQEncoder.from_backbone(folder, **options)
    return SLQEncoder.from_backbone(folder, form="merged", **options)


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


def _cached(encoder: SLQEncoder, inputs: list[Any]) -> float:
    """How far the gradient of a loss is that cuts its batch into chunks of two, from that of the same loss in one."""
    columns = (inputs[:4], inputs[-4:]) if len(inputs) > 4 else (inputs, inputs[::-1])
    encoder.train()

    def gradient(loss: torch.nn.Module) -> torch.Tensor:
        encoder.queries.grad = None
        loss([encoder.preprocess(column) for column in columns], None).backward()
        found = encoder.queries.grad
        assert found is not None
        return found.clone()

    plain = gradient(losses.MultipleNegativesRankingLoss(encoder))
    cached = gradient(losses.CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=2))
    encoder.eval()
    assert plain.norm() > 0
    return float((plain - cached).norm() / plain.norm())


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
            parts = torch.autograd.grad((vectors @ weights).sum(), list(module.parameters()))
            gradient = gradient + torch.cat([part.flatten() for part in parts])
            values.append(vectors.detach())
        return torch.cat(values), gradient

    ours, ours_gradient = run([inputs], lambda features: module.query_states(module.prefix(features)))
    theirs, theirs_gradient = run([[one] for one in inputs], module.all_positions)
    assert theirs_gradient.norm() > 0
    _all_differ(theirs)
    size = float((ours_gradient - theirs_gradient).norm() / theirs_gradient.norm())
    return _furthest(ours, theirs), size


def _all_differ(values: Any) -> None:
    apart = {(a, b): _furthest(values[a], values[b]) for b in range(len(values)) for a in range(b)}
    assert min(apart.values()) > 1e-3, f"the checkpoint must tell inputs apart: {apart}"


@torch.no_grad()
def _logits(backbone: Any) -> torch.Tensor:
    """Of a text of ordinary tokens, at each of them."""
    logits: torch.Tensor = backbone(input_ids=torch.arange(5, 25)[None]).logits
    return logits


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


def inside(name: str, folder: Path, scratch: Path) -> dict[str, float | None]:
    """What holds with deep queries and a query adapter: the schedules, and saved folders of both forms, again and plain."""
    key = "deep queries and adapter"
    if name in NOTHING_INSIDE:
        form: Any = "merged" if name in MERGED_ONLY else "adapter"
        with pytest.raises(ValueError, match=NOTHING_INSIDE[name]):
            SLQEncoder.from_backbone(folder, num_queries=4, device="cpu", form=form, **PARTS["all"])
        return {key: None, f"{key}: gradient": None}
    encoder = trained(_encoder(name, folder, **PARTS["all"]), scale=0.05)
    inputs = inputs_for(encoder)[:6]
    value, gradient = _schedules(encoder, inputs)
    adapter = _saved(name, encoder, inputs, scratch / "inside-adapter")
    merged = _saved(name, encoder, inputs, scratch / "inside-merged", form="merged")
    return {
        key: max(found for found in (value, *adapter, *merged) if found is not None),
        f"{key}: gradient": gradient,
    }


def _saved(name: str, encoder: SLQEncoder, inputs: list[Any], folder: Path, **form: Any) -> tuple[float, float | None]:
    """How far a saved folder is from the model in memory: loaded again, and in plain Sentence Transformers."""
    expected = encoder.encode(inputs)
    encoder.save_pretrained(folder, **form)
    again = _furthest(SLQEncoder(folder, device="cpu").encode(inputs), expected)
    if name in HALF_ONLY:
        return again, None
    stock = _stock(encoder, folder)
    whole = [inputs[:2], inputs[2:]] if name in ONE_KIND_A_BATCH else [inputs]
    batches = [[one] for one in inputs] if name in ALONE_ONLY else whole
    encoded = np.concatenate([stock.encode(batch) for batch in batches])
    assert np.linalg.norm(encoded, axis=1).min() > 0.99
    return again, max(_furthest(encoded, expected), _furthest(_alone(stock, inputs), expected))


def _stock(encoder: SLQEncoder, folder: Path, **options: Any) -> SentenceTransformer:
    return SentenceTransformer(
        str(folder), device="cpu", trust_remote_code=not encoder.slq_config.is_stock, model_kwargs=options
    )


def _alone(model: SentenceTransformer, inputs: list[Any]) -> Any:
    return np.stack([model.encode(one) for one in inputs])


def _media(name: str, encoder: SLQEncoder, inputs: list[Any], folder: Path) -> float:
    """How far inputs in a batch are from each alone, from all positions at once, and from plain Sentence Transformers."""
    module, alone = encoder.transformer, _alone(encoder, inputs)
    _all_differ(alone)
    with torch.no_grad():
        states = torch.cat([module.all_positions(module.preprocess([one], keyed=False)) for one in inputs])
    whole = torch.nn.functional.normalize(states.mean(dim=1), dim=-1)
    found = max(_furthest(alone, whole), _furthest(alone, encoder.encode(inputs)))
    return found if name in HALF_ONLY else max(found, _furthest(alone, _alone(_stock(encoder, folder), inputs)))


def _grown(name: str, inputs: list[Any], folder: Path) -> float | None:
    """How far a merged folder is in plain Sentence Transformers, where the table has no row to spare, so that rows are added.

    None where that is refused.
    """
    build = FAMILIES[name][1]
    write(folder / "backbone", without_spare_rows(build()))
    options: dict[str, Any] = {"num_queries": 4, "seed": 0, "device": "cpu", "form": "merged"}
    try:
        encoder = SLQEncoder.from_backbone(folder / "backbone", **options)
    except ValueError as error:
        if "no rows can be added to its table" not in str(error):
            raise
        return None
    encoder.save_pretrained(folder)
    if name in HALF_ONLY:
        inputs = inputs[:1]
    return _furthest(_alone(_stock(encoder, folder), inputs), _alone(encoder, inputs))


def _half(name: str, folder: Path, inputs: list[Any], scratch: Path) -> dict[str, float | None]:
    """In bfloat16: whether the self-check refuses, and 1 - cosine of plain Sentence Transformers and the model in memory."""
    encoder = _encoder(name, folder, dtype=torch.bfloat16)
    refused = encoder.slq_config.schedule is None and examine(encoder.transformer).schedule is None
    expected = _alone(encoder, inputs)
    encoder.save_pretrained(scratch)
    stock = _stock(encoder, scratch, dtype=torch.bfloat16)
    if name in WHOLE_ONLY:
        with pytest.raises(RuntimeError, match=r"same dtype|should be the same"):
            stock.encode(inputs[2])
        inputs, expected = inputs[:2], expected[:2]
    apart = float(1 - (_alone(stock, inputs) * expected).sum(axis=1).min())
    key = "plain Sentence Transformers, bfloat16"
    assert apart < LIMITS[key], apart
    return {"bfloat16 refused": float(refused), key: None if name in WHOLE_ONLY else apart}


def _stored(
    encoder: SLQEncoder, inputs: list[Any], scratch: Path, level: Literal["keys_values", "vision"]
) -> float | None:
    """How far embeddings from a store are from others, or None where nothing can be stored at its level."""
    expected = encoder.encode(inputs)
    try:
        encoder.prefix_store = PrefixStore(scratch / level, level=level)
        first = encoder.encode(inputs)
        again = encoder.encode(inputs)
    except ValueError as error:
        if not re.search("a store cannot keep|cannot be kept", str(error)):
            raise
        return None
    finally:
        store, encoder.prefix_store = encoder.prefix_store, None
    assert store is not None
    assert store.counts.reused == len([one for one in inputs if level == "keys_values" or not isinstance(one, str)])
    return max(_furthest(first, again), _furthest(first, expected))

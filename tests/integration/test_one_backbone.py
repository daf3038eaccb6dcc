"""One backbone, three jobs: what embeds also reranks and answers, with one copy of the weights and none of them touched."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from slq_embed import SLQEncoder, pretrained
from slq_embed.backbone import lock_of
from slq_embed.generation import answer, build_reranker
from slq_embed.serving import embed
from slq_embed.toy import caption, render, sample_scenes
from tests.checkpoints import FAMILIES
from tests.training import toy_pairs, toy_train
from tests.untouched import Untouched, every_pair, load, rerankable


@pytest.fixture
def pairs(images, tmp_path) -> list[tuple[Any, Any]]:
    return every_pair(images, tmp_path)


def generated(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return [out.sequences, torch.stack(out.logits)]


@pytest.mark.parametrize("kind", FAMILIES)
def test_answers_are_those_of_the_untouched_model(checkpoint, images, kind):
    """With no image, one, several of different sizes, and texts between them."""
    untouched, model = Untouched(checkpoint(kind)), load(checkpoint(kind))
    for retrieved, content in (
        ([], ["what is it?"]),
        (images[0], [images[0], "what is it?"]),
        (images[:3], [*images[:3], "what is it?"]),
        (
            ["a heart", images[1], {"text": "a star", "image": images[0]}],
            ["a heart\n", images[1], images[0], "a star\nwhat is it?"],
        ),
    ):
        text = answer(model, "what is it?", retrieved, max_new_tokens=12, do_sample=False)
        assert text == untouched.said(content)


def test_a_question_is_read_to_its_end(checkpoint):
    """What was retrieved is cut as for embedding, and the question is not."""
    untouched, model = Untouched(checkpoint()), load(checkpoint(), max_text_chars=10)
    question = "what is it, if it is neither a red circle nor a blue square?"
    text = answer(model, question, ["two green stars"], max_new_tokens=12, do_sample=False)
    assert text == untouched.said([f"two green \n{question}"])


@pytest.mark.parametrize("kind", FAMILIES)
def test_embedding_reranking_and_training_leave_generation_bit_identical(
    checkpoint, images, mixed, pairs, kind, tmp_path
):
    """And generation leaves embeddings alone: whatever came last, each job is done as if by a fresh model."""
    untouched, model = Untouched(checkpoint(kind)), load(checkpoint(kind))
    asked = [untouched.read([images[0], images[1], "a red circle"]), untouched.read(["two green stars"])]
    expected = [generated(untouched.model, inputs) for inputs in asked]
    embeddings = model.encode(mixed)
    reranker = rerankable(model)
    scores = reranker.predict(pairs)

    def check() -> None:
        for inputs, outputs in zip(asked, expected, strict=True):
            assert all(map(torch.equal, generated(model.backbone, inputs), outputs))
            assert np.array_equal(reranker.predict(pairs), scores)

    check()
    assert np.array_equal(model.encode(mixed), embeddings)
    check()
    answer(model, "what is it?", images, max_new_tokens=4)
    toy_train(model, toy_pairs(), tmp_path, max_steps=2)
    check()
    trained = model.encode(mixed)
    assert np.abs(trained - embeddings).max() > 1e-3
    answer(model, "what is it?", images, max_new_tokens=4)
    assert np.array_equal(model.encode(mixed), trained)


def parameters_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.nn.Parameter) for thing in gc.get_objects())


def test_there_is_one_copy_of_the_weights(encoder, pairs, images):
    addresses = [weight.data_ptr() for weight in encoder.backbone.parameters()]
    before = parameters_alive()
    reranker = rerankable(encoder)
    reranker.predict(pairs)
    answer(encoder, "what is it?", images, max_new_tokens=2)
    assert parameters_alive() == before
    assert not list(reranker.parameters()) + list(reranker.buffers()) + list(reranker.state_dict())
    reranker.half()
    reranker.to("meta")
    assert [weight.data_ptr() for weight in encoder.backbone.parameters()] == addresses
    assert encoder.backbone.dtype == torch.float32
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.backbone.modules())


@pytest.mark.parametrize("kind", FAMILIES)
def test_text_is_only_ever_text(checkpoint, images, kind, monkeypatch):
    """A control token that is spelled in one text, or by two that meet, does not become one."""
    model = load(checkpoint(kind))
    tokenizer = model.tokenizer
    controls = [token for token in tokenizer.get_added_vocab() if token.strip()]

    def structure(ids: torch.Tensor) -> list[int]:
        return [n for n in ids.flatten().tolist() if n in set(tokenizer.get_added_vocab().values())]

    met = rerankable(model, instruction="{query}{document}")
    plain = structure(met.preprocess([("x", "y")], prompt="p")["input_ids"])
    for token in controls:
        for pair in ((token, "y"), ("x", token), (token[:1], token[1:])):
            assert structure(met.preprocess([pair], prompt=token)["input_ids"]) == plain, f"{pair} changed the turn"
    seen = []
    monkeypatch.setattr(model.backbone, "generate", lambda **kw: seen.append(kw["input_ids"]) or kw["input_ids"])
    answer(model, "x", ["y", images[0], "z"])
    spelled = " ".join(controls)
    answer(model, spelled, [spelled, images[0], spelled])
    assert structure(seen[0]) == structure(seen[1])


def test_the_backbones_own_template_is_found_or_asked_for(checkpoint, encoder, images, tmp_path):
    own = AutoProcessor.from_pretrained(checkpoint())
    expected = answer(encoder, "what is it?", images, max_new_tokens=8, do_sample=False)
    encoder.save_pretrained(tmp_path / "adapter")
    encoder.save_pretrained(tmp_path / "merged", form="merged")
    adapter, merged = (SLQEncoder(tmp_path / form, device="cpu") for form in ("adapter", "merged"))
    assert answer(adapter, "what is it?", images, max_new_tokens=8, do_sample=False) == expected
    for work in (rerankable, lambda model: answer(model, "what is it?")):
        with pytest.raises(ValueError, match=r"ends with query tokens\. Pass the backbone's own processor"):
            work(merged)
    assert answer(merged, "what is it?", images, max_new_tokens=8, do_sample=False, processor=own) == expected
    own.chat_template = None
    with pytest.raises(ValueError, match=r"is empty\. Pass"):
        rerankable(encoder, processor=own)
    encoder.slq_config.backbone = str(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"no processor can be loaded from .*gone"):
        rerankable(encoder)


def test_threads_embed_rerank_and_answer_at_once(encoder, mixed, pairs, images):
    """Whoever holds the backbone's lock is waited for, and everyone gets what is theirs."""
    reranker = rerankable(encoder)
    jobs: list[Callable[[], Any]] = [
        lambda: embed(encoder, mixed),
        lambda: reranker.predict(pairs),
        lambda: reranker[0](dict(features))["causal_logits"].numpy(),
        lambda: answer(encoder, "what is it?", images[:1], max_new_tokens=8, do_sample=False),
        lambda: answer(encoder, "what is it?", images, max_new_tokens=8, do_sample=False),
    ]
    features = reranker.preprocess(pairs)
    expected = [job() for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        with lock_of(encoder.backbone):
            running = [pool.submit(job) for job in jobs]
            assert not wait(running, timeout=1).done
        running += [pool.submit(job) for job in jobs * 3]
        for number, job in enumerate(running):
            result = expected[number % len(jobs)]
            if isinstance(result, str):
                assert job.result() == result
            else:
                assert np.abs(job.result() - result).max() < 1e-5


def test_the_embedded_model_retrieves_reranks_and_answers():
    """Reranking ten candidates, measured by how many of the first three are right, helps by about a fifth."""
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    processor = AutoProcessor.from_pretrained(pretrained("mllm-tiny"))
    scenes = sample_scenes(100, "test")
    images = [render(scene, 7) for scene in scenes]
    reranker = build_reranker(model, instruction="{document}is there {query}?", processor=processor)
    embeddings = model.encode(images)
    before, after, described = 0.0, 0.0, 0
    for scene in scenes[:8]:
        thing = scene.first
        query = f"{'an' if thing.colour == 'orange' else 'a'} {thing.colour} {thing.shape}"
        nearest = model.similarity(model.encode(query), embeddings)[0].topk(10).indices.tolist()
        ranked = [nearest[row["corpus_id"]] for row in reranker.rank(query, [images[n] for n in nearest])]
        relevant = [thing in (other.first, other.second) for other in scenes]
        before += sum(relevant[n] for n in nearest[:3]) / 24
        after += sum(relevant[n] for n in ranked[:3]) / 24
        text = answer(model, "describe the image.", images[ranked[0]], processor=processor, do_sample=False)
        described += text == caption(scenes[ranked[0]])
    assert after > before + 0.1, (before, after)
    assert described >= 7

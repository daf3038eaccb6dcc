"""Make `mllm-tiny`, the tiny multimodal LLM that ships with slq-embed: Qwen3-VL architecture, 3.5 M parameters.

    python examples/pretrain_mllm_tiny.py --output slq_embed/toy/checkpoints/mllm-tiny

Hardware: 2 CPU cores, about half an hour. All data is generated (slq_embed.toy.scenes). Two stages: the vision
tower alone learns what stands in each cell of a picture (without this, shapes are learned very slowly), then
everything learns to answer. Expected output: the share of held-out scenes it describes exactly, 75 % or more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from slq_embed.toy import (
    COLOURS,
    DESCRIBE,
    RESTATE,
    SHAPES,
    Scene,
    Thing,
    caption,
    captions,
    draw,
    facts,
    implicit,
    questions,
    sample_scenes,
)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL_TOKENS += ["<|image_pad|>", "<|video_pad|>"]
TABLE_ROWS = 1152  # more than the tokenizer uses: the rest is free for latent queries
PATCH, CELLS = 8, 16  # pixels a patch; visual tokens a picture (patches merged two by two)
DIALOGUES, TEXTS, VISION_BATCH = 24, 14, 64  # sequences a step over all processes; pictures a step of stage one
CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""

Turn = tuple[str, str]


def build_processor() -> Qwen3VLProcessor:
    """A byte-level BPE of the generator's own words, and an image processor fixed at 64 x 64 pixels."""
    corpus = [text for turn in facts() for text in turn] + list(DESCRIBE) + list(RESTATE)
    rng = Random(0)
    for scene in sample_scenes(4000, "train"):
        corpus += [*captions(scene), implicit(scene), *(text for turn in questions(scene, rng) for text in turn)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet))
    table = bpe.get_vocab()
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=table, merges=merges, model_max_length=2048, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS[1:]})
    tokenizer.eos_token = "<|im_end|>"  # as in Qwen's chat models: where an answer ends
    pixels = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}
    sizes = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2, "size": pixels}
    image = Qwen2VLImageProcessor(**sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    video = Qwen3VLVideoProcessor(patch_size=PATCH, temporal_patch_size=2, merge_size=2)
    return Qwen3VLProcessor(image, tokenizer, video, chat_template=CHAT_TEMPLATE)


def build_model(processor: Qwen3VLProcessor) -> Qwen3VLForConditionalGeneration:
    """Qwen3-VL with random weights at toy size."""
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": TABLE_ROWS,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": PATCH,
        "out_hidden_size": 192,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [2],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


def cell_labels(things: list[tuple[Thing, float, float, float]]) -> list[tuple[int, int]]:
    """Colour and shape in each of the 4 x 4 cells; 0 stands for the ground."""
    labels = []
    for row in range(4):
        for column in range(4):
            label, most = (0, 0), 0.15
            for thing, x, y, radius in things:
                wide = min(x + radius, 16 * column + 16) - max(x - radius, 16 * column)
                high = min(y + radius, 16 * row + 16) - max(y - radius, 16 * row)
                share = max(wide, 0) * max(high, 0) / 256
                if share > most:
                    label, most = (1 + list(COLOURS).index(thing.colour), 1 + SHAPES.index(thing.shape)), share
            labels.append(label)
    return labels


def picture_turns(scene: Scene, rng: Random) -> list[Turn]:
    """A description and three questions; more often than not the description comes first."""
    turns = rng.sample(questions(scene, rng), 3)
    turns.insert(0 if rng.random() < 0.6 else rng.randrange(4), (rng.choice(DESCRIBE), caption(scene)))
    return turns


def text_turns(scene: Scene, rng: Random, known: list[Turn]) -> list[Turn]:
    """A text restated as the canonical caption, and plain knowledge."""
    text = implicit(scene, rng.randrange(10**6)) if rng.random() < 0.75 else rng.choice(captions(scene))
    return [(f"{text} {rng.choice(RESTATE)}".strip(), caption(scene)), *rng.sample(known, 2)]


class Trainee(nn.Module):
    """The model with two thrown-away heads that read each cell's colour and shape off the visual tokens."""

    def __init__(self, model: Qwen3VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.Linear(192, (len(COLOURS) + 1) + (len(SHAPES) + 1))

    def dense_loss(self, visual_tokens: Tensor, cells: Tensor) -> Tensor:
        colour, shape = self.heads(visual_tokens).split([len(COLOURS) + 1, len(SHAPES) + 1], dim=-1)
        cross_entropy = nn.functional.cross_entropy
        return cross_entropy(colour.float(), cells[:, 0]) + cross_entropy(shape.float(), cells[:, 1])

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        cells, labels = batch["cells"], batch.get("labels")
        if labels is None:
            return self.dense_loss(self.model.model.visual(batch["pixel_values"], batch["grid"]).pooler_output, cells)
        visual_tokens: list[Tensor] = []
        hook = self.model.model.visual.register_forward_hook(lambda *call: visual_tokens.append(call[2].pooler_output))
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values")}
        hidden = self.model.model(**inputs, image_grid_thw=batch["grid"]).last_hidden_state
        hook.remove()
        target = labels[:, 1:] != -100
        logits = self.model.lm_head(hidden[:, :-1][target])
        loss = nn.functional.cross_entropy(logits.float(), labels[:, 1:][target])
        return loss + 0.1 * self.dense_loss(visual_tokens[0], cells)


class Batches:
    """Fresh random batches of one process; every picture is drawn anew."""

    def __init__(self, processor: Qwen3VLProcessor, share: int, seed: int) -> None:
        self.processor, self.share, self.rng = processor, share, Random(seed)
        self.pools = [sample_scenes(n, "train", weights=w) for n, w in ((126, (1, 0, 0, 0)), (190, (0, 1, 0, 0)))]
        self.pools += [sample_scenes(11_000, "train", weights=w) for w in ((0, 0, 1, 0), (0, 0, 0, 1))]
        self.known = facts()

    def scenes(self, count: int) -> list[Scene]:
        pools = self.rng.choices(self.pools, weights=(0.08, 0.12, 0.45, 0.35), k=count)
        return [self.rng.choice(pool) for pool in pools]

    def pictures(self, scenes: list[Scene]) -> dict[str, Tensor]:
        pictures = [draw(scene, self.rng.randrange(10**9)) for scene in scenes]
        pixels = self.processor.image_processor([image for image, _ in pictures], return_tensors="pt")
        cells = torch.tensor([label for _, things in pictures for label in cell_labels(things)])
        return {"pixel_values": pixels["pixel_values"], "grid": pixels["image_grid_thw"], "cells": cells}

    def vision(self) -> dict[str, Tensor]:
        return self.pictures(self.scenes(VISION_BATCH // self.share))

    def everything(self) -> dict[str, Tensor]:
        with_picture = self.scenes(DIALOGUES // self.share)
        rows = [self.encode(picture_turns(scene, self.rng), image=True) for scene in with_picture]
        text_alone = self.scenes(TEXTS // self.share)
        rows += [self.encode(text_turns(scene, self.rng, self.known), image=False) for scene in text_alone]
        width = max(len(ids) for ids, _ in rows)
        pad = self.processor.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in rows])
        labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows])
        kinds = (ids == self.processor.image_token_id).int()
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": mask,
            "mm_token_type_ids": kinds,
            **self.pictures(with_picture),
        }

    def encode(self, turns: list[Turn], image: bool) -> tuple[list[int], list[int]]:
        tokenizer, ids, labels = self.processor.tokenizer, [], []
        for number, (question, answer) in enumerate(turns):
            visual = f"<|vision_start|>{'<|image_pad|>' * CELLS}<|vision_end|>" if image and number == 0 else ""
            prompt = f"<|im_start|>user\n{visual}{question}<|im_end|>\n<|im_start|>assistant\n"
            before = tokenizer(prompt).input_ids
            after = tokenizer(f"{answer}<|im_end|>").input_ids
            end = tokenizer("\n").input_ids
            ids += before + after + end
            labels += [-100] * len(before) + after + [-100] * len(end)
        return ids, labels


@torch.inference_mode()
def describe(model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, scenes: list[Scene]) -> list[str]:
    """What the model says of each scene, greedily."""
    content = [{"type": "image"}, {"type": "text", "text": DESCRIBE[0]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    descriptions: list[str] = []
    for start in range(0, len(scenes), 50):
        images = [[draw(scene, seed=7)[0]] for scene in scenes[start : start + 50]]
        inputs = processor(text=[prompt] * len(images), images=images, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        descriptions += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    return descriptions


def run_stage(trainee: nn.Module, batches: Batches, stage: str, steps: int, lr: float, chatty: bool) -> None:
    """AdamW with warm-up and cosine decay; the vision tower learns at half the rate in stage two."""
    step_of = batches.vision if stage == "vision" else batches.everything
    vision = [p for n, p in trainee.named_parameters() if ".visual." in n]
    rest = [p for n, p in trainee.named_parameters() if ".visual." not in n]
    groups = [{"params": vision, "lr": lr * (1.0 if stage == "vision" else 0.5)}, {"params": rest, "lr": lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)
    warm = 60
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.02 + 0.98 * (1 + math.cos(math.pi * i / steps)) / 2)
    )
    started, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = trainee(step_of())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if chatty and step % 50 == 0:
            seconds = time.perf_counter() - started
            print(f"{stage} {step}/{steps} loss {sum(losses[-50:]) / 50:.3f} {seconds:.0f} s", flush=True)


def worker(rank: int, world: int, args: argparse.Namespace) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    processor = build_processor()
    trainee = Trainee(build_model(processor))
    batches = Batches(processor, share=world, seed=args.seed * 1000 + rank)
    chatty = rank == 0
    # Stage one uses a part of the parameters: the others get no gradient.
    run_stage(
        DistributedDataParallel(trainee, find_unused_parameters=True),
        batches,
        "vision",
        args.vision_steps,
        1.5e-3,
        chatty,
    )
    run_stage(DistributedDataParallel(trainee), batches, "all", args.steps, 2e-3, chatty)
    if chatty:
        model = trainee.model.eval()
        with torch.no_grad():
            # Values that bfloat16 holds exactly: the file stays float32, and packs to half its size.
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16().float())
        model.save_pretrained(args.output)
        processor.save_pretrained(args.output)
        for split in ("validation", "test"):
            scenes = sample_scenes(10 if os.environ.get("SLQ_SMOKE") else 500, split)
            descriptions = describe(model, processor, scenes)
            right = [text == caption(scene) for text, scene in zip(descriptions, scenes, strict=True)]
            print(f"{split}: {sum(right) / len(right):.1%} of {len(right)} scenes described exactly", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--vision-steps", type=int, default=600, help="steps of stage one (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1900, help="steps of stage two (default: %(default)s)")
    parser.add_argument(
        "--processes", type=int, default=2, help="training processes, one thread each (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes (default: %(default)s)")
    args = parser.parse_args(argv)
    mp.spawn(worker, args=(args.processes, args), nprocs=args.processes)


if __name__ == "__main__":
    main()

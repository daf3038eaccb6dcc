"""The ways to make a retriever that `quality.py` compares: nothing trained, latent queries, LoRA, full fine-tuning."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from common import model_inputs
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import get_cosine_schedule_with_warmup

from slq_embed import PrefixStore, SLQEncoder
from slq_embed.training import learning_rate_mapping
from slq_embed.training.losses import symmetric_info_nce

QUERIES, RANK = 16, 16
OURS: dict[str, dict[str, Any]] = {
    "slq": {},
    "slq_head": {"projection": True},
    "slq_deep": {"deep_queries": True},
    "slq_adapters": {"query_adapter": True},
    "slq_adapters_head": {"query_adapter": True, "projection": True},
}
METHODS = ("zero_shot", *OURS, "lora", "full_finetuning")
FROZEN = ("zero_shot", *OURS)
READOUTS = ("mean", "last", "one_word")
ONE_WORD = {"text": "{text}\nThe text above in one word:", "image": "The image above in one word:"}


@dataclass
class Retriever:
    """A model that embeds.

    Args:
        reader: Turns inputs into features.
        embed: From features to embeddings ``(batch, H)``, normalised.
        backbone: The multimodal LLM that it uses, with its head.
        trained: What is trained, by learning rate.
        precision: Of the computations: that of the frozen weights, or that of autocast where weights are trained.
    """

    reader: SLQEncoder
    embed: Callable[[dict[str, Any]], Tensor]
    backbone: Any
    trained: dict[float, list[nn.Parameter]]
    precision: torch.dtype

    @property
    def numbers(self) -> int:
        """How many numbers are trained."""
        return sum(weight.numel() for weights in self.trained.values() for weight in weights)

    @torch.no_grad()
    def encode(self, inputs: list[Any], batch: int = 50) -> Tensor:
        """Embeddings of inputs, ``(inputs, H)``."""
        order = sorted(
            range(len(inputs)), key=lambda index: len(inputs[index]) if isinstance(inputs[index], str) else 0
        )
        parts = (order[start : start + batch] for start in range(0, len(inputs), batch))  # little padding
        rows = torch.cat([self([inputs[index] for index in part]) for part in parts])
        return rows[torch.tensor(order, device=rows.device).argsort()]

    def __call__(self, inputs: list[Any]) -> Tensor:
        """Embeddings of a batch, ``(batch, H)`` float32, with autograd."""
        device = self.backbone.device
        features = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in self.reader.preprocess(inputs).items()
        }
        with torch.autocast(device.type, self.precision, enabled=self.precision != self.backbone.dtype):
            return self.embed(features).float()


def build(
    method: str,
    readout: str,
    backbone: Any,
    processor: Any,
    rate: float,
    seed: int,
    precision: torch.dtype = torch.float32,
    store: PrefixStore | None = None,
    parts: float | None = None,
) -> Retriever:
    """A retriever that is to be trained.

    Args:
        method: One of METHODS.
        readout: How methods without queries read an embedding from the states: one of READOUTS.
        backbone: The multimodal LLM; LoRA and full fine-tuning change it.
        processor: Its processor.
        rate: The learning rate: of the queries for ours, and else of all that is trained.
        seed: Of what is drawn.
        precision: Of the computations. Frozen weights are rounded to it.
        store: Where latent queries find prefixes that were computed before.
        parts: The learning rate of what is trained beside the queries; by default, that of :func:`learning_rate_mapping`.
    """
    torch.manual_seed(seed)
    if method in FROZEN:
        backbone.to(precision)
    instructions = ONE_WORD if readout == "one_word" else None
    reader = SLQEncoder.from_backbone(
        backbone, processor, num_queries=QUERIES, seed=seed, instructions=instructions, **OURS.get(method, {})
    )
    if method in OURS:
        groups: dict[float, list[nn.Parameter]] = {rate: [reader.queries]}
        for pattern, value in learning_rate_mapping(reader).items():
            weights = [weight for name, weight in reader.named_parameters() if re.search(pattern, name)]
            value = parts or value
            groups[value] = [*groups.get(value, []), *weights]
        reader.prefix_store = store
        return Retriever(reader, lambda features: reader(features)["sentence_embedding"], backbone, groups, precision)
    decoder = backbone.base_model
    if method == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        text = decoder.get_decoder()
        linear = {name.rpartition(".")[2] for name, module in text.named_modules() if isinstance(module, nn.Linear)}
        start = next(name for name, module in decoder.named_modules() if module is text)
        pattern = rf"{start}\..*\.({'|'.join(sorted(linear))})"
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=pattern), decoder)
    elif method == "full_finetuning":
        decoder.requires_grad_(True)

    def embed(features: dict[str, Any]) -> Tensor:
        states = decoder(**model_inputs(features), use_cache=False).last_hidden_state.float()
        if readout != "mean":
            return normalize(states[:, -1], dim=-1)
        mask = features["attention_mask"][..., None]
        return normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)

    trained = [weight for weight in decoder.parameters() if weight.requires_grad]
    return Retriever(reader, embed, backbone, {rate: trained} if trained else {}, precision)


def train(
    retriever: Retriever, batches: Iterable[tuple[list[Any], list[str]]], steps: int, rate: float
) -> Iterator[None]:
    """Train by symmetric InfoNCE with a learned temperature, AdamW and a cosine schedule: the same for all methods.

    Args:
        retriever: What to train.
        batches: Images and texts of each step.
        steps: How many there are.
        rate: Learning rate of the logarithm of the temperature.

    Yields:
        After each step.
    """
    temperature = nn.Parameter(torch.tensor(0.07, device=retriever.backbone.device).log())
    groups = [{"params": weights, "lr": value} for value, weights in retriever.trained.items()]
    optimizer = torch.optim.AdamW([*groups, {"params": [temperature], "lr": rate}], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(10, steps // 4), steps)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for images, texts in batches:
        first, second = retriever(images), retriever(texts)
        symmetric_info_nce(first, second, temperature.exp().clamp(0.01, 1.0)).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield

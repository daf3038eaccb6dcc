"""What identifies a backbone and how it reads its input: enough to refuse another one, and to name what it computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from slq_embed.backbone.families import decoder_of, embedding_table, media_settings
from slq_embed.backbone.quantization import is_quantized, packing_of, parts_of
from slq_embed.backbone.query_tokens import OWN_TOKEN

# What differs between loads of one checkpoint: paths, versions, dtype, kernels, caching.
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config"}
_VOLATILE |= {"architectures", "attn_implementation", "_attn_implementation", "_attn_implementation_internal"}
_SAMPLE_ROWS, _SAMPLE_COLUMNS, _SAMPLE_LAYER = 32, 4, 256
_HALF = "float16:"


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a backbone.

    Args:
        config_sha256: Digest of its configuration, without what differs between loads.
        table_sha256: Digest of its token embeddings in bfloat16, which float32 and bfloat16 loads share. A float16 load has
            another one, marked as such.
        table_sample: A few of their values, to compare a float16 load with, or another load with it.
        shape: Shape of the table.
        layers_sha256: Digest of some numbers of each other matrix, in bfloat16. Empty where they cannot be compared: in float16,
            quantized, or on the disk.
    """

    config_sha256: str
    table_sha256: str
    table_sample: list[float]
    shape: list[int]
    layers_sha256: str = ""


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in _VOLATILE}
    return value


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def fingerprint(backbone: PreTrainedModel) -> Fingerprint:
    """Take a backbone's fingerprint; about a second for a table of 150,000 rows."""
    table = embedding_table(backbone).detach()
    digest = hashlib.sha256()
    for block in table.split(8192):
        digest.update(block.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    rows = torch.linspace(0, len(table) - 1, _SAMPLE_ROWS, device=table.device).long()
    sample = table[rows][:, :_SAMPLE_COLUMNS].float().flatten().tolist()
    table_sha256 = (_HALF if table.dtype == torch.float16 else "") + digest.hexdigest()
    config_sha256 = hashlib.sha256(_json(_stable(backbone.config.to_dict()))).hexdigest()
    return Fingerprint(config_sha256, table_sha256, sample, [int(n) for n in table.shape], _layers_digest(backbone))


def _layers_digest(backbone: PreTrainedModel) -> str:
    if is_quantized(backbone):
        return ""
    table, samples = embedding_table(backbone), []
    for weight in decoder_of(backbone).parameters():
        if weight is table or weight.ndim < 2:
            continue
        if weight.dtype not in (torch.float32, torch.bfloat16) or weight.is_meta:
            return ""
        flat = weight.detach().flatten()
        sample = flat[:: -(-len(flat) // _SAMPLE_LAYER)].to("cpu", torch.bfloat16)
        samples.append(sample.contiguous().view(torch.uint8).numpy().tobytes())
    # Sorted: versions of transformers order and name them otherwise.
    return hashlib.sha256(b"".join(sorted(samples))).hexdigest()


def difference(recorded: Fingerprint, current: Fingerprint, layers_only: bool = False) -> str | None:
    """Say in words how a backbone differs from the one recorded, or None if it is the same.

    Args:
        recorded: Of the right one.
        current: Of the one that came.
        layers_only: Whether the token embeddings may differ, as those of a merged model do from its backbone's.
    """
    if recorded.layers_sha256 and current.layers_sha256 not in ("", recorded.layers_sha256):
        return "its layers differ"
    if layers_only:
        return None
    if current.shape != recorded.shape:
        return f"its token embeddings have shape {current.shape}, not {recorded.shape}"
    if current.config_sha256 != recorded.config_sha256:
        return "its configuration differs"
    if any(part.table_sha256.startswith(_HALF) for part in (current, recorded)):
        same = torch.allclose(torch.tensor(current.table_sample), torch.tensor(recorded.table_sample), 1e-2, 1e-6)
    else:
        same = current.table_sha256 == recorded.table_sha256
    return None if same else "its token embeddings differ"


def weights_digest(backbone: PreTrainedModel) -> bytes:
    """A digest of all weights and of the configuration, for what must not outlive any change of them.

    It reads every weight: about a second for each GB.
    """
    digest = hashlib.sha256(_json(_stable(backbone.config.to_dict())))
    for name, value in sorted(backbone.state_dict().items()):
        if not isinstance(value, torch.Tensor):  # a quantizer's settings
            digest.update(f"{name} {value}".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {packing_of(value)}".rstrip().encode())
        for _, part in parts_of(value.detach()):
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def settings_digest(backbone: PreTrainedModel, processor: ProcessorMixin, image_kwargs: Mapping[str, Any]) -> bytes:
    """A digest of what decides a prefix beside its input, the weights and the tokenizer.

    That is: precision, attention kernels and image processing. The chat template is part of each input's own key,
    because the template also holds the query tokens, which no prefix sees.
    """
    settings = [
        str(embedding_table(backbone).dtype),
        str(backbone.config._attn_implementation),
        media_settings(processor, "image"),
        dict(image_kwargs),
    ]
    return hashlib.sha256(_json(settings)).digest()


def video_digest(processor: ProcessorMixin, video_kwargs: Mapping[str, Any]) -> bytes:
    """A digest of what decides the prefix of a video in addition to :func:`settings_digest`."""
    return hashlib.sha256(_json([media_settings(processor, "video"), dict(video_kwargs)])).digest()


def tokenizer_digest(tokenizer: Any) -> bytes:
    """A digest of how a tokenizer turns text into ids, without the query tokens; about a second for 150,000 tokens."""
    vocabulary = sorted(item for item in tokenizer.get_vocab().items() if not OWN_TOKEN.fullmatch(item[0]))
    digest = hashlib.sha256(json.dumps(vocabulary).encode())
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        state = json.loads(backend.to_str())
        for volatile in ("added_tokens", "padding", "truncation"):  # of the query tokens, and of the last call
            state.pop(volatile, None)
        digest.update(_json(state))
    return digest.digest()

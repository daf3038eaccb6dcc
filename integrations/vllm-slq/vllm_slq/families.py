"""Where vLLM computes a family otherwise than transformers does: made alike, or refused."""

from __future__ import annotations

from typing import Any

from vllm.config import ModelConfig
from vllm.config.multimodal import ImageDummyOptions
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from vllm_slq import backend

_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_WINDOW = "transformers_sliding_window"


def agree(model_config: ModelConfig) -> None:
    """Change the settings of a server so that it gives the vectors of transformers.

    Args:
        model_config: The settings, before the model is loaded; changed in place.

    Raises:
        ValueError: If it would give others.
    """
    _take_one_image(model_config)
    if not backend.runs(model_config.architectures):
        _see_as_far(model_config.hf_text_config)
    _require_both_directions(model_config)
    _refuse_other_images(model_config)
    _lose_no_start(model_config)


def _see_as_far(text: Any) -> None:
    # vLLM's Cohere 2 sees as many tokens before a token as the window is long, transformers one less.
    if text.model_type in ("cohere2", "cohere2_moe"):
        window = vars(text).setdefault(_WINDOW, text.sliding_window)  # settings may come here twice
        text.sliding_window = window - 1


def _take_one_image(model_config: ModelConfig) -> None:
    # transformers cuts an image into tiles where it is the only one of its input; vLLM cuts each.
    settings = model_config.multimodal_config
    if model_config.hf_config.model_type == "llava_onevision" and settings is not None:
        allowed = min(settings.get_limit_per_prompt("image"), 1)
        settings.limit_per_prompt["image"] = ImageDummyOptions(count=allowed)


def _require_both_directions(model_config: ModelConfig) -> None:
    # On other platforms vLLM itself looks for kernels that can do it.
    if model_config.is_mm_prefix_lm and current_platform.is_cpu():
        raise ValueError(
            f"{model_config.model} is a {model_config.hf_config.model_type}: in it, tokens of an image see each other in both "
            "directions. vLLM's attention on a CPU cannot do that, and the vectors of images would be wrong. Serve it on a GPU, "
            "or for texts alone, with --language-model-only."
        )


def _refuse_other_images(model_config: ModelConfig) -> None:
    # vLLM 0.32 computes its images otherwise; its texts agree.
    settings, kind = model_config.multimodal_config, model_config.hf_config.model_type
    if kind == "aria" and settings is not None and not settings.language_model_only:
        raise ValueError(
            f"{model_config.model} is a {kind}, whose images vLLM computes otherwise than transformers, so their vectors would be "
            "wrong. Serve it for texts alone, with --language-model-only."
        )


def _lose_no_start(model_config: ModelConfig) -> None:
    # A processor of transformers adds what its tokenizer adds, if the chat does not begin with it; vLLM adds nothing to a chat.
    folder, revision = model_config.model, model_config.revision
    if not any(get_hf_file_to_dict(name, folder, revision) for name in _PROCESSORS):
        return
    tokenizer: Any = cached_tokenizer_from_config(model_config)
    start = tokenizer.bos_token
    if start is None or tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    if not tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).startswith(start):
        raise ValueError(
            f"The tokenizer of {folder} adds a token at the start of a text, {start!r}, which its chat template does not write, "
            "and vLLM would leave out. Write the folder with slq_embed.saving.export_vllm."
        )

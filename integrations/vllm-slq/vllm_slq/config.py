"""How vLLM is to run an SLQ model."""

from __future__ import annotations

import logging
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.repo_utils import get_hf_file_bytes, get_hf_file_to_dict

from vllm_slq import PREFIX
from vllm_slq.families import agree
from vllm_slq.measured import ARCHITECTURES
from vllm_slq.record import CONFIG_NAME, HOST_CONFIG_NAME, TEMPLATE_NAME, Record, read_record, require_prompts

logger = logging.getLogger("vllm.slq")


def record_of(model_config: ModelConfig) -> Record:
    """The record of the served folder or hub name.

    Raises:
        ValueError: If it is no SLQ model, or one that vLLM cannot serve.
    """
    return read_record(get_hf_file_to_dict(CONFIG_NAME, model_config.model, model_config.revision), model_config.model)


def read_file(model_config: ModelConfig, name: str) -> bytes:
    """The content of a file of the served folder or hub name, which its record names.

    Raises:
        ValueError: If it is missing.
    """
    if not (content := get_hf_file_bytes(name, model_config.model, model_config.revision)):
        raise ValueError(
            f"{model_config.model} has no file {name}, which its {CONFIG_NAME} asks for. Write the folder with "
            "slq_embed.saving.export_vllm."
        )
    return content


def config_hook(base: type[VerifyAndUpdateConfig] | None) -> type[VerifyAndUpdateConfig]:
    """What vLLM calls with the settings of a server, before it loads the model.

    Args:
        base: What it calls for the architecture itself.
    """
    inner: Any = base or VerifyAndUpdateConfig

    class SLQModelConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_model_config(model_config: ModelConfig) -> None:
            inner.verify_and_update_model_config(model_config)
            if model_config.runner_type != "pooling" or model_config.pooler_config is None:
                raise ValueError(f"{model_config.model} gives embeddings. Serve it with --runner pooling.")
            if model_config.enable_prompt_embeds:
                raise ValueError(
                    f"{model_config.model} finds its queries by their token ids, which a prompt of embeddings does not have. Serve it "
                    "without --enable-prompt-embeds."
                )
            _say_what_is_not_known(model_config)
            _lose_no_prompt(model_config)
            _say_what_transformers_does(model_config)
            _call_the_processor_alike(model_config)
            agree(model_config)
            # To vLLM, a pooler that needs the last positions alone: so prompts may be computed in several steps.
            model_config.pooler_config.seq_pooling_type = "LAST"

        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            inner.verify_and_update_config(vllm_config)
            cache, record = vllm_config.cache_config, record_of(vllm_config.model_config)
            if record.acts_inside:
                _compute_where_layers_can_act(vllm_config)
            if record.query_adapter and vllm_config.lora_config is not None:
                # vLLM's layers for LoRA compute with the weights of those that the adapter acts in, and do not call them.
                raise ValueError(
                    f"{vllm_config.model_config.model} has a query adapter, which acts in layers that --enable-lora replaces. Serve "
                    "it without --enable-lora."
                )
            if record.count > 1 and cache.enable_prefix_caching:
                # vLLM computes at least the last token of a cached prompt, but the states of all queries are needed.
                cache.enable_prefix_caching = False
                logger.info("SLQ: prefix caching is off, because the states at all queries are needed.")

    return SLQModelConfig


def _say_what_is_not_known(model_config: ModelConfig) -> None:
    if not {name.removeprefix(PREFIX) for name in model_config.architectures} <= ARCHITECTURES:
        logger.warning(
            "SLQ: nobody has compared the vectors of %s in vLLM with those of slq-embed. Compare them before you rely on them, with "
            "slq_embed.serving.compare.",
            ", ".join(model_config.architectures),
        )


def _compute_where_layers_can_act(vllm_config: VllmConfig) -> None:
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if (size := getattr(parallel, name)) > 1:
            raise ValueError(
                f"{model.model} has deep queries or a query adapter, which need whole layers in one process, but {name} is "
                f"{size}. Serve it with {name} 1, and use data_parallel_size for more GPUs."
            )
    if parallel.use_ubatching:
        raise ValueError(
            f"{model.model} has deep queries or a query adapter, which need the whole of a step at once. Serve it without --enable-dbo."
        )
    if not model.enforce_eager:
        model.enforce_eager = True
        logger.info("SLQ: the model is not compiled, because its layers act at the queries only.")


def _lose_no_prompt(model_config: ModelConfig) -> None:
    folder, revision = model_config.model, model_config.revision
    template = get_hf_file_bytes(TEMPLATE_NAME, folder, revision) or b""
    require_prompts(get_hf_file_to_dict(HOST_CONFIG_NAME, folder, revision), template.decode(), folder)


def _say_what_transformers_does(model_config: ModelConfig) -> None:
    text = model_config.hf_text_config
    rope = getattr(text, "rope_parameters", None) or {}
    if "mrope_section" in rope and "mrope_interleaved" in getattr(text, "ignore_keys_at_rope_validation", ()):
        # The families whose configuration may say this do it in any case; vLLM does it only if the configuration says so.
        rope.setdefault("mrope_interleaved", True)


def _call_the_processor_alike(model_config: ModelConfig) -> None:
    settings = model_config.multimodal_config
    if (kwargs := record_of(model_config).image_kwargs) and settings is not None:
        settings.mm_processor_kwargs = {**(settings.mm_processor_kwargs or {}), **kwargs}

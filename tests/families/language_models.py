"""Tiny language models of every kind that transformers has a class for, with random weights. They read texts only."""

from __future__ import annotations

from typing import Any

import transformers

from tests.families.building import Parts
from tests.families.others import text_only

PREFIX = (
    *("afmoe", "apertus", "arcee", "aria_text", "axk1", "bitnet", "bloom", "codegen", "cohere", "cohere2", "cwm"),
    *(
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "glm_moe_dsa",
        "hy_v4",
        "diffllama",
        "doge",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
    ),
    *("falcon", "flex_olmo", "flint", "gemma2", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4"),
    *("glm4_moe", "glm4_moe_lite", "gpt_neox", "gpt_oss", "gptj", "granite", "granite_swa", "granitemoe"),
    *("granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense"),
    *("hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe", "kolibri1", "laguna"),
    *("lfm2", "lfm2_moe", "lfm3", "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2"),
    *("minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "modernbert-decoder", "moshi", "mpt"),
    *("nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "opt", "persimmon"),
    *("phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next"),
    *("seed_oss", "solar_open", "stablelm", "starcoder2", "vaultgemma", "youtu"),
)
"""The input runs once, and the queries continue it."""
WHOLE = (*("bamba", "falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "minimax", "zaya"),)
"""Input and queries run as one sequence: states of state-space models fit no prefix."""
REFUSED = {
    **dict.fromkeys(("bert", "roberta", "rembert"), "lets earlier tokens see later ones"),
    **dict.fromkeys(("beam", "biogpt", "ctrl", "gpt2", "openai-gpt", "xglm"), "otherwise in a padded batch than alone"),
    **dict.fromkeys(("recurrent_gemma", "rwkv", "xlstm"), "gives an input other embeddings in a batch than alone"),
}
"""With which words the self-check refuses them."""

# What many classes call their sizes. A configuration gets those that it knows.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("d_model", "n_embd", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("d_ff", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp", "n_inner"), 48),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_channels", "rotary_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "global_head_dim", "sliding_window"), 8),
    **dict.fromkeys(("mamba_d_state", "mamba_d_head", "mamba_head_dim", "mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "hidden_size_per_layer_input", "attention_window_size"), 8),
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "conv_kernel": 4, "time_step_rank": 4},
    **{"mamba_d_ssm": 64, "lru_width": 32, "num_key_value_heads": 2, "num_kv_shared_layers": 0},
    # So many heads that no two tokens have the same score, which would decide by their places.
    **{"index_n_heads": 32, "index_head_dim": 16, "index_topk": 24},
}
_LATENT = {"head_dim": None, "num_key_value_heads": 4}
_FOUR = {"num_hidden_layers": 4}
_TURNS = {**_FOUR, "layer_types": ["sliding_attention", "full_attention"] * 2}
_OTHERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), _LATENT),
    **dict.fromkeys(("hy_v4", "minicpm3", "youtu"), _LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm2", "lfm3", "jamba", "bamba"), _FOUR),
    **dict.fromkeys(("olmo_hybrid", "minimax", "recurrent_gemma"), _FOUR),
    "afmoe": {**_FOUR, "num_dense_layers": 1},
    "gemma4_text": {**_TURNS, "num_kv_shared_layers": 2},
    "gemma4_unified_text": _TURNS,
    "granitemoehybrid": {**_FOUR, "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0},
    "lfm2_moe": {**_FOUR, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {**_LATENT, "head_dim": 8, "zero_expert_num": 2, "expert_ffn_hidden_size": 16, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "nemotron_h": {**_FOUR, "layer_types": ["mamba", "attention", "mlp", "moe"]},
    "zaya": {**_FOUR, "num_experts_per_tok": 1},
}


def language_model(kind: str) -> Parts:
    """The parts of a tiny model of a ``model_type``."""
    known = transformers.AutoConfig.for_model(kind).to_dict()
    sizes = {name: size for name, size in _SIZES.items() if name in known}
    if known.get("sliding_window") is None:
        sizes.pop("sliding_window", None)
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, **_OTHERS.get(kind, {})}
    return text_only(kind, **{name: size for name, size in sizes.items() if size is not None})

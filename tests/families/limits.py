"""What is measured on a tiny backbone, how far apart it may be, and which families are measured otherwise."""

from __future__ import annotations

LIMITS = {
    "prefix path: value": 1e-6,
    "prefix path: gradient": 1e-5,
    "alone and in a batch": 1e-5,
    "prefix path: value, eager": 1e-6,
    "prefix path: gradient, eager": 1e-5,
    "alone and in a batch, eager": 1e-5,
    "loaded again": 1e-6,
    "plain Sentence Transformers": 1e-6,
    "weights changed by training": 0.0,
    "logits changed by training": 0.0,
    "control tokens from texts": 0.0,
    "plain Sentence Transformers, merged": 1e-6,
    "no spare rows": 1e-6,
    "several images": 1e-6,
    "videos": 1e-6,
    "deep queries and adapter": 1e-6,
    "deep queries and adapter: gradient": 1e-5,
    "cached loss: gradient": 1e-4,
    "stored prefixes": 1e-5,
    "stored features of the vision tower": 1e-5,
    "bfloat16 refused": 0.0,
    "plain Sentence Transformers, bfloat16": 1e-3,
}
"""Most that each may be."""
FULL = (
    "plain Sentence Transformers, merged",
    "no spare rows",
    "several images",
    "videos",
    "deep queries and adapter",
    "deep queries and adapter: gradient",
    "cached loss: gradient",
    "stored prefixes",
    "stored features of the vision tower",
    "bfloat16 refused",
    "plain Sentence Transformers, bfloat16",
)
"""Not measured in the plain test run."""
_TEN_TIMES = ("qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "gemma4_unified", "muse_glimmer")
ROUND_MORE = {**dict.fromkeys((*_TEN_TIMES, "muse_spark"), 10), "gemma4": 50}
"""How many times as far tiny models of a family may be: rounding grows in them, as their self-check finds (Gemma 4: 7e-5)."""
NO_MORE = (
    "alone and in a batch",
    "alone and in a batch, eager",
    "loaded again",
    "stored prefixes",
    "stored features of the vision tower",
    *FULL[-2:],
)
"""What they hold like all others."""

ONE_KIND_A_BATCH = ("paligemma", "paligemma2")  # their processor spoils texts that stand in a batch with images
# Its model counts images over the whole batch (transformers 5.23), so the host encodes its inputs one by one.
ALONE_ONLY = ("hunyuan_vl",)
# Its processor gives bfloat16 pixels whatever the model's precision, and the host passes them on.
HALF_ONLY = ("llama4",)
# Their towers do not cast pixels, which are float32, and the host does not either (transformers 5.23).
WHOLE_ONLY = ("lfm3_vl", "kimi_k25", "aria", "deepseek_vl_hybrid", "deepseek_ocr2", "unlimited_ocr", "chameleon")

MERGED_ONLY = {
    **dict.fromkeys(("muse_glimmer", "muse_spark"), "normalises its token embeddings, which peft leaves out"),
    **dict.fromkeys(("deepseek_ocr2", "unlimited_ocr"), "changes the names of an adapter's weights"),
}
"""Why the adapter form is refused."""
NOTHING_INSIDE = {
    **dict.fromkeys(("paligemma", "paligemma2"), "token type of their own, which cannot be saved together"),
    **dict.fromkeys(("deepseek_ocr2", "unlimited_ocr"), "Use form='merged', without a query adapter"),
    "chameleon": "writes tokens after the queries",
}
"""Why a query adapter and deep queries are refused."""


def limit(name: str, key: str) -> float:
    """Most that a difference may be on a family."""
    return LIMITS[key] * (1 if key in NO_MORE else ROUND_MORE.get(name, 1))

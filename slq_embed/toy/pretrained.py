"""The models that ship with the package, for offline use, demos and tests."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "checkpoints"


def pretrained(name: str) -> str:
    """The folder of a model that ships with the package.

    ``"mllm-tiny"`` is a multimodal LLM of 3.5 million parameters that knows a small world of coloured shapes
    (see :mod:`slq_embed.toy.scenes`) and nothing else. ``"slq-tiny"`` is an SLQ model on it, and ``"slq-tiny-head"`` one with a
    projection head. These two read most of their weights from the folder of the first, which stands beside theirs.

    Args:
        name: One of the three.

    Returns:
        A path that ``SentenceTransformer``, ``SLQEncoder`` and transformers load.

    Raises:
        ValueError: If there is no such model.
    """
    names = sorted(folder.name for folder in _FOLDER.iterdir() if folder.is_dir())
    if name not in names:
        raise ValueError(f"No model {name!r} ships with slq-embed; these do: {', '.join(names)}.")
    return str(_FOLDER / name)

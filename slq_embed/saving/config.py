"""What a saved folder records of an SLQ model, beside its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from slq_embed.backbone.fingerprint import Fingerprint
from slq_embed.backbone.query_tokens import Form, QueryTokens
from slq_embed.modules.latent_query_pooling import PoolingMode

FORMAT_VERSION = 1
CONFIG_NAME = "slq_config.json"
ADAPTER_NAME = "adapter_model.safetensors"
QUERIES_NAME = "latent_queries.safetensors"  # merged form: the float32 master copy of what the table holds
FindFile = Callable[[str], str | None]


@dataclass
class SLQConfig:
    """What is recorded of an SLQ model.

    Args:
        backbone: Hub name or absolute folder of the backbone.
        revision: Its commit, where it came from the hub.
        tokens: The query tokens.
        pooling: ``"mean"`` or ``"last"``.
        form: How it is saved.
        max_text_chars: Longest text that is read, in characters.
        instructions: Text of the user turn for each kind of input.
        image_kwargs: How the image processor is called.
        fingerprint: Of the backbone; filled in on saving.
        loss: Name of the loss it was trained with, if any.
        log_temperature: Logarithm of the learned temperature, if any.
    """

    backbone: str
    revision: str | None
    tokens: QueryTokens
    pooling: PoolingMode
    form: Form
    max_text_chars: int
    instructions: dict[str, str]
    image_kwargs: dict[str, Any] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None
    loss: str | None = None
    log_temperature: float | None = None
    format_version: int = field(default=FORMAT_VERSION)

    @classmethod
    def read(cls, find: FindFile) -> SLQConfig | None:
        """Read the record of a folder, or None where there is none.

        Raises:
            ValueError: If a newer version of this package wrote it.
        """
        if (path := find(CONFIG_NAME)) is None:
            return None
        values = json.loads(Path(path).read_text("utf8"))
        if values["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"This SLQ model has format {values['format_version']}, but this slq-embed reads up to "
                f"{FORMAT_VERSION}. Upgrade slq-embed; plain SentenceTransformer loads the folder as it is."
            )
        tokens = values.pop("tokens")
        recorded = values.pop("fingerprint")
        return cls(
            tokens=QueryTokens(tuple(tokens["strings"]), tuple(tokens["ids"]), tokens["source"]),
            fingerprint=Fingerprint(**recorded) if recorded else None,
            **values,
        )

    def write(self, folder: Path) -> None:
        """Write the record into a folder."""
        (folder / CONFIG_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf8")


def read_queries(find: FindFile) -> Tensor:
    """Read the latent queries of a saved folder, ``(Q, H)`` in float32.

    Raises:
        ValueError: If the folder holds none, or the file is damaged.
    """
    for name in (QUERIES_NAME, ADAPTER_NAME):
        if (path := find(name)) is not None:
            try:
                (queries,) = load_file(path).values()
            except Exception as error:
                raise ValueError(f"The latent queries in {path} cannot be read: {error}") from error
            return queries.float()
    raise ValueError(f"The folder holds neither {ADAPTER_NAME} nor {QUERIES_NAME}: its latent queries are missing.")


def read_folder(folder: str | Path) -> tuple[SLQConfig, Tensor]:
    """Read what a local folder records and its queries, ``(Q, H)``, without a backbone.

    Raises:
        ValueError: If the folder is no SLQ model, or its queries are missing or damaged.
    """

    def find(name: str) -> str | None:
        path = Path(folder) / name
        return str(path) if path.is_file() else None

    if (config := SLQConfig.read(find)) is None:
        raise ValueError(f"{folder} is no saved SLQ model: it has no {CONFIG_NAME}.")
    return config, read_queries(find)

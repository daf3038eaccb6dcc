"""What a saved folder records of an SLQ model, beside its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slq_embed.backbone.fingerprint import Fingerprint
from slq_embed.backbone.query_tokens import Form, QueryTokens
from slq_embed.backbone.report import Schedule
from slq_embed.modules.latent_query_pooling import PoolingMode
from slq_embed.modules.query_adapter import QueryAdapter

FORMAT_VERSION = 2
CONFIG_NAME = "slq_config.json"


@dataclass
class SLQConfig:
    """What is recorded of an SLQ model.

    Args:
        backbone: Hub name or absolute folder of the backbone.
        revision: Its commit, where it came from the hub.
        tokens: The query tokens.
        pooling: ``"mean"``, ``"last"`` or ``"weighted"``.
        form: How it is saved.
        max_text_chars: Longest text that is read, in characters.
        instructions: Text of the user turn for each kind of input.
        image_kwargs: How the image processor is called.
        fingerprint: Of the backbone; filled in on saving.
        loss: Name of the loss it was trained with, if any.
        log_temperature: Logarithm of the learned temperature, if any.
        projection: Width of the projection head, if there is one.
        query_adapter: The adapter that acts at the queries, if there is one.
        deep_queries: Whether vectors are added to the queries' states before each layer.
        schedule: How input and queries run, where the self-check found it out; else the prefix path.
        query_token_type: Token type of the queries, where the backbone has types and the processor would give another.
        quantization: How the backbone was quantized on loading, if it was; filled in on saving.
        query_scores: What the weights of the queries come from, where the pooling is weighted; filled in on saving.
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
    projection: int | None = None
    query_adapter: QueryAdapter | None = None
    deep_queries: bool = False
    schedule: Schedule | None = None
    query_token_type: int = 0
    quantization: dict[str, Any] | None = None
    query_scores: list[float] | None = None

    @classmethod
    def read(cls, find: Callable[[str], str | None]) -> SLQConfig | None:
        """Read the record of a folder, or None where there is none.

        Raises:
            ValueError: If a newer version of this package wrote it, or it is damaged.
        """
        if (path := find(CONFIG_NAME)) is None:
            return None
        try:
            values = json.loads(Path(path).read_text("utf8"))
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged, or a save was ended before it was whole ({error}). Save the model again, or copy its folder again."
            ) from error
        if (version := values.pop("format_version")) > FORMAT_VERSION:
            raise ValueError(
                f"This SLQ model has format {version}, but this slq-embed reads up to {FORMAT_VERSION}. Upgrade slq-embed."
            )
        tokens = values.pop("tokens")
        recorded, adapter = values.pop("fingerprint"), values.pop("query_adapter", None)
        return cls(
            tokens=QueryTokens(tuple(tokens["strings"]), tuple(tokens["ids"]), tokens["source"]),
            fingerprint=Fingerprint(**recorded) if recorded else None,
            query_adapter=QueryAdapter(**adapter) if adapter else None,
            **values,
        )

    @property
    def backbone_label(self) -> str:
        """The backbone's hub name, or the last part of its folder: no card tells where someone's files are."""
        name = self.backbone or "in memory"
        return Path(name).name if Path(name).is_absolute() else name

    @property
    def is_stock(self) -> bool:
        """Whether stock modules alone give the embeddings."""
        return self.query_adapter is None and not self.deep_queries and not self.query_token_type

    def write(self, folder: Path) -> None:
        """Write the record into a folder."""
        values = {**asdict(self), "format_version": FORMAT_VERSION}
        (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", "utf8")

"""The model card that saving writes: what the model is, on which backbone, trained how, and how to use it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from torch import nn

from slq_embed.inputs.columns import require_inputs

SNIPPET = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}"{flag})
embeddings = model.encode(["a red circle above a blue square", "two green stars"])
print(model.similarity(embeddings, embeddings))"""


@dataclass
class SLQModelCardData(SentenceTransformerModelCardData):
    """The host's card data with what is special about an SLQ model.

    The host would copy training images into the saved folder, as examples: this leaves them out.
    """

    generate_widget_examples: bool = False
    template_path: Path = field(default=Path(__file__).parent / "model_card_template.md", init=False, repr=False)
    loss_name: str | None = field(default=None, init=False)
    pipeline_tag: str = field(default="feature-extraction", init=False)

    def set_losses(self, losses: list[nn.Module]) -> None:
        """Called by the trainer."""
        super().set_losses(losses)
        self.loss_name = ", ".join(dict.fromkeys(type(loss).__name__ for loss in losses))

    def set_widget_examples(self, dataset: Any) -> None:
        """Show no rows of the training data."""

    def compute_dataset_metrics(self, dataset: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Size, columns and loss of a dataset, without the rows that the host shows.

        Called by the trainer before it trains, so columns that it would misread are refused here.
        """
        if hasattr(dataset, "format"):  # a stream has none
            require_inputs(dataset)
        metrics: dict[str, Any] = super().compute_dataset_metrics(dataset, *args, **kwargs)
        return {key: value for key, value in metrics.items() if "example" not in key}

    def set_best_model_step(self, step: int) -> None:
        """Called by the trainer right before it reloads the best checkpoint.

        It only logs a failure of that, so the model refuses to be used until it has loaded a state.
        """
        super().set_best_model_step(step)
        model: Any = self.model
        model.failed_checkpoint = f"step {step}"

    def try_to_set_base_model(self) -> None:
        """Name the backbone without asking the hub whether it exists."""
        model: Any = self.model
        if model.slq_config.backbone and not Path(model.slq_config.backbone).is_absolute():
            self.base_model, self.base_model_revision = model.slq_config.backbone, model.slq_config.revision

    def generate_usage_snippet(self) -> str:
        """The snippet, with the hub name or the folder this card is saved in."""
        model: Any = self.model
        flag = "" if model.slq_config.is_stock else ", trust_remote_code=True"
        return SNIPPET.format(name=self.model_id or self.save_dir or "path/to/this/folder", flag=flag)

    def get_model_specific_metadata(self) -> dict[str, Any]:
        """What the template needs beside the host's values."""
        model: Any = self.model
        trained = sum(parameter.numel() for parameter in model.parameters())
        return {
            **super().get_model_specific_metadata(),
            "slq_config": model.slq_config,
            "backbone": model.slq_config.backbone_label,
            "num_queries": len(model.queries),
            "trained_parameters": trained,
            "adapted_layers": len(model.transformer.query_adapter),
            "frozen_parameters": sum(parameter.numel() for parameter in model.backbone.parameters()),
            "temperature": model.temperature,
            "inputs": [kind for kind in ("text", "image", "video") if kind in model.transformer.modalities],
            "loss_name": self.loss_name or model.slq_config.loss,
        }

"""What all evaluators are: they measure, and report as the host expects it."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

from slq_embed.evaluation.encoding import EvaluatorOptions


class Evaluator(SentenceEvaluator, ABC):
    """An evaluator for ``SentenceTransformerTrainer`` and for ``model.evaluate``.

    Args:
        options: What all evaluators take.
    """

    kind: ClassVar[str]
    """Beginning of the name of the CSV file."""
    metric: ClassVar[str]
    """The primary metric, without the name's prefix."""

    def __init__(self, options: EvaluatorOptions) -> None:
        super().__init__()
        self.options = options
        self.name, self.primary_metric = options.name, self.metric

    @abstractmethod
    def measure(self, model: SentenceTransformer) -> dict[str, float]:
        """Encode the inputs and measure.

        Args:
            model: Any Sentence Transformer that encodes them.

        Returns:
            Metrics by name.
        """

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Measure, and report in a CSV file and in the model card.

        Args:
            model: Any Sentence Transformer that encodes the inputs.
            output_path: Folder of the CSV file; without one, none is written.
            epoch: For the CSV file.
            steps: For the CSV file.

        Returns:
            Metrics by name, with the evaluator's name as their prefix.
        """
        metrics = self.measure(model)
        if output_path is not None and self.options.write_csv:
            name = f"{self.kind}{'_' + self.options.name if self.options.name else ''}_results.csv"
            _append(Path(output_path) / name, {"epoch": epoch, "steps": steps, **metrics})
        metrics = self.prefix_name_to_metrics(metrics, self.options.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics


def _append(path: Path, row: dict[str, float]) -> None:
    """Add a row. The columns of an earlier one may be others: MMEB's are its tasks, KARR-Bench's its categories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.part")
    with FileLock(whole.with_suffix(".lock")):  # another run may write there, too
        rows: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="", encoding="utf8") as file:
                rows = list(csv.DictReader(file))
        rows.append(row)
        with whole.open("w", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for each in rows for name in each)))
            writer.writeheader()
            writer.writerows(rows)
        whole.replace(path)  # at once: earlier rows are not lost where this is killed

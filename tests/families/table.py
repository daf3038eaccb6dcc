"""The table of docs/backbones.md, written from what the slow tests measured.

``SLQ_BACKBONES=benchmarks/results/backbones.json pytest -m slow tests/contract/test_families.py`` measures, then
``python -m tests.families.table`` writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "backbones.json", ROOT / "docs" / "backbones.md"
START, END = "<!-- table: python -m tests.families.table -->", "<!-- end of the table -->"
SHORT = {
    "prefix path: value": "value",
    "prefix path: gradient": "gradient",
    "alone and in a batch": "in a batch",
    "plain Sentence Transformers": "plain load",
    "plain Sentence Transformers, merged": "merged",
    "no spare rows": "no spare rows",
    "several images": "several images",
    "videos": "videos",
    "deep queries and adapter": "adapter",
    "plain Sentence Transformers, bfloat16": "bfloat16",
    "cached loss: gradient": "cached loss",
    "stored prefixes": "stored",
    "stored features of the vision tower": "vision stored",
}


def table(results: dict[str, Any]) -> str:
    """The rows, in Markdown: differences in float32, and the seconds of the self-check."""
    lines = [f"| family | attention | {' | '.join(SHORT.values())} | check |", "| --- " * (len(SHORT) + 3) + "|"]
    for name, row in results["families"].items():
        cells = [_cell(row["differences"][key], results["limits"][key]) for key in SHORT]
        lines.append(f"| `{name}` | {row['kind']} | {' | '.join(cells)} | {row['seconds']:.1f} s |")
    return "\n".join(lines)


def _cell(value: float | None, limit: float) -> str:
    if value is None:
        return "no"
    shown = f"{value:.0e}" if value > 0 else "0"  # 1 - cosine is rounded below 0
    return f"**{shown}**" if value > limit else shown


def page_with_table(page: str, results: dict[str, Any]) -> str:
    before, _, rest = page.partition(START)
    return f"{before}{START}\n\n{table(results)}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text("utf8"), json.loads(RESULTS.read_text("utf8"))), "utf8")

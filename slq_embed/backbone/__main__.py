"""``python -m slq_embed.backbone NAME ...``: the self-check of backbones, from the hub or from folders."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoProcessor

from slq_embed.backbone.families import load_backbone
from slq_embed.backbone.self_check import check


def main(arguments: Sequence[str] | None = None) -> int:
    """Check backbones and print a report for each.

    Args:
        arguments: Of the command line.

    Returns:
        0 if latent queries work on all of them, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m slq_embed.backbone", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="hub name or folder of a backbone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the reports to a file")
    parser.add_argument("--dtype", default="auto", help="precision: auto (as saved), float32, bfloat16, ...")
    options = parser.parse_args(arguments)
    reports = {}
    for name in options.names:
        try:
            report = check(load_backbone(name, dtype=options.dtype), AutoProcessor.from_pretrained(name))
        except (ValueError, ImportError, OSError) as error:  # it cannot even be loaded
            reports[name] = {"schedule": None, "reason": str(error)}
            sys.stdout.write(f"{name}: {error}\n")
        else:
            reports[name] = report.to_dict()
            sys.stdout.write(f"{name}: {report}\n")
    if options.json is not None:
        options.json.write_text(json.dumps(reports, indent=2) + "\n", "utf8")
    return int(any(report["schedule"] is None for report in reports.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Running a script of the repository in a process of its own, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run_script(script: str, *arguments: object, folder: Path) -> str:
    """What a script prints, run in ``folder`` with small settings."""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        # All cores, unlike the tests; threads that spin while they wait would cost several times the work.
        env={**os.environ, "SLQ_SMOKE": "1", "OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout

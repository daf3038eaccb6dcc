"""The CSV file of an evaluator, where several runs write to it."""

from __future__ import annotations

import csv
import time
from contextlib import ExitStack

from slq_embed.evaluation.evaluator import _append
from tests.forks import forked, needs_fork


def _append_rows(path, run):
    read = csv.DictReader
    csv.DictReader = lambda file: (list(read(file)), time.sleep(0.05))[0]  # the other run comes between
    for step in range(5):
        _append(path, {"epoch": run, "steps": step, f"of_{run}": 0.5})


@needs_fork
def test_no_row_is_lost_where_two_runs_write_at_once(tmp_path):
    with ExitStack() as stack:
        processes = [stack.enter_context(forked(_append_rows, tmp_path / "r.csv", run)) for run in range(2)]
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
    lines = (tmp_path / "r.csv").read_text().splitlines()
    assert sorted(lines[0].split(",")) == ["epoch", "of_0", "of_1", "steps"]
    assert len(lines) == 11

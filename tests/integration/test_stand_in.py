"""The tests for a GPU, on a stand-in for one: tensors on the wrong device are found without a GPU.

The stand-in becomes a device of the whole process, so the tests run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

ROOT = Path(__file__).parents[2]
CHOSEN = "(qwen3_vl and (float32 or parts0)) or moving or (kept and dtype0-keys_values) or several or answers"

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make test-gpu"),
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this version of torch takes no device that is written in Python",
    ),
]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SLQ_STAND_IN": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def run_tests(*chosen: str) -> None:
    done = run("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", *chosen)
    assert done.returncode == 0, done.stdout[-8000:]
    assert "passed" in done.stdout


def test_the_tests_for_a_gpu_pass_on_it():
    run_tests("-k", CHOSEN, "tests/gpu/test_gpu.py")


@pytest.mark.slow
def test_all_tests_for_a_gpu_pass_on_it():
    run_tests("tests/gpu")


def test_it_refuses_tensors_on_several_devices():
    done = run(
        "-c",
        "import torch\n"
        "from tests.gpu.device import DEVICE\n"
        "there = torch.nn.Embedding(3, 2).to(DEVICE)\n"
        "assert there(torch.tensor([0, 1], device=DEVICE)).device.type == DEVICE\n"
        "assert there.weight[torch.tensor([0])].shape == (1, 2)\n"  # as CUDA allows
        "assert (torch.tensor(2.0) * there.weight).device.type == DEVICE\n"  # so too
        "there(torch.tensor([0, 1]))\n",
    )
    assert "aten.embedding.default got tensors on several devices: standin:0 (3, 2), cpu (2,)." in done.stderr

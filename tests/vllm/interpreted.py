"""Triton's kernels on a CPU, by its interpreter: with it, vLLM's runner for GPUs runs here, too.

vLLM has two model runners. It takes the second one where there is Triton, so on each GPU, and the first one on a CPU.
"""

import os
from types import SimpleNamespace
from typing import Any

SETTINGS = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
"""The environment of a process that is to use the runner for GPUs."""


class Interpreter:
    """What vLLM and Triton ask of the driver of a device."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> Any:
        return SimpleNamespace(backend="cpu", arch="", warp_size=1)


def interpret_if_asked() -> None:
    """Declare the interpreter as Triton's device, if the environment has the settings; before vLLM is imported."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton import backends
    from triton.runtime import driver

    backends.backends["cpu"] = SimpleNamespace(driver=Interpreter, compiler=None)
    driver.set_active(Interpreter())


def use_torch_for_bfloat16() -> None:
    """Leave out the one kernel that computes in bfloat16, whose bits the interpreter multiplies as whole numbers."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from vllm.model_executor.models import qwen3_vl

        qwen3_vl.triton_pos_embed_interpolate = qwen3_vl.pos_embed_interpolate_native

"""The device that the tests for a GPU run on."""

from __future__ import annotations

import os

import torch

STAND_IN = os.environ.get("SLQ_STAND_IN") == "1" and not torch.cuda.is_available()
if STAND_IN:
    from tests.gpu import stand_in

    LIBRARIES = stand_in.install()  # for as long as the process lives

DEVICE = stand_in.NAME if STAND_IN else "cuda"
MISSING = not STAND_IN and not torch.cuda.is_available()
# Arguments of a trainer; the stand-in has neither autocast nor pinned memory.
ON_DEVICE = {"use_cpu": False, "bf16": not STAND_IN, "dataloader_pin_memory": not STAND_IN}

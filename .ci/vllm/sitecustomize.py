"""Lets vLLM's CPU build import torchvision, whose package is made for CUDA builds of torch.

Python imports this by itself where the folder is on PYTHONPATH. torchvision describes operators of a library that cannot be
loaded beside a CPU build of torch, and fails. Here they get declarations without code: nothing in vLLM calls them.
Needless once there is a torchvision for the CPU build of torch that vLLM pins.
"""

import re
from importlib.util import find_spec
from pathlib import Path

if (spec := find_spec("torchvision")) is not None and spec.origin is not None and find_spec("torch") is not None:
    import torch

    source = Path(spec.origin).with_name("_meta_registrations.py").read_text("utf8")
    DECLARED = torch.library.Library("torchvision", "FRAGMENT")  # a name: what it declared ends with it
    for operator in sorted(set(re.findall(r'(?:register_meta\(|register_fake\()"(?:torchvision::)?(\w+)"', source))):
        DECLARED.define(f"{operator}(Tensor[] values) -> Tensor[]")

"""A stand-in for a GPU: tensors in main memory that say they are on another device, and refuse what tensors on a GPU refuse.

Where there is no GPU, `tests/integration/test_stand_in.py` runs the tests for a GPU on it. It finds tensors on the wrong device, the
commonest mistake that a CPU cannot show. It says nothing of speed, memory, kernels or half precision on a GPU.

Each tensor holds an ordinary one. An operation looks at the devices, runs on the held tensors, and holds what comes out.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "standin"
ATEN = torch.ops.aten
# They may read from one device and write to another.
COPIES = {ATEN._to_copy.default, ATEN.copy_.default}
# Their positions may be in main memory.
INDEXING = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN._index_put_impl_.default}
# They make a tensor of no elements and let the operation lengthen it, which a tensor that holds another cannot follow.
FACTORIES = ("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randperm")


class StandInTensor(torch.Tensor):
    """A tensor on the stand-in; ``held`` has its numbers."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> StandInTensor:
        strides, device = held.stride(), torch.device(NAME, 0)
        with torch.inference_mode(False):  # a view of a weight is no inference tensor, in inference mode either
            tensor = torch.Tensor._make_wrapper_subclass(
                cls, held.shape, strides=strides, dtype=held.dtype, device=device
            )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(operation, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None  # modules exchange such tensors, and do not set their data

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], *_: Any) -> StandInTensor:
        return StandInTensor(parts["held"])

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def __format__(self, form: str) -> str:
        return format(self.held, form)

    def __repr__(self, **kwargs: Any) -> str:
        return f"{NAME}:{self.held!r}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # a file has ordinary tensors


def run(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the held tensors; refuse tensors on several devices, as CUDA does."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd"):
        return operation.decompose(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    holders = [tensor for tensor in tensors if isinstance(tensor, StandInTensor)]
    inputs = [args[0], *args[2:3]] if operation in INDEXING else tensors
    elsewhere = [leaf for leaf in inputs if isinstance(leaf, torch.Tensor) and leaf.device.type != NAME and leaf.dim()]
    if holders and elsewhere and operation not in COPIES:
        found = ", ".join(f"{tensor.device} {tuple(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"{operation} got tensors on several devices: {found}.")
    target = kwargs.get("device") or (args[0] if operation in COPIES else (holders or tensors)[0]).device
    if torch.device(target).type == NAME and "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    of_held = {id(holder.held): holder for holder in holders}
    result = operation(
        *tree_map_only(StandInTensor, lambda holder: holder.held, args),
        **tree_map_only(StandInTensor, lambda holder: holder.held, kwargs),
    )

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        """What was changed in place is the tensor that came."""
        return of_held[id(tensor)] if id(tensor) in of_held else StandInTensor(tensor)

    return tree_map_only(torch.Tensor, hold, result) if torch.device(target).type == NAME else result


class Backend:
    """What PyTorch asks of a device by its name."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def device(self, number: int) -> AbstractContextManager[None]:
        return nullcontext()

    def manual_seed_all(self, seed: int) -> None:
        """Its random numbers are those of the CPU."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def install() -> list[torch.library.Library]:
    """Make the stand-in a device of this process, for good, and the one that trainers choose."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) makes an ordinary tensor, then moves it
    torch.autograd.set_multithreading_enabled(False)  # a backward pass within one ends the process otherwise
    os.environ["ACCELERATE_TORCH_DEVICE"] = NAME
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    every.fallback(lambda operation, *args, **kwargs: run(operation, args, kwargs), "PrivateUse1")
    aten.impl("_local_scalar_dense", lambda tensor: tensor.held.item(), "PrivateUse1")
    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(ATEN, packet), overload or "default")
        aten.impl(name, lambda *args, operation=operation, **kwargs: run(operation, args, kwargs), "PrivateUse1")
    return [every, aten]

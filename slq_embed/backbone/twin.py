"""A second module tree over the same weights: what is changed in its structure does not touch the backbone."""

from __future__ import annotations

import copy
import functools
from types import MethodType
from typing import TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)
_SHARED = ("_parameters", "_buffers")  # the dicts themselves, so that a weight that moves is moved in both


def twin_of(module: M, known: dict[nn.Module, nn.Module] | None = None) -> M:
    """Copy the modules, and share every parameter and buffer.

    Submodules of the twin can be replaced, and hooks put on them, without a trace in the original. Nothing is switched on
    or off: two threads may use the original and its twins at once.

    Args:
        module: A module with all its submodules.
        known: Twins that exist already; a module that occurs twice has one twin.
    """
    known = {} if known is None else known
    if module in known:
        return cast(M, known[module])
    twin = known[module] = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, (dict, set)) and name not in _SHARED:  # hooks among them
            vars(twin)[name] = copy.copy(value)
        elif isinstance(value, MethodType) and value.__self__ is module:
            vars(twin)[name] = MethodType(value.__func__, twin)
        elif isinstance(value, functools.partial) and value.args[:1] == (module,):  # accelerate wraps forward so
            vars(twin)[name] = functools.partial(value.func, twin, *value.args[1:], **value.keywords)
    vars(twin)["_modules"] = {
        name: None if child is None else twin_of(child, known) for name, child in module._modules.items()
    }
    return twin

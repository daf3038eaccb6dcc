"""Where latent queries start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Initialisation = Literal["normal", "zeros", "tokens"]


def initial_queries(init: Initialisation | Tensor, count: int, table: Tensor, seed: int | None) -> Tensor:
    """Latent queries ``(Q, H)``; see :meth:`slq_embed.SLQEncoder.from_backbone`.

    Raises:
        ValueError: If the initialisation is unknown or has another width, or there would be no query.
    """
    table, width = table.detach(), table.shape[1]
    if isinstance(init, Tensor):
        if init.ndim != 2 or init.shape[1] != width or not len(init):
            raise ValueError(
                f"init has the shape {tuple(init.shape)}, but (number of queries, {width}) is needed for this backbone."
            )
        return init
    if count < 1:
        raise ValueError(f"num_queries is {count}, but at least 1 is needed.")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    noise = torch.randn(count, width, generator=generator)
    choices: dict[str, Callable[[], Tensor]] = {
        "normal": lambda: noise * width**-0.5,
        "zeros": lambda: torch.zeros(count, width),
        "tokens": lambda: table.float().mean(dim=0).cpu() + noise * float(table.float().std()),
    }
    if init not in choices:
        raise ValueError(f"init is {init!r}, but one of {sorted(choices)} or a ({count}, {width}) tensor is needed.")
    return choices[init]()

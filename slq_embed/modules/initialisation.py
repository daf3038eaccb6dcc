"""Where latent queries start."""

from __future__ import annotations

from typing import Literal, get_args

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
    if init == "normal":
        return noise * width**-0.5
    if init == "zeros":
        return torch.zeros(count, width)
    if init == "tokens":
        return table.float().mean(dim=0).cpu() + noise * float(table.float().std())
    choices = sorted(get_args(Initialisation))
    raise ValueError(f"init is {init!r}, but one of {choices} or a ({count}, {width}) tensor is needed.")

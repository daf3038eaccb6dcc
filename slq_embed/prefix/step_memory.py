"""The prefixes of one training step, kept on the backbone's device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from slq_embed.prefix.passes import PrefixRow
from slq_embed.store.budget import free_bytes


class StepMemory:
    """Prefixes of one training step, for its second pass (GradCache) or for other query sets."""

    def __init__(self) -> None:
        self.budget: int | None = None
        """Most bytes: half of what is free on the device when the first prefix comes."""
        self.nbytes = 0
        self.rows: dict[bytes, PrefixRow] = {}
        self.open = False
        """Whether the model was told to train. No second pass comes to the rows of one that was not, such as the guide of a loss."""
        self.shared = False
        """Whether several query sets take the same step. Its rows then stay until :meth:`clear`."""
        self.used = False
        """Whether a pass with gradients has read these rows. GradCache runs a step first without gradients, then with them,
        so the next pass without gradients begins another step."""

    def __reduce__(self) -> tuple[type[StepMemory], tuple[()]]:
        return StepMemory, ()  # a copy of the model, or one in another process, begins without gigabytes of prefixes

    def begin(self, differentiated: bool) -> None:
        """A pass begins, with gradients or without; it may be the first of the next step."""
        if self.used and not differentiated and not self.shared:
            self.clear()
        self.used |= differentiated

    def keep(self, rows: Mapping[bytes, PrefixRow], differentiated: bool) -> None:
        """Keep what a pass computed, with gradients or without, if another pass may come to it: until a row does not fit the budget."""
        if not self.shared and (differentiated or not self.open):
            return
        for key, row in rows.items():
            if self.budget is None:
                device = next(layer for layer in row.layers if layer)[0].device
                self.budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else free_bytes(None)
            if self.nbytes + row.nbytes > self.budget:
                return
            self.nbytes += row.nbytes
            self.rows[key] = row

    def clear(self) -> None:
        """Forget the step."""
        self.rows.clear()
        self.nbytes = 0
        self.used = False

"""Prefixes kept for the next time: across epochs, captions, query sets and runs."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import psutil
import safetensors.torch
import torch
from torch import Tensor

from slq_embed.prefix.disk import DiskEntries
from slq_embed.prefix.passes import PrefixRow

Level = Literal["keys_values", "vision"]
Precision = Literal["exact", "bfloat16", "int8"]
Entry = dict[str, Tensor]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass
class StoreCounts:
    """What a store was asked for in this process.

    Args:
        reused: Prefixes that were read back.
        computed: Prefixes that the backbone had to run for.
        over_budget: Computed prefixes that were not kept, for lack of space.
    """

    reused: int = 0
    computed: int = 0
    over_budget: int = 0


class PrefixStore:
    """Keeps what the frozen backbone computed, in memory or in a folder.

    Attach it with ``model.prefix_store = PrefixStore(...)``. What does not fit the budget is computed again each
    time; nothing is thrown out to make room, because epochs come round in circles. Entries are named by backbone,
    precision, image processing, prompt and content, so a store never gives a prefix of something else, and other
    queries, losses, seeds and learning rates reuse it. A folder may be shared by processes: each prefix is computed by
    one of them.

    Args:
        folder: Where to keep prefixes; without one, in memory.
        budget: Most bytes: a number, ``"40GB"``, or by default half of the free memory (shared out among the processes
            of a machine), or what is there and four fifths of the free disk. Writers that fill a folder at once may
            pass it by a batch each.
        level: ``"keys_values"`` of all layers: only the queries remain to be run. ``"vision"``: the vision tower's
            features, several times smaller; the language model runs again, and texts are not kept.
        precision: How keys, values and features are kept: ``"exact"`` as computed, ``"bfloat16"``, or ``"int8"`` with
            a scale for each token and head.
        one_by_one: Whether each prefix gets a pass of its own. That takes longer at first, but makes its bits
            independent of what stood beside it, and so of whether that is forgotten later.

    Raises:
        ValueError: If an argument does not fit.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        budget: int | str | None = None,
        level: Level = "keys_values",
        precision: Precision = "exact",
        one_by_one: bool = False,
    ) -> None:
        for name, value, choices in (("level", level, Level), ("precision", precision, Precision)):
            if value not in get_args(choices):
                raise ValueError(f"{name} is {value!r}, but one of {get_args(choices)} is needed.")
        self.folder = None if folder is None else Path(folder)
        self.level, self.precision, self.one_by_one = level, precision, one_by_one
        self.counts = StoreCounts()
        self.full = False
        """Whether a prefix did not fit: from then on none is prepared to be kept, until some are forgotten."""
        self._memory: dict[bytes, Entry] = {}
        self._memory_bytes = 0
        free = free_bytes(self.folder) if budget is None else 0
        self._disk = None if self.folder is None else DiskEntries(self.folder)
        self.budget = free + self.nbytes if budget is None else parse_bytes(budget)

    def __repr__(self) -> str:
        where = "in memory" if self.folder is None else f"in {self.folder}"
        return (
            f"PrefixStore({where}: {len(self)} prefixes, {self.nbytes / 1e9:.2f} of {self.budget / 1e9:.2f} GB; "
            f"{self.level}, {self.precision}; reused {self.counts.reused}, computed {self.counts.computed}, "
            f"over the budget {self.counts.over_budget}, damaged {self.damaged})"
        )

    def __len__(self) -> int:
        return len(self._memory) if self._disk is None else len(self._disk)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self._memory_bytes if self._disk is None else self._disk.nbytes

    @property
    def damaged(self) -> int:
        """Entries of the folder that did not read back right, and were computed again."""
        return 0 if self._disk is None else self._disk.damaged

    @property
    def tag(self) -> bytes:
        """What of the settings is part of an entry's name."""
        return f"{self.level} {self.precision} {self.one_by_one}".encode()

    def lengths(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """Lengths in tokens of the prefixes that are kept."""
        if self._disk is not None:
            return self._disk.lengths(keys)
        return {key: _length(self._memory[key]) for key in keys if key in self._memory}

    def read(self, keys: Iterable[bytes]) -> dict[bytes, Entry]:
        """Entries of those that are kept."""
        if self._disk is None:
            found = {key: self._memory[key] for key in set(keys) if key in self._memory}
        else:
            found = {key: safetensors.torch.load(payload) for key, payload in self._disk.read(keys).items()}
        self.counts.reused += len(found)
        return found

    def write(self, entries: Mapping[bytes, Entry]) -> int:
        """Keep entries while the budget lasts; returns how many did not fit."""
        new = [key for key in entries if key not in self._memory]
        payloads = {} if self._disk is None else {key: safetensors.torch.save(entries[key]) for key in new}
        left, fitting = self.budget - self.nbytes, []
        for key in new:
            size = _nbytes(entries[key]) if self._disk is None else len(payloads[key])
            if size <= left:
                fitting.append(key)
                left -= size
        self.full = len(fitting) < len(new)
        if self._disk is not None:
            self._disk.write({key: (payloads[key], _length(entries[key])) for key in fitting})
        else:
            self._memory |= {key: entries[key] for key in fitting}
            self._memory_bytes = self.budget - left
        return len(new) - len(fitting)

    def claim(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those that this process is to compute; others are being computed elsewhere."""
        return set(keys) if self._disk is None else self._disk.claim(keys)

    def release(self, keys: Iterable[bytes]) -> None:
        """End what :meth:`claim` began, whether or not the prefixes were kept."""
        if self._disk is not None:
            self._disk.release(keys)

    def wait(self, keys: Iterable[bytes]) -> None:
        """Wait until others have computed these or given up."""
        if self._disk is not None:
            self._disk.wait(keys)

    def forget(self, keys: Iterable[bytes]) -> int:
        """Remove prefixes for good; in a folder, their bytes are overwritten. Not while others write to it.

        In a folder this also overwrites what a killed writer has left behind.

        Returns:
            How many were there.
        """
        self.full = False
        if self._disk is not None:
            return self._disk.remove(keys)
        gone = [self._memory.pop(key) for key in set(keys) if key in self._memory]
        self._memory_bytes -= sum(map(_nbytes, gone))
        return len(gone)

    def close(self) -> None:
        """Close files; the entries of a folder stay."""
        if self._disk is not None:
            self._disk.close()

    def pack(self, row: PrefixRow) -> Entry:
        """A prefix as an entry, in main memory.

        Raises:
            ValueError: If the layers' states differ in shape.
        """
        shapes = {part.shape for layer in row.layers for part in layer}
        if len(shapes) > 1:
            raise ValueError(
                f"This backbone's layers keep states of different shapes ({sorted(map(tuple, shapes))}), which "
                'level="keys_values" cannot store. Use PrefixStore(level="vision").'
            )
        place = row.layers[0][0].device  # one copy to main memory, not two for each layer
        whole = torch.stack([torch.stack([keys.to(place), values.to(place)]) for keys, values in row.layers])
        return {"position": torch.tensor([row.last_position, row.axes]), **self.pack_states("states", whole)}

    def unpack(self, entry: Entry, dtype: torch.dtype, device: torch.device) -> PrefixRow:
        """The inverse of :meth:`pack`; keys and values may be in the stored precision."""
        whole = self.unpack_states("states", entry, dtype, device)
        last, axes = entry["position"].tolist()
        return PrefixRow(tuple((layer[0], layer[1]) for layer in whole), last, axes)

    def pack_states(self, name: str, states: Tensor) -> Entry:
        """States ``(..., width)`` in the store's precision."""
        if self.precision == "int8":
            scale = states.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
            return {name: (states / scale).round().to("cpu", torch.int8), f"{name}.scale": scale.cpu()}
        kept = torch.bfloat16 if self.precision == "bfloat16" else states.dtype
        return {name: states.to("cpu", kept, copy=True)}  # a copy, because rows are views of their batch

    def unpack_states(self, name: str, entry: Entry, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The inverse of :meth:`pack_states`."""
        states = entry[name].to(device, non_blocking=True)
        if self.precision == "int8":
            states = states.to(dtype) * entry[f"{name}.scale"].to(device, dtype, non_blocking=True)
        return states


class StepMemory:
    """Prefixes of one training step, for its second pass (GradCache) or for other query sets.

    Args:
        budget: Most bytes; by default half of what is free where the first prefix lies.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self.nbytes = 0
        self.rows: dict[bytes, PrefixRow] = {}
        self.used = False
        """Whether a pass with gradients has read from it, so that the next one without is another step."""

    def keep(self, rows: Mapping[bytes, PrefixRow]) -> None:
        """Keep rows while the budget lasts."""
        for key, row in rows.items():
            if self.budget is None:
                device = row.layers[0][0].device
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


def free_bytes(folder: Path | None) -> int:
    """What a store may take by default: half of the free memory, shared out, or four fifths of the free disk."""
    if folder is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun and accelerate
        return int(psutil.virtual_memory().available // (2 * processes))
    there = next(place for place in [folder.absolute(), *folder.absolute().parents] if place.exists())
    return shutil.disk_usage(there).free * 4 // 5


def parse_bytes(size: int | str) -> int:
    """A number of bytes, or a string such as ``"40GB"``.

    Raises:
        ValueError: If it is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(size), re.IGNORECASE)
    if match is None:
        raise ValueError(f'budget is {size!r}, but a number of bytes or a string such as "40GB" is needed.')
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _nbytes(entry: Entry) -> int:
    return sum(part.numel() * part.element_size() for part in entry.values())


def _length(entry: Entry) -> int:
    return int(entry["states"].shape[-2]) if "states" in entry else len(entry["input_ids"])

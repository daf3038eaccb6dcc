"""Where prefixes come from: what the current step or a store has kept, else the frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slq_embed.backbones import decoder_of, embedding_table
from slq_embed.features import select_rows, split_into_passes
from slq_embed.prefix import Prefix, PrefixRow, collate, run_all_positions, run_prefix
from slq_embed.prefix_keys import keys_from_tensor
from slq_embed.prefix_store import Entry, PrefixStore, StepMemory
from slq_embed.vision_features import join_rows, run_vision

T = TypeVar("T")


class PrefixSource:
    """Gives the prefix of a batch, computing each distinct input at most once.

    Args:
        backbone: The frozen multimodal LLM.
        pad_token: Id that padding has.
    """

    def __init__(self, backbone: PreTrainedModel, pad_token: int) -> None:
        self._backbone = (backbone,)
        self.pad_token = pad_token
        self.image_token = int(backbone.config.image_token_id)
        self.store: PrefixStore | None = None
        self.namespace = b""
        self.memory = StepMemory()
        self.shared = False
        """Whether several query sets take the same step, so that it is kept until :meth:`StepMemory.clear`."""

    def stored(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """Lengths of the prefixes that the store has."""
        return {} if self.store is None else self.store.lengths(keys)

    def prefix(self, features: dict[str, Any], training: bool = False) -> Prefix:
        """The prefix of a batch.

        Args:
            features: Left-padded features.
            training: Whether a training step asks: what it computes without autograd is kept for the second pass.
        """
        table = embedding_table(self._backbone[0])
        # What is kept must be what the backbone itself computes, not what a trainer's autocast makes of it.
        with torch.autocast(table.device.type, enabled=False) if self.store is not None else nullcontext():
            return self._prefix(features, training, table)

    def _prefix(self, features: dict[str, Any], training: bool, table: Tensor) -> Prefix:
        if "prefix_key" not in features:
            places = range(len(features["input_ids"]))
            computed = self._compute(features, places)
            return collate([computed[place] for place in places], table.device, table.dtype)
        keys = keys_from_tensor(features["prefix_key"])
        places_of = {key: place for place, key in reversed(list(enumerate(keys)))}
        memory, differentiated = self.memory, torch.is_grad_enabled()
        if not self.shared and memory.used and not differentiated:
            memory.clear()
        memory.used |= differentiated
        found = {key: memory.rows[key] for key in places_of if key in memory.rows}
        wanted = {key: place for key, place in places_of.items() if key not in found}
        if self.store is None:
            _require_inputs(features, wanted.values())
            computed = self._compute(features, list(wanted.values()))
            found |= {key: computed[place] for key, place in wanted.items()}
        elif self.store.level == "keys_values":
            found |= self._keys_and_values(self.store, features, wanted)
        else:
            found |= self._from_vision(self.store, features, wanted)
        if self.shared or (training and not differentiated):
            memory.keep({key: found[key] for key in wanted})
        return collate([found[key] for key in keys], table.device, table.dtype)

    def all_positions(self, features: dict[str, Any], queries: Tensor) -> Tensor:
        """States of the queries from passes over whole sequences, ``(batch, Q, H)``."""
        lengths = (features["attention_mask"].sum(dim=1) + len(queries)).tolist()
        decoder = decoder_of(self._backbone[0])
        states: dict[int, Tensor] = {}
        for group in split_into_passes(lengths, features["input_ids"].device):
            rows = run_all_positions(decoder, select_rows(features, group, self.image_token), queries)
            states |= dict(zip(group, rows, strict=True))
        return torch.stack([states[place] for place in range(len(lengths))])

    def _passes(self, features: dict[str, Any], places: Sequence[int]) -> list[list[int]]:
        lengths = features["attention_mask"].sum(dim=1).tolist()
        return self._group(places, [lengths[place] for place in places], features["input_ids"].device)

    def _group(self, members: Sequence[T], lengths: Sequence[int], device: torch.device) -> list[list[T]]:
        if self.store is not None and self.store.one_by_one:
            return [[member] for member in members]
        return [[members[place] for place in group] for group in split_into_passes(lengths, device)]

    def _compute(self, features: dict[str, Any], places: Sequence[int]) -> dict[int, PrefixRow]:
        found: dict[int, PrefixRow] = {}
        for group in self._passes(features, places):
            rows = run_prefix(decoder_of(self._backbone[0]), select_rows(features, group, self.image_token))
            found |= dict(zip(group, rows, strict=True))
        return found

    def _through(
        self,
        store: PrefixStore,
        wanted: Mapping[bytes, int],
        take: Callable[[dict[bytes, Entry]], None],
        compute: Callable[[dict[bytes, int]], dict[bytes, Callable[[], Entry]]],
    ) -> None:
        """Hand over what the store has; compute and keep the rest, unless another process is at it."""
        entries = store.read(wanted)
        take(entries)
        missing = {key: place for key, place in wanted.items() if key not in entries}
        while missing:
            mine = store.claim(missing)
            try:
                entries = store.read(missing)  # again: it may have come before the claim
                take(entries)
                made = compute({key: place for key, place in missing.items() if key in mine - set(entries)})
                store.counts.computed += len(made)
                over = len(made) if store.full else store.write({key: pack() for key, pack in made.items()})
                store.counts.over_budget += over
            finally:
                store.release(mine)
            missing = {key: place for key, place in missing.items() if key not in entries and key not in made}
            if missing:
                store.wait(missing)

    def _keys_and_values(
        self, store: PrefixStore, features: dict[str, Any], wanted: Mapping[bytes, int]
    ) -> dict[bytes, PrefixRow]:
        found: dict[bytes, PrefixRow] = {}
        table = embedding_table(self._backbone[0])

        def take(entries: dict[bytes, Entry]) -> None:
            found.update({key: store.unpack(entry, table.dtype, table.device) for key, entry in entries.items()})

        def compute(places: dict[bytes, int]) -> dict[bytes, Callable[[], Entry]]:
            _require_inputs(features, places.values())
            rows = self._compute(features, list(places.values()))
            new = {key: rows[place] for key, place in places.items()}
            found.update(new)
            return {key: partial(store.pack, row) for key, row in new.items()}

        self._through(store, wanted, take, compute)
        return found

    def _from_vision(
        self, store: PrefixStore, features: dict[str, Any], wanted: Mapping[bytes, int]
    ) -> dict[bytes, PrefixRow]:
        decoder, table = decoder_of(self._backbone[0]), embedding_table(self._backbone[0])
        seen = features["input_ids"] == self.image_token
        if (stored := features.get("prefix_stored")) is not None:
            seen = seen | stored[:, None]
        with_image = seen.any(dim=1).tolist()
        images = {key: place for key, place in wanted.items() if with_image[place]}
        texts = {key: place for key, place in wanted.items() if not with_image[place]}
        rows: dict[bytes, dict[str, Tensor]] = {}

        def states(name: str) -> bool:
            return name == "features" or name.startswith("deepstack.")

        def take(entries: dict[bytes, Entry]) -> None:
            for key, entry in entries.items():
                rows[key] = {
                    name: store.unpack_states(name, entry, table.dtype, table.device).to(table.dtype)
                    if states(name)
                    else value.to(table.device)
                    for name, value in entry.items()
                    if not name.endswith(".scale")
                }

        def pack(row: dict[str, Tensor]) -> Entry:
            entry: Entry = {}
            for name, value in row.items():
                entry |= store.pack_states(name, value) if states(name) else {name: value.cpu().clone()}
            return entry

        def compute(places: dict[bytes, int]) -> dict[bytes, Callable[[], Entry]]:
            _require_inputs(features, places.values())
            keys = {place: key for key, place in places.items()}
            for group in self._passes(features, list(keys)):
                made = run_vision(decoder, select_rows(features, group, self.image_token), self.image_token)
                rows.update({keys[place]: row for place, row in zip(group, made, strict=True)})
            return {key: partial(pack, rows[key]) for key in places}

        self._through(store, images, take, compute)
        computed = self._compute(features, list(texts.values()))
        found = {key: computed[place] for key, place in texts.items()}
        keys = list(images)
        for chosen in self._group(keys, [len(rows[key]["input_ids"]) for key in keys], table.device):
            joined = join_rows([rows[key] for key in chosen], self.pad_token)
            found |= dict(zip(chosen, run_prefix(decoder, joined), strict=True))
        return found


def _require_inputs(features: dict[str, Any], places: Iterable[int]) -> None:
    stored = features.get("prefix_stored")
    if stored is not None and stored[list(places)].any():
        raise RuntimeError(
            "A prefix was in the store when its batch was made, and is gone or damaged now. Do not detach or forget "
            "prefixes while a model trains from them; start again from the last checkpoint, it will be computed anew."
        )

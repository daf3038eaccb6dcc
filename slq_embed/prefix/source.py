"""Where prefixes come from: what the current step or a store has kept, else the frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slq_embed.backbone.families import decoder_of, embedding_table
from slq_embed.backbone.fingerprint import weights_digest
from slq_embed.prefix.features import Features, select_rows, split_into_passes
from slq_embed.prefix.keys import keys_from_tensor, tokenizer_digest
from slq_embed.prefix.passes import Prefix, PrefixRow, collate, run_all_positions, run_prefix
from slq_embed.prefix.store import Entry, PrefixStore, StepMemory
from slq_embed.prefix.vision import join_rows, run_vision

T = TypeVar("T")


class PrefixSource:
    """Gives the prefix of a batch, computing each distinct input at most once.

    Args:
        backbone: The frozen multimodal LLM.
        tokenizer: The tokenizer of its inputs.
    """

    def __init__(self, backbone: PreTrainedModel, tokenizer: Any) -> None:
        self._backbone = (backbone,)
        self._tokenizer = tokenizer
        self.pad_token = int(tokenizer.pad_token_id or 0)
        self.image_token = int(backbone.config.image_token_id)
        self.store: PrefixStore | None = None
        self.namespace = b""
        self.memory = StepMemory()
        self.shared = False
        """Whether several query sets take the same step, so that it is kept until :meth:`StepMemory.clear`."""

    def attach(self, store: PrefixStore | None) -> None:
        """Look prefixes up in a store from now on, or in none.

        Raises:
            ValueError: If a store of keys and values comes to a backbone that lies on several devices.
        """
        backbone = self._backbone[0]
        devices = {str(weight.device) for weight in backbone.parameters()}
        if store is not None and store.level == "keys_values" and len(devices) > 1:
            raise ValueError(
                f"The backbone lies on several devices ({', '.join(sorted(devices))}), but a store of keys and values "
                'brings them back to one. Use PrefixStore(level="vision"), or load the backbone on one device.'
            )
        self.namespace = b"" if store is None else store.tag + self._weights_digest + self._tokenizer_digest
        self.store = store

    @cached_property
    def _weights_digest(self) -> bytes:
        return weights_digest(self._backbone[0])

    @cached_property
    def _tokenizer_digest(self) -> bytes:
        return tokenizer_digest(self._tokenizer)

    def stored(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """Lengths of the prefixes that the store has."""
        return {} if self.store is None else self.store.lengths(keys)

    def prefix(self, features: Features, training: bool = False) -> Prefix:
        """The prefix of a batch.

        Args:
            features: See :mod:`slq_embed.prefix.features`.
            training: Whether a training step asks: what it computes without autograd is kept for the second pass.
        """
        table = embedding_table(self._backbone[0])
        # What is kept must be what the backbone itself computes, not what a trainer's autocast makes of it.
        with torch.autocast(table.device.type, enabled=False) if self.store is not None else nullcontext():
            return self._prefix(features, training, table)

    def _prefix(self, features: Features, training: bool, table: Tensor) -> Prefix:
        if "prefix_key" not in features:
            indices = range(len(features["input_ids"]))
            computed = self._compute(features, indices)
            return collate([computed[index] for index in indices], table.device, table.dtype)
        keys = keys_from_tensor(features["prefix_key"])
        index_of = {key: index for index, key in reversed(list(enumerate(keys)))}
        memory, differentiated = self.memory, torch.is_grad_enabled()
        if not self.shared and memory.used and not differentiated:
            memory.clear()
        memory.used |= differentiated
        found = {key: memory.rows[key] for key in index_of if key in memory.rows}
        wanted = {key: index for key, index in index_of.items() if key not in found}
        if self.store is None:
            _require_inputs(features, wanted.values())
            computed = self._compute(features, list(wanted.values()))
            found |= {key: computed[index] for key, index in wanted.items()}
        elif self.store.level == "keys_values":
            found |= self._keys_and_values(self.store, features, wanted)
        else:
            found |= self._from_vision(self.store, features, wanted)
        if self.shared or (training and not differentiated):
            memory.keep({key: found[key] for key in wanted})
        return collate([found[key] for key in keys], table.device, table.dtype)

    def all_positions(self, features: Features, queries: Tensor) -> Tensor:
        """States of the queries from passes over whole sequences, ``(batch, Q, H)``."""
        lengths = (features["attention_mask"].sum(dim=1) + len(queries)).tolist()
        decoder = decoder_of(self._backbone[0])
        states: dict[int, Tensor] = {}
        for group in split_into_passes(lengths, features["input_ids"].device):
            rows = run_all_positions(decoder, select_rows(features, group, self.image_token), queries)
            states |= dict(zip(group, rows, strict=True))
        return torch.stack([states[index] for index in range(len(lengths))])

    def _passes(self, features: Features, indices: Sequence[int]) -> list[list[int]]:
        lengths = features["attention_mask"].sum(dim=1).tolist()
        return self._group(indices, [lengths[index] for index in indices], features["input_ids"].device)

    def _group(self, members: Sequence[T], lengths: Sequence[int], device: torch.device) -> list[list[T]]:
        if self.store is not None and self.store.one_by_one:
            return [[member] for member in members]
        return [[members[index] for index in group] for group in split_into_passes(lengths, device)]

    def _compute(self, features: Features, indices: Sequence[int]) -> dict[int, PrefixRow]:
        found: dict[int, PrefixRow] = {}
        for group in self._passes(features, indices):
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
        missing = {key: index for key, index in wanted.items() if key not in entries}
        while missing:
            mine = store.claim(missing)
            try:
                entries = store.read(missing)  # again: it may have come before the claim
                take(entries)
                made = compute({key: index for key, index in missing.items() if key in mine - set(entries)})
                store.counts.computed += len(made)
                over = len(made) if store.full else store.write({key: pack() for key, pack in made.items()})
                store.counts.over_budget += over
            finally:
                store.release(mine)
            missing = {key: index for key, index in missing.items() if key not in entries and key not in made}
            if missing:
                store.wait(missing)

    def _keys_and_values(
        self, store: PrefixStore, features: Features, wanted: Mapping[bytes, int]
    ) -> dict[bytes, PrefixRow]:
        found: dict[bytes, PrefixRow] = {}
        table = embedding_table(self._backbone[0])

        def take(entries: dict[bytes, Entry]) -> None:
            found.update({key: store.unpack(entry, table.dtype, table.device) for key, entry in entries.items()})

        def compute(indices: dict[bytes, int]) -> dict[bytes, Callable[[], Entry]]:
            _require_inputs(features, indices.values())
            rows = self._compute(features, list(indices.values()))
            new = {key: rows[index] for key, index in indices.items()}
            found.update(new)
            return {key: partial(store.pack, row) for key, row in new.items()}

        self._through(store, wanted, take, compute)
        return found

    def _from_vision(
        self, store: PrefixStore, features: Features, wanted: Mapping[bytes, int]
    ) -> dict[bytes, PrefixRow]:
        decoder, table = decoder_of(self._backbone[0]), embedding_table(self._backbone[0])
        seen = features["input_ids"] == self.image_token
        if (stored := features.get("prefix_stored")) is not None:
            seen = seen | stored[:, None]
        with_image = seen.any(dim=1).tolist()
        images = {key: index for key, index in wanted.items() if with_image[index]}
        texts = {key: index for key, index in wanted.items() if not with_image[index]}
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

        def compute(indices: dict[bytes, int]) -> dict[bytes, Callable[[], Entry]]:
            _require_inputs(features, indices.values())
            keys = {index: key for key, index in indices.items()}
            for group in self._passes(features, list(keys)):
                made = run_vision(decoder, select_rows(features, group, self.image_token), self.image_token)
                rows.update({keys[index]: row for index, row in zip(group, made, strict=True)})
            return {key: partial(pack, rows[key]) for key in indices}

        self._through(store, images, take, compute)
        computed = self._compute(features, list(texts.values()))
        found = {key: computed[index] for key, index in texts.items()}
        keys = list(images)
        for chosen in self._group(keys, [len(rows[key]["input_ids"]) for key in keys], table.device):
            joined = join_rows([rows[key] for key in chosen], self.pad_token)
            found |= dict(zip(chosen, run_prefix(decoder, joined), strict=True))
        return found


def _require_inputs(features: Features, indices: Iterable[int]) -> None:
    stored = features.get("prefix_stored")
    if stored is not None and stored[list(indices)].any():
        raise RuntimeError(
            "A prefix was in the store when its batch was made, and is gone or damaged now. Do not detach or forget "
            "prefixes while a model trains from them; start again from the last checkpoint, it will be computed anew."
        )

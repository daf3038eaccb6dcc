"""Where prefixes come from: the memory of the current step, a store, or else the frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slq_embed.backbone.families import decoder_of, embedding_table, image_token_of, tokenizer_of
from slq_embed.backbone.fingerprint import tokenizer_digest, weights_digest
from slq_embed.inputs.rows import Row
from slq_embed.prefix.features import Features, select_rows, split_into_passes
from slq_embed.prefix.keys import keys_from_tensor, namespace_number
from slq_embed.prefix.packing import pack_row, pack_vision_row, unpack_row, unpack_vision_row
from slq_embed.prefix.passes import Prefix, PrefixRow, collate, run_prefix
from slq_embed.prefix.step_memory import StepMemory
from slq_embed.prefix.vision import join_rows, run_vision
from slq_embed.store.entries import Entry
from slq_embed.store.prefix_store import PrefixStore

T = TypeVar("T")


class PrefixSource:
    """Gives the prefix of a batch. Each distinct input is computed at most once.

    Args:
        backbone: The frozen multimodal LLM.
        processor: The processor of its inputs.
    """

    def __init__(self, backbone: PreTrainedModel, processor: Any) -> None:
        self._backbone = backbone
        self._tokenizer = tokenizer_of(processor)
        self.pad_token = int(self._tokenizer.pad_token_id or 0)
        self.image_token = image_token_of(backbone, processor)
        self.store: PrefixStore | None = None
        self.namespace = b""
        self.memory = StepMemory()

    def attach(self, store: PrefixStore | None) -> None:
        """Use a store, which can serve this backbone, from now on; or none."""
        self.namespace = b"" if store is None else store._tag + self._identity
        self.store = store

    @cached_property
    def _identity(self) -> bytes:
        return weights_digest(self._backbone) + tokenizer_digest(self._tokenizer)

    def require_storable(self, rows: Sequence[Row]) -> None:
        """Raise a ValueError if the store cannot keep anything of an input."""
        videos = [index for index, row in enumerate(rows) if row.videos]
        if videos and self.store is not None and self.store.level == "vision":
            raise ValueError(
                f"Input {videos[0]} of {len(rows)} has a video, and a store of vision features keeps none of videos. Use "
                'PrefixStore(level="keys_values").'
            )

    def stored(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """Lengths in tokens of the prefixes that the store has."""
        return {} if self.store is None else self.store._entries.lengths(keys)

    def prefix(self, features: Features) -> Prefix:
        """The prefix of a batch; see :mod:`slq_embed.prefix.features`.

        Raises:
            RuntimeError: If the batch was built with another store, or a prefix was there then and is not there any more.
        """
        table = embedding_table(self._backbone)
        # What is kept must be what the backbone itself computes, not what a trainer's autocast makes of it.
        with torch.autocast(table.device.type, enabled=False) if self.store is not None else nullcontext():
            return self._prefix(features, table)

    def _prefix(self, features: Features, table: Tensor) -> Prefix:
        numbers, ours = features.get("prefix_namespace"), namespace_number(self.namespace)
        theirs = None if numbers is None else int(numbers[0])
        # Where the other store had a prefix, the batch holds its length alone: nothing could be computed from it here.
        if theirs and theirs != ours:
            raise RuntimeError(
                "The batch was built with another prefix store than this model has. Do not attach or detach a store while a model "
                "trains. The guide of a loss gets the batch of the model that it guides: give it the same backbone and the same "
                "store (guide.prefix_store = model.prefix_store), or that model none."
            )
        if theirs != ours:  # no keys, or those of a model without a store, which do not name its weights
            everything = {index: index for index in range(len(features["input_ids"]))}
            by_index = self.in_passes(features, everything, run_prefix)
            return collate([by_index[index] for index in everything], table.device, table.dtype)
        keys = keys_from_tensor(features["prefix_key"])
        first_index = {key: index for index, key in reversed(list(enumerate(keys)))}
        memory, differentiated = self.memory, torch.is_grad_enabled()
        memory.begin(differentiated)
        rows = {key: memory.rows[key] for key in first_index if key in memory.rows}
        missing = {key: index for key, index in first_index.items() if key not in rows}
        if self.store is None:
            rows |= self.in_passes(features, missing, run_prefix)
        elif self.store.level == "keys_values":
            rows |= self._kept(self.store, features, missing, run_prefix, pack_row, unpack_row)
        else:
            rows |= self._from_vision(self.store, features, missing)
        memory.keep({key: rows[key] for key in missing}, differentiated)
        return collate([rows[key] for key in keys], table.device, table.dtype)

    def _group(self, members: Mapping[T, int], device: torch.device) -> list[list[T]]:
        """Members, each with its length in tokens, in passes."""
        names = list(members)
        if self.store is not None and self.store.one_by_one:
            return [[name] for name in names]
        return [[names[index] for index in group] for group in split_into_passes(list(members.values()), device)]

    def in_passes(self, features: Features, indices: Mapping[T, int], compute: Callable[..., Any]) -> dict[T, Any]:
        """Compute rows of a batch, in as many passes as memory asks for.

        Args:
            features: The batch.
            indices: For each name of a row, its index in the batch.
            compute: Gives a result for each row, from the decoder and the features of a pass.

        Returns:
            The results by the names of the rows.
        """
        _require_inputs(features, indices.values())
        lengths = features["attention_mask"].sum(dim=1).tolist()
        found: dict[T, Any] = {}
        for group in self._group(
            {name: lengths[index] for name, index in indices.items()}, features["input_ids"].device
        ):
            chosen = select_rows(features, [indices[name] for name in group])
            found |= dict(zip(group, compute(decoder_of(self._backbone), chosen), strict=True))
        return found

    def _kept(
        self,
        store: PrefixStore,
        features: Features,
        indices: Mapping[bytes, int],
        compute: Callable[..., list[Any]],
        pack: Callable[..., Entry],
        unpack: Callable[..., Any],
    ) -> dict[bytes, Any]:
        """Read what the store has. Compute and keep the rest, unless another process is computing it.

        Args:
            store: Where to look and to keep.
            features: The batch.
            indices: For each key, an index in the batch.
            compute: Computes rows, from decoder and features.
            pack: Makes an entry of a row, in the store's precision.
            unpack: Makes a row of an entry, in a dtype and on a device.

        Returns:
            For each key its row.
        """
        table, kept = embedding_table(self._backbone), store._entries
        rows: dict[bytes, Any] = {}

        def read(keys: Iterable[bytes]) -> None:
            rows.update({key: unpack(entry, table.dtype, table.device) for key, entry in kept.read(keys).items()})

        read(indices)
        while missing := [key for key in indices if key not in rows]:
            claimed = kept.claim(missing)
            try:
                read(missing)  # again: another process may have written it before the claim
                ours = {key: indices[key] for key in missing if key in claimed and key not in rows}
                computed = self.in_passes(features, ours, compute)
                store.counts.computed += len(computed)
                if kept.full:  # then do not pack in vain
                    store.counts.over_budget += len(computed)
                else:
                    packed = {key: pack(row, store.precision) for key, row in computed.items()}
                    store.counts.over_budget += kept.write(packed, store.budget)
                rows |= computed
            finally:
                kept.release(claimed)
            if others := set(missing) - rows.keys():
                kept.wait(others)
        return rows

    def _from_vision(
        self, store: PrefixStore, features: Features, indices: Mapping[bytes, int]
    ) -> dict[bytes, PrefixRow]:
        decoder, table = decoder_of(self._backbone), embedding_table(self._backbone)
        is_image = features["input_ids"] == self.image_token
        if (stored := features.get("prefix_stored")) is not None:
            is_image = is_image | stored[:, None]
        with_image = is_image.any(dim=1).tolist()
        images = {key: index for key, index in indices.items() if with_image[index]}
        texts = {key: index for key, index in indices.items() if not with_image[index]}

        def compute(decoder: PreTrainedModel, chosen: Features) -> list[dict[str, Tensor]]:
            return run_vision(decoder, chosen, self.image_token)

        vision = self._kept(store, features, images, compute, pack_vision_row, unpack_vision_row)
        rows = self.in_passes(features, texts, run_prefix)
        for group in self._group({key: len(vision[key]["input_ids"]) for key in images}, table.device):
            joined = join_rows([vision[key] for key in group], self.pad_token)
            rows |= dict(zip(group, run_prefix(decoder, joined), strict=True))
        return rows


def _require_inputs(features: Features, indices: Iterable[int]) -> None:
    stored = features.get("prefix_stored")
    if stored is not None and stored[list(indices)].any():
        raise RuntimeError(
            "A prefix was in the store when its batch was built, and is gone or damaged now. Do not forget prefixes "
            "while a model trains from them. Start again from the last checkpoint: the prefix will be computed again."
        )

"""What an encoder does once it is put together: encode, in many ways, and keep prefixes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from slq_embed.artifact import SLQConfig
from slq_embed.backbones import is_placed
from slq_embed.encoded_file import EncodedFile, encode_to_file
from slq_embed.encoding import INFERENCE_SETTINGS, Encoded, encode_query_sets, infer, stream
from slq_embed.fingerprint import Fingerprint, fingerprint, weights_sha256
from slq_embed.inputs import ONE_INPUT
from slq_embed.modules import LatentQueryTransformer
from slq_embed.prefix_store import PrefixStore


class LatentQueryEncoder(SentenceTransformer):
    """A Sentence Transformer whose first module is a :class:`LatentQueryTransformer`; use :class:`SLQEncoder`."""

    _failed_reload: str | None = None

    slq: SLQConfig
    """What will be recorded on saving."""

    @property
    def backbone(self) -> PreTrainedModel:
        """The frozen multimodal LLM: the same object that was passed in, ready to generate."""
        return self._latent.backbone

    @property
    def num_queries(self) -> int:
        """How many latent queries there are, ``Q``."""
        return len(self._latent.queries)

    @property
    def queries(self) -> nn.Parameter:
        """The latent queries, ``(Q, H)`` in float32: all that is trained."""
        return self._latent.queries

    @property
    def temperature(self) -> float | None:
        """The learned temperature, where a loss of this package trained one."""
        learned = self._log_temperature()
        return None if learned is None else math.exp(learned)

    def _log_temperature(self) -> float | None:
        learned = self._latent.log_temperature
        return self.slq.log_temperature if learned is None else float(learned.detach())

    @property
    def _latent(self) -> LatentQueryTransformer:
        module: Any = self[0]
        assert isinstance(module, LatentQueryTransformer)
        return module

    @property
    def transformers_model(self) -> PreTrainedModel | None:
        """The backbone."""
        return self.backbone

    @property
    def config(self) -> PretrainedConfig:
        """A copy of the backbone's configuration: the trainer writes the tokenizer's special tokens into it."""
        return self._config_copy

    @config.setter
    def config(self, value: PretrainedConfig) -> None:
        self._config_copy = value

    @cached_property
    def _config_copy(self) -> PretrainedConfig:
        return copy.deepcopy(self.backbone.config)

    @cached_property
    def backbone_fingerprint(self) -> Fingerprint:
        """The fingerprint that saving records; taken once, since the backbone is frozen."""
        return fingerprint(self.backbone)

    @property
    def prefix_store(self) -> PrefixStore | None:
        """What keeps the prefixes of everything that is trained on or encoded; set it to attach or detach one.

        Attaching reads all weights once, about 0.6 s for each GB, so that the store never answers for others.

        Raises:
            ValueError: On attaching a store of keys and values to a backbone that lies on several devices.
        """
        return self._latent.source.store

    @prefix_store.setter
    def prefix_store(self, store: PrefixStore | None) -> None:
        source = self._latent.source
        devices = {str(weight.device) for weight in self.backbone.parameters()}
        if store is not None and store.level == "keys_values" and len(devices) > 1:
            raise ValueError(
                f"The backbone lies on several devices ({', '.join(sorted(devices))}), but a store of keys and values "
                'brings them back to one. Use PrefixStore(level="vision"), or load the backbone on one device.'
            )
        source.namespace = b"" if store is None else store.tag + self._weights_sha256
        source.store = store

    @cached_property
    def _weights_sha256(self) -> bytes:
        return weights_sha256(self.backbone)

    def forget(self, inputs: Sequence[Any], prompt: str | None = None) -> int:
        """Remove the prefixes of inputs from the attached store for good.

        Training fresh queries from what is left gives the model that would have come of a store without them.

        Args:
            inputs: In the form in which they were trained on or encoded: an image file and the picture decoded
                from it are kept under different names.
            prompt: The one they had.

        Returns:
            How many prefixes were there.

        Raises:
            ValueError: If no store is attached.
        """
        if self.prefix_store is None:
            raise ValueError("There is nothing to forget: no prefix store is attached (model.prefix_store is None).")
        return self.prefix_store.forget(self._latent.prefix_keys(inputs, prompt))

    def is_singular_input(self, inputs: Any) -> bool:
        """Whether this is one input and not a batch; a path and a dict are one input."""
        return isinstance(inputs, ONE_INPUT) or bool(super().is_singular_input(inputs))

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Turn inputs into features; see :meth:`LatentQueryTransformer.preprocess`.

        The host's version would open a text that names a file, and would lose the prompt after a TypeError.
        """
        return self._latent.preprocess(inputs, prompt=prompt, **kwargs)

    num_workers: int | None = None
    """Processes that decode and preprocess while the model runs; by default up to 8 beside a GPU, 0 beside a CPU."""

    def encode(
        self, inputs: Any, *args: Any, query_sets: Mapping[str, LatentQueryEncoder] | None = None, **kwargs: Any
    ) -> Any:
        """Encode texts and images; as :meth:`SentenceTransformer.encode`, with one addition.

        Args:
            inputs: Texts, images, or both; see :func:`slq_embed.inputs.read_row`.
            *args: As for ``SentenceTransformer.encode``.
            query_sets: Encoders on the same backbone, by name: each input runs once, and each of them embeds it.
                Then only ``prompt``, ``prompt_name``, ``batch_size``, ``show_progress_bar``, ``convert_to_numpy``,
                ``convert_to_tensor`` and ``normalize_embeddings`` may be given.
            **kwargs: As for ``SentenceTransformer.encode``.

        Returns:
            As ``SentenceTransformer.encode``; with ``query_sets`` a dict of such results by name.

        Raises:
            ValueError: If an input cannot be read, or a query set does not fit.
        """
        self._refuse_after_failed_reload()
        if query_sets is None:
            return super().encode(inputs, *args, **kwargs)
        singular = self.is_singular_input(inputs)
        kwargs["prompt"] = self._resolve_prompt(kwargs.get("prompt"), kwargs.pop("prompt_name", None))
        found = encode_query_sets(self, [inputs] if singular else list(inputs), query_sets, *args, **kwargs)
        return {name: rows[0] for name, rows in found.items()} if singular else found

    def _inference(self, inputs: list[Any], **settings: Any) -> Any:
        # What encode does in one process. Hosts before 6.2 have a loop of their own in its place, which is right too.
        if settings["output_value"] != "sentence_embedding" or set(settings) - INFERENCE_SETTINGS:
            return super()._inference(inputs, **settings)
        if (device := settings.pop("device", None)) is not None and not is_placed(self.backbone):
            self.to(device)
        return infer(self, inputs, **settings)

    def encode_stream(
        self, inputs: Iterable[Any], *, batch_size: int = 32, prompt: str | None = None
    ) -> Iterator[Encoded]:
        """Encode any number of inputs and give results as they come; what cannot be read is skipped and listed.

        Args:
            inputs: Read 32 batches ahead, and sorted by size within those.
            batch_size: Inputs a batch.
            prompt: A system message.

        Yields:
            A batch of embeddings with the places of its inputs, not in the order of the inputs.
        """
        self._refuse_after_failed_reload()
        return stream(
            self,
            enumerate(inputs),
            batch_size=batch_size,
            prompt=prompt,
            strict=False,
            truncate_dim=self.truncate_dim,
        )

    def encode_to_file(self, inputs: Sequence[Any], path: str | Path, **options: Any) -> EncodedFile:
        """Encode into a memory-mapped file; a run that was killed goes on where it was.

        Args:
            inputs: Texts, images, or both, such as a list of paths.
            path: A ``.npy`` file.
            **options: See :func:`slq_embed.encoded_file.encode_to_file`.

        Returns:
            The embeddings, ``(len(inputs), H)``, and what was skipped.
        """
        self._refuse_after_failed_reload()
        return encode_to_file(self, inputs, Path(path), **options)

    def _refuse_after_failed_reload(self) -> None:
        if self._failed_reload is not None:
            raise RuntimeError(
                f"The best checkpoint ({self._failed_reload}) could not be loaded after training, so this model holds "
                "the last step's weights. The log says why. Load a checkpoint: SLQEncoder(folder), or accept the last "
                "weights: model.load_state_dict(model.state_dict())."
            )

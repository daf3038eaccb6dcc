"""A frozen multimodal LLM and the latent queries that are appended to whatever it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from sentence_transformers.base.modules.input_module import InputModule
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from slq_embed.backbones import decoder_of, embedding_table, is_placed
from slq_embed.inputs import read_row
from slq_embed.prefix import Prefix, run_all_positions, run_prefix, run_queries, strip_queries


class LatentQueryTransformer(InputModule):
    """Reads text, images or both, and returns the backbone's states at the query positions.

    The backbone is shared, not owned: it is no submodule, so optimizers, DDP and state dicts see the latent
    queries alone. It is frozen here, stays in ``eval()`` and is moved with the module.

    With gradients, the input (the prefix) runs once without autograd and only the queries are differentiated;
    without, everything runs as one sequence. Both give the same states.

    Args:
        backbone: A multimodal LLM.
        processor: Its processor, whose chat template ends with the query tokens and whose tokenizer pads left.
        queries: The latent queries, ``(Q, H)``; kept in float32 and cast where they are used.
        image_kwargs: How the image processor is called.

    Raises:
        ValueError: If the queries' width is not that of the backbone's token embeddings.

    Source:
        Shared latent queries, arXiv:2604.13710.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        processor: ProcessorMixin,
        queries: Tensor,
        image_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        width = embedding_table(backbone).shape[1]
        if queries.ndim != 2 or queries.shape[1] != width:
            raise ValueError(
                f"The latent queries have shape {tuple(queries.shape)}, but (number of queries, {width}) is needed "
                "for this backbone. Load them with the backbone they were trained on."
            )
        self._backbone = (backbone.eval().requires_grad_(False),)  # a tuple hides it from nn.Module
        self.processor = processor
        self.processor.tokenizer.padding_side = "left"
        self.image_kwargs = dict(image_kwargs or {})
        # Hosts exempt names with "bias" from weight decay (Trainer.get_decay_parameter_names, model.fit), and
        # decay must touch neither the queries nor a temperature: hence the name of this dict.
        self.bias = nn.ParameterDict({"queries": nn.Parameter(queries.detach().float().clone())})

    @property
    def backbone(self) -> PreTrainedModel:
        """The frozen multimodal LLM, ready to generate as well."""
        return self._backbone[0]

    @property
    def queries(self) -> nn.Parameter:
        """The latent queries, ``(Q, H)`` in float32."""
        return self.bias["queries"]

    @property
    def log_temperature(self) -> nn.Parameter | None:
        """Logarithm of the learnable temperature, a scalar, if a loss has asked for one."""
        return self.bias["log_temperature"] if "log_temperature" in self.bias else None  # noqa: SIM401 - no .get

    def require_log_temperature(self, initial: float) -> nn.Parameter:
        """The logarithm of a learnable temperature, made with an initial value where there is none.

        It lives beside the queries so that checkpoints carry it and DDP keeps it equal in all processes.
        """
        if "log_temperature" not in self.bias:
            self.bias["log_temperature"] = nn.Parameter(torch.tensor(float(initial), device=self.queries.device))
        return self.bias["log_temperature"]

    @property
    def modalities(self) -> list[Any]:
        """What can be encoded."""
        return ["text", "image", ("image", "text"), "message"]

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def max_seq_length(self) -> int:
        """No limit in tokens: the chat template caps the text in characters."""
        return int(self.tokenizer.model_max_length)

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Turn inputs into features.

        Args:
            inputs: Texts, images, or both; see :func:`slq_embed.inputs.read_row`.
            prompt: A system message.
            **kwargs: ``processing_kwargs={"image": {...}}`` for the image processor; the rest is ignored.

        Returns:
            ``input_ids`` and ``attention_mask``, ``(batch, seq)``, left-padded, the queries in the last ``Q``
            columns; image features for images.

        Raises:
            ValueError: If an input cannot be read; the message gives its place in ``inputs``.
        """
        if not inputs:
            return {}
        chats, images = [], []
        for place, value in enumerate(inputs):
            try:
                row = read_row(value)
            except ValueError as error:
                raise ValueError(f"Input {place} of {len(inputs)}: {error}") from error
            chats.append(row.messages(prompt))
            images.append(int(row.image is not None))
        changes = kwargs.get("processing_kwargs") or {}
        features = dict(
            self.processor.apply_chat_template(
                chats,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={
                    "text_kwargs": {"padding": True},
                    "images_kwargs": {**self.image_kwargs, **changes.get("image", {})},
                    "common_kwargs": {"return_tensors": "pt"},
                },
            )
        )
        if "pixel_values" in features:
            # GradCache losses cut the pixels of a batch by this.
            features["num_images_per_sample"] = torch.tensor(images)
        return features

    def prefix(self, features: dict[str, Any]) -> Prefix:
        """Run everything before the queries, without autograd."""
        return run_prefix(decoder_of(self.backbone), strip_queries(features, len(self.queries)))

    def query_states(self, prefix: Prefix) -> Tensor:
        """States of the queries after a prefix, ``(batch, Q, H)``; the prefix can be used once."""
        return run_queries(decoder_of(self.backbone), prefix, self._cast_queries())

    def all_positions(self, features: dict[str, Any]) -> Tensor:
        """States of the queries from one pass over the whole sequence, ``(batch, Q, H)``."""
        stripped = strip_queries(features, len(self.queries))
        return run_all_positions(decoder_of(self.backbone), stripped, self._cast_queries())

    def _cast_queries(self) -> Tensor:
        # Master weights stay float32 for the optimizer; only this copy is cast.
        table = embedding_table(self.backbone)
        return self.queries.to(table.device, table.dtype)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``token_embeddings``, the states of the queries, ``(batch, Q, H)`` in float32."""
        if torch.is_grad_enabled() and self.queries.requires_grad:
            states = self.query_states(self.prefix(features))
            if self.log_temperature is not None:
                # As an output of the forward pass, so that DDP knows it is used.
                features["log_temperature"] = self.log_temperature.clone()
        else:
            states = self.all_positions(features)
        features["token_embeddings"] = states.to(self.queries.device, torch.float32)
        return features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LatentQueryTransformer:
        """Move or cast the shared backbone; the queries only move, since the master copy is float32."""
        if recurse and not is_placed(self.backbone):
            self.backbone._apply(fn)
        device = fn(torch.empty(0, device=self.queries.device)).device
        super()._apply(lambda tensor: tensor.to(device), recurse)
        return self

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Refuse: a latent query module alone cannot be saved."""
        raise RuntimeError("LatentQueryTransformer is saved by SLQEncoder.save_pretrained, which writes stock modules.")

"""Loads an SLQ model on a backbone whose latent queries have a token type of their own (PaliGemma).

slq-embed writes this file into the saved folder. Plain Sentence Transformers runs it with ``trust_remote_code=True``. Without
it, the processor would give the queries the type of the input, whose tokens see each other.
"""

import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util.file_io import load_file_path


class QueryTypesTransformer(Transformer):
    """The host's ``Transformer`` with another token type at the last tokens, the latent queries."""

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        """Load the folder."""
        module = super().load(model_name_or_path, *args, **kwargs)
        hub = {name: kwargs.get(name) for name in ("token", "cache_folder", "revision", "local_files_only")}
        module.record = Path(load_file_path(model_name_or_path, "slq_config.json", **hub)).read_text("utf8")
        record = json.loads(module.record)
        module.query_ids, module.query_type = record["tokens"]["ids"], record["query_token_type"]
        # The host renders texts alone with the template of the tokenizer.
        module.tokenizer.chat_template = module.processor.chat_template
        return module

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Run the model."""
        ids = features["input_ids"]
        is_query = torch.isin(ids, ids.new_tensor(self.query_ids))
        types = features.get("token_type_ids", torch.zeros_like(ids)).masked_fill(is_query, self.query_type)
        end = int(is_query.any(dim=0).nonzero().max()) + 1  # the processor writes a line break after the queries
        cut = {"input_ids": ids, "attention_mask": features["attention_mask"], "token_type_ids": types}
        features.update({key: value[:, :end] for key, value in cut.items()})
        return super().forward(features, **kwargs)

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save the model, and the record that loading reads."""
        super().save(output_path, *args, **kwargs)
        (Path(output_path) / "slq_config.json").write_text(self.record, "utf8")

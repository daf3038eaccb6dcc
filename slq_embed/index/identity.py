"""Of which model an index is: the embeddings of another model cannot be compared with its embeddings."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from slq_embed.encoder import SLQEncoder
from slq_embed.encoding.protocol import encoder_digest, resolve_prompt


@dataclass(frozen=True)
class ModelIdentity:
    """The model of an index, without the model.

    Args:
        digest: From :func:`slq_embed.encoding.protocol.encoder_digest`; ``None`` where no model is known.
        name: For messages.
        document_prompt: With which its inputs were embedded, ``""`` for none; ``None`` where that is not known.
    """

    digest: str | None = None
    name: str | None = None
    document_prompt: str | None = None

    @classmethod
    def of(cls, model: SLQEncoder | None) -> ModelIdentity:
        """The identity of a model, as it is now."""
        if model is None:
            return cls()
        name = f"{len(model.queries)} queries on {model.slq_config.backbone}"
        return cls(encoder_digest(model), name, resolve_prompt(model, task="document") or "")

    def require(self, model: SLQEncoder | None) -> SLQEncoder:
        """Return the model if it is this one, or if none is known.

        Raises:
            ValueError: If it is another model, or there is none.
        """
        if model is None:
            raise ValueError(
                "This index has no model. Pass one to EmbeddingIndex, or use add_embeddings and search_embeddings."
            )
        if self.digest is not None and self.digest != encoder_digest(model):
            raise ValueError(
                f"The index was made with another model ({self.name}), whose embeddings cannot be compared with those "
                "of this one. Load that model, or build the index anew."
            )
        return model

    def require_document_prompt(self, model: SLQEncoder) -> None:
        """Refuse to add inputs with another prompt than those that are there, with a ValueError."""
        prompt = resolve_prompt(model, task="document") or ""
        if self.document_prompt not in (None, prompt):
            raise ValueError(
                f"The inputs of this index were embedded with the document prompt {self.document_prompt!r}, and the model now has "
                f"{prompt!r}. Set model.prompts['document'] to that of the index, or build the index anew."
            )


def dimension_of(model: SLQEncoder | None, dimension: int | None) -> int:
    """Numbers in an embedding of an index.

    Args:
        model: The encoder, if there is one.
        dimension: The dimension, if the caller gives one.

    Raises:
        ValueError: If neither is given, or they do not fit.
    """
    if model is None:
        if dimension is None:
            raise ValueError("An index needs a model, or the dimension of its embeddings: dimension=...")
        if (number := operator.index(dimension)) < 1:
            raise ValueError(f"dimension is {number}, but at least 1 is needed.")
        return number
    if not isinstance(model, SLQEncoder):
        raise ValueError(
            f"The model of an index is a {type(model).__name__}, but an SLQEncoder is needed. For another model, pass "
            "dimension=..., and its embeddings to add_embeddings and search_embeddings."
        )
    width = int(model.get_embedding_dimension() or 0)
    if dimension not in (None, width):
        raise ValueError(
            f"The index has dimension {dimension}, but this model's embeddings have {width} numbers. "
            "Pass the model of the index, or set the model's truncate_dim."
        )
    return width

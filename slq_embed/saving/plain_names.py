"""What plain loading must be told of a backbone, and where it would get wrong what was trained."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from slq_embed.backbone.families import decoder_of, embedding_scale


def key_mapping(backbone: PreTrainedModel) -> dict[str, str]:
    """What plain loading must be told of the names in a checkpoint, as ``key_mapping`` of ``from_pretrained``; mostly nothing.

    transformers takes the name of the decoder off the names of its weights, if the decoder's class says this name. LightOnOCR's
    does not (transformers 5.23), so all of its weights would be drawn at random.
    """
    decoder = decoder_of(backbone)
    if decoder is backbone or getattr(backbone, decoder.base_model_prefix, None) is decoder:
        return {}
    name = next(name for name, module in backbone.named_modules() if module is decoder)
    return {rf"^{name}\.": ""}


def require_plain_loading(backbone: PreTrainedModel, form: str, has_adapter: bool) -> None:
    """Raise a ValueError if plain loading would get the queries or an adapter wrong.

    peft replaces rows of the embedding table, and leaves out a norm that its layer applies to them (Muse Glimmer). transformers
    renames the weights of older checkpoints, and applies that to adapters too: its rules for DeepSeek-OCR-2 and Unlimited-OCR also
    match the names of today (transformers 5.23), so what was trained would be drawn at random.

    Args:
        backbone: The backbone.
        form: In which it is to be saved.
        has_adapter: Whether there is a query adapter, whose layers are named like the table of the queries.
    """
    if form == "adapter" and isinstance(embedding_scale(backbone), nn.Module):
        raise ValueError(
            f"A {backbone.config.model_type} normalises its token embeddings, which peft leaves out where it replaces rows. "
            "Use form='merged', which writes them into the table."
        )
    if form == "merged" and not has_adapter:
        return
    decoder = decoder_of(backbone)
    table = decoder.get_input_embeddings()
    path = next(name for name, module in decoder.named_modules() if module is table)
    if _renamed(decoder, f"{path}.weight") != f"{path}.weight":
        raise ValueError(
            f"transformers changes the names of an adapter's weights on a {backbone.config.model_type}, so it would not find them "
            "where the model is loaded. Use form='merged', without a query adapter."
        )


def _renamed(model: PreTrainedModel, name: str) -> str:
    for rule in get_model_conversion_mapping(model):
        if isinstance(rule, WeightRenaming):
            name = rule.rename_source_key(name)[0]
    return name

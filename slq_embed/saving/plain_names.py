"""Names of weights where transformers loads a backbone without its head, as plain Sentence Transformers lets it do."""

from __future__ import annotations

from contextlib import suppress

from transformers import PreTrainedModel

from slq_embed.backbone.families import decoder_of


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


def require_kept_names(backbone: PreTrainedModel, form: str, has_adapter: bool) -> None:
    """Raise a ValueError if plain loading would look for an adapter's weights under names that are not theirs.

    transformers renames the weights of older checkpoints, and applies that to adapters too. The rules of DeepSeek-OCR-2 and
    Unlimited-OCR also match the names of today (transformers 5.23), so what was trained would be drawn at random.

    Args:
        backbone: The backbone.
        form: In which it is to be saved.
        has_adapter: Whether there is a query adapter, whose layers are named like the table of the queries.
    """
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
    with suppress(ImportError, AttributeError):  # older versions rename in other ways
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        for rule in get_model_conversion_mapping(model):
            if isinstance(rule, WeightRenaming):
                name = rule.rename_source_key(name)[0]
    return name

"""Whether features of the vision tower can be kept on a backbone: found by running it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from slq_embed.backbone.families import FAMILIES, decoder_of, embedding_table
from slq_embed.backbone.lock import lock_of
from slq_embed.backbone.self_check import VALUE, features_of, first_line, samples
from slq_embed.prefix.passes import collate, run_prefix
from slq_embed.prefix.vision import join_rows, run_vision


@torch.no_grad()
def vision_refusal(transformer: Any) -> str | None:
    """Why the features of the vision tower cannot be kept and used again, found by running it; None if they can.

    They must give what the pixels give, and in a batch each image its own. Known families need no run.
    """
    backbone, source = transformer.backbone, transformer.source
    decoder, table = decoder_of(backbone), embedding_table(backbone)
    if not transformer.reader.reads_images:
        return "it reads texts only"
    if "mm_encoder_outputs" not in inspect.signature(decoder.forward).parameters:
        return "this version of transformers cannot run it on them (there is no mm_encoder_outputs)"
    if backbone.config.model_type in FAMILIES:
        return None

    def vectors(features: Any) -> Tensor:
        states = transformer.query_states(collate(run_prefix(decoder, features), table.device, table.dtype))
        return torch.nn.functional.normalize(states.mean(dim=1), dim=-1)

    try:
        with lock_of(backbone):
            alone = [features_of(transformer, [value]) for value in samples(True) if not isinstance(value, str)]
            kept = [run_vision(decoder, one, source.image_token)[0] for one in alone]
            expected = torch.cat([vectors(one) for one in alone])
            found = torch.cat([vectors(join_rows([row], source.pad_token)) for row in kept])
            together = vectors(join_rows(kept, source.pad_token))
    except Exception as error:
        return f"a run on them fails ({first_line(error)})"
    # In a batch, half precision rounds otherwise, so there the nearest one tells whose image it was.
    nearest = (together @ expected.T).argmax(dim=1).tolist()
    apart = float((found - expected).abs().max())
    return None if apart <= VALUE and nearest == list(range(len(alone))) else "a run on them gives other embeddings"

"""Rows that are processed one by one: joined, cut and joined again, they stay what they were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from slq_embed import SLQEncoder
from slq_embed.prefix.features import lay_out, select_rows
from tests.families import llava, others, qwen
from tests.families.building import write

# Tiles padded to the most, patches side by side in one long image, patches counted over the batch, tiles on another axis.
BUILDERS = {
    "llava_next": llava.llava_next,
    "minicpmv4_6": qwen.minicpmv4_6,
    "molmo2": others.molmo2,
    "perception_lm": llava.perception_lm,
}
OPTIONS = {"perception_lm": {"image_kwargs": {"vision_input_type": "thumb+tile"}}}

pytestmark = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="measured with 5.23")


@pytest.fixture(scope="module", params=BUILDERS)
def encoder(request, tmp_path_factory) -> SLQEncoder:
    name = request.param
    if name == "perception_lm":
        pytest.importorskip("timm")
    folder: Path = write(tmp_path_factory.mktemp(name), BUILDERS[name]())
    return SLQEncoder.from_backbone(folder, num_queries=2, seed=0, device="cpu", **OPTIONS.get(name, {}))


def vectors(encoder: SLQEncoder, features: Any) -> torch.Tensor:
    with torch.no_grad():
        states = encoder.transformer.query_states(encoder.transformer.source.prefix(features))
    return torch.nn.functional.normalize(states.mean(dim=1), dim=-1)


def test_rows_are_the_same_alone_joined_and_cut(encoder, images):
    module = encoder.transformer
    rows: list[Any] = [images[0], "a text", images[1], {"text": "both", "image": images[3]}]
    together = module.preprocess(rows, keyed=False)
    assert all(
        [bool(count) for count in counts] == [True, False, True, True] for counts in together["media"].pieces.values()
    )
    alone = torch.cat([vectors(encoder, module.preprocess([row], keyed=False)) for row in rows])
    assert (vectors(encoder, together) - alone).abs().max() < 1e-5
    chosen = [3, 0, 3]
    cut = select_rows(together, chosen)
    assert (vectors(encoder, cut) - alone[chosen]).abs().max() < 1e-5
    texts = lay_out(select_rows(together, [1]))
    assert texts.keys() <= {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "media_pieces"}


def test_videos_are_the_same_alone_and_joined(encoder, images):
    """Molmo2 numbers the patches of each row's own videos, too."""
    if not encoder.transformer.reader.reads_videos:
        with pytest.raises(ValueError, match="reads no videos"):
            encoder.transformer.preprocess([{"video": [images[0]] * 4}])
        return
    frames = [torch.randint(256, (8, 3, 40, 48), generator=torch.Generator().manual_seed(n)).byte() for n in (0, 1)]
    rows: list[Any] = [
        {"video": {"array": part, "video_metadata": {"fps": 2.0, "total_num_frames": 8}}} for part in frames
    ]
    rows.append("a text")
    alone = torch.cat([vectors(encoder, encoder.transformer.preprocess([row], keyed=False)) for row in rows])
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    joined = encoder.transformer.preprocess(rows[::-1], keyed=False)
    assert (vectors(encoder, joined).flip(0) - alone).abs().max() < 1e-5

"""A saved folder with a file that is missing or was cut off: one error that says where, and no vectors."""

from __future__ import annotations

import pytest

from slq_embed import SLQEncoder
from tests.parts import build


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("slq_config.json", r"slq_config\.json is damaged, or a save was ended"),
        ("config_sentence_transformers.json", "A file of .*saved, or of its backbone, is damaged"),
        ("tokenizer.json", "A file of .*saved, or of its backbone, is damaged"),
        ("config.json", "A file of .*saved, or of its backbone, is damaged"),
        ("model.safetensors", "A file of .*saved, or of its backbone, is damaged"),
        ("latent_queries.safetensors", r"The latent queries in .*latent_queries\.safetensors cannot be read"),
    ],
)
def test_a_file_that_was_cut_off_is_said(checkpoint, tmp_path, name, message):
    build(checkpoint, form="merged").save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / name
    whole = file.read_bytes()
    for length in (0, len(whole) * 2 // 3):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=message):
            SLQEncoder(tmp_path / "saved", device="cpu")


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_folder_without_its_tokenizer_is_refused(checkpoint, tmp_path, form):
    """transformers makes up an empty one, with which vectors are wrong."""
    build(checkpoint, form=form).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"The tokenizer in .* is not the one of its model: tokenizer\.json is missing"
    ):
        SLQEncoder(tmp_path, device="cpu")

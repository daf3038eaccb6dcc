"""Arguments that do not fit are refused where they come in: the message says what came and what is needed."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from sentence_transformers import SentenceTransformer

from slq_embed import SLQEncoder, pretrained
from slq_embed.modules import LatentQueryTransformer
from slq_embed.saving.checkpoints import CheckpointState

NOT_LOADED = "a/backbone-that-takes-minutes-to-load"


@pytest.mark.parametrize("form", ["bogus", "Adapter", ""])
def test_a_form_that_there_is_not_is_refused(encoder, tmp_path, form):
    message = rf"form is '{form}', but one of \('adapter', 'merged'\) is needed"
    with pytest.raises(ValueError, match=message):
        SLQEncoder.from_backbone(NOT_LOADED, form=form)
    with pytest.raises(ValueError, match=message):
        encoder.save_pretrained(tmp_path / "slq", form=form)
    assert not (tmp_path / "slq").exists()
    assert encoder.slq_config.form == "adapter"
    encoder.save_pretrained(tmp_path / "slq")


@pytest.mark.parametrize("shape", [(4,), (0, 32), (4, 16)])
def test_queries_of_another_shape_are_refused(checkpoint, shape):
    with pytest.raises(ValueError, match=rf"init has the shape {re.escape(str(shape))}, but \(number of queries, 32\)"):
        SLQEncoder.from_backbone(checkpoint(), init=torch.zeros(shape))


@pytest.mark.parametrize("count", [0, -1])
def test_no_queries_are_refused(encoder, checkpoint, count):
    for build in (encoder.with_queries, lambda count: SLQEncoder.from_backbone(checkpoint(), num_queries=count)):
        with pytest.raises(ValueError, match=f"num_queries is {count}, but at least 1 is needed"):
            build(count)


@pytest.mark.parametrize("pixels", [0, -4])
def test_images_of_no_pixels_are_refused(checkpoint, pixels):
    with pytest.raises(ValueError, match=f"max_pixels is {pixels}, but at least 1 is needed"):
        SLQEncoder.from_backbone(checkpoint(), max_pixels=pixels)


@pytest.mark.parametrize("setting", ["dtype", "attn_implementation", "quantization_config"])
def test_settings_of_a_loaded_backbone_are_refused(encoder, tmp_path, setting):
    given = {setting: "eager"}
    message = rf"loaded already, so {setting} came too late.*from_pretrained\(\.\.\., {setting}="
    with pytest.raises(ValueError, match=message):
        SLQEncoder.from_backbone(encoder.backbone, **given)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        SLQEncoder(tmp_path, backbone=encoder.backbone, model_kwargs=given)
    assert SLQEncoder(tmp_path, backbone=encoder.backbone, model_kwargs={setting: None}).backbone is encoder.backbone


def test_what_is_no_backbone_is_refused_by_its_type(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    for wrong, name in ((encoder, "SLQEncoder"), (torch.nn.Linear(2, 2), "Linear"), (b"a", "bytes")):
        message = f"^backbone is a {name}, but a hub name, a folder or a loaded .*pass its transformers_model"
        with pytest.raises(ValueError, match=message):
            SLQEncoder.from_backbone(wrong)
        with pytest.raises(ValueError, match=message):
            SLQEncoder(tmp_path, backbone=wrong)
    assert SLQEncoder.from_backbone(encoder.transformers_model).backbone is encoder.backbone


@pytest.mark.parametrize("longest", [0, -3, "10", 2.0, True, None])
def test_texts_of_no_length_are_refused(longest):
    with pytest.raises(ValueError, match=rf"max_text_chars is {longest!r}, but an int of at least 1 is needed"):
        SLQEncoder.from_backbone(NOT_LOADED, max_text_chars=longest)


def test_a_limit_in_tokens_is_refused(encoder):
    before = encoder.max_seq_length
    with pytest.raises(AttributeError, match=r"max_seq_length cannot be set.*from_backbone\(\.\.\., max_text_chars="):
        encoder.max_seq_length = 256
    assert encoder.max_seq_length == before


@pytest.mark.parametrize("build", [SLQEncoder, SLQEncoder.from_backbone], ids=["load", "from_backbone"])
def test_another_backend_is_refused(checkpoint, build):
    folder = pretrained("slq-tiny") if build is SLQEncoder else checkpoint()
    for name in (folder, NOT_LOADED):
        with pytest.raises(ValueError, match="backend is 'onnx', but an SLQEncoder computes in torch"):
            build(name, backend="onnx")
    assert build(folder, backend="torch").backend == "torch"


@pytest.mark.parametrize("build", [SLQEncoder, SLQEncoder.from_backbone], ids=["load", "from_backbone"])
def test_a_changed_configuration_is_not_dropped_without_a_word(build):
    with pytest.raises(
        ValueError, match=r"config_kwargs is {'hidden_size': 8}, but .* pass the loaded model as backbone"
    ):
        build(NOT_LOADED, config_kwargs={"hidden_size": 8})


def test_settings_of_the_backbone_are_named_where_a_saved_model_takes_them():
    message = r"dtype goes into model_kwargs .*SLQEncoder\(folder, model_kwargs=\{'dtype': \.\.\.\}\)"
    with pytest.raises(TypeError, match=message):
        SLQEncoder(NOT_LOADED, dtype="bfloat16")


def test_no_model_is_refused():
    with pytest.raises(ValueError, match=r"without a model.*SLQEncoder\.from_backbone"):
        SLQEncoder()


@pytest.mark.parametrize("build", [SLQEncoder, SLQEncoder.from_backbone], ids=["load", "from_backbone"])
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nofolder", "Check the name"),
        ("org/x", "Check the name"),
        ("slq-tiny", r"Did you mean pretrained\('slq-tiny'\)"),
        ("mllm-tiny", r"Did you mean pretrained\('mllm-tiny'\)"),
    ],
)
def test_a_name_under_which_there_is_nothing_is_given_back(build, name, hint):
    with pytest.raises(OSError, match=rf"^There is no folder '{name}', and the hub cannot be reached .*{hint}"):
        build(name)


def test_a_folder_or_a_hub_model_without_a_record_is_a_backbone(checkpoint, tmp_path, monkeypatch):
    for folder in (tmp_path, checkpoint()):
        with pytest.raises(ValueError, match=r"is no saved SLQ model: .* use SLQEncoder\.from_backbone"):
            SLQEncoder(folder)
    monkeypatch.setattr(
        "slq_embed.saving.loading.load_file_path",
        lambda name, file, **hub: str(checkpoint() / file) if file == "config.json" else None,
    )
    with pytest.raises(ValueError, match=r"^org/x is no saved SLQ model.*from_backbone\('org/x'\)"):
        SLQEncoder("org/x")


def test_what_plain_sentence_transformers_saved_is_told_from_a_backbone(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "ours")
    SentenceTransformer(str(tmp_path / "ours"), device="cpu").save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(
        ValueError, match=r"it has no slq_config\.json\. It is .* or one that plain SentenceTransformer saved"
    ):
        SLQEncoder(tmp_path / "theirs")


def test_a_folder_without_weights_is_there_but_holds_no_backbone(checkpoint, tmp_path):
    for file in checkpoint().iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    with pytest.raises(OSError, match=r"model\.safetensors") as caught:
        SLQEncoder.from_backbone(tmp_path)
    assert "There is no folder" not in str(caught.value)


def test_a_checkpoint_that_is_no_slq_model_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"is no saved SLQ model: it has no slq_config\.json"):
        CheckpointState(checkpoint())


def test_a_checkpoint_of_a_loss_without_a_temperature_is_loaded(encoder, tmp_path):
    """As those of the host's losses."""
    encoder.save_pretrained(tmp_path)
    expected = encoder.queries.detach().clone()
    with torch.no_grad():
        encoder.queries.zero_()
    encoder.load_state_dict(CheckpointState(tmp_path))
    assert torch.equal(encoder.queries, expected)
    assert encoder.temperature is None


def test_a_module_gets_queries_of_its_backbones_width_and_is_not_saved_alone(encoder, tmp_path):
    with pytest.raises(ValueError, match=r"have shape \(4, 16\), but \(number of queries, 32\) is needed"):
        LatentQueryTransformer(encoder.backbone, encoder.processor, torch.zeros(4, 16), ["<|slq_0|>"])
    with pytest.raises(RuntimeError, match=r"is saved by SLQEncoder\.save_pretrained"):
        encoder.transformer.save(str(tmp_path))


def test_a_backbone_on_several_devices_has_no_merged_form(encoder, tmp_path):
    encoder.backbone.hf_device_map = {"": "cpu"}
    with pytest.raises(ValueError, match=r"needs the whole backbone on one device\. Save the adapter form"):
        encoder.save_pretrained(tmp_path, form="merged")
    encoder.save_pretrained(tmp_path)


def test_what_a_chat_template_refuses_is_a_bad_input(encoder):
    encoder.processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        encoder.encode("a")

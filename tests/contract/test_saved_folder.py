"""The saved folder as a contract: its files and sizes, who loads it, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import re
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from transformers import AutoModelForImageTextToText, AutoProcessor

from slq_embed import SLQEncoder
from tests.checkpoints import build
from tests.families import others
from tests.families.building import write
from tests.forks import needs_fork


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


ROOT = {
    "README.md",
    "chat_template.jinja",
    "config_sentence_transformers.json",
    "modules.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "slq_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
MEAN = {
    "1_WordWeights/config.json",
    "1_WordWeights/model.safetensors",
    "2_Pooling/config.json",
    "3_Normalize/config.json",
}


def test_the_adapter_form_is_stock_modules_and_the_queries(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    assert files(tmp_path) == ROOT | MEAN | {"adapter_config.json", "adapter_model.safetensors"}
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    (queries,) = load_file(tmp_path / "adapter_model.safetensors").values()
    assert torch.equal(queries, encoder.queries)
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    assert adapter["token_indices"] == list(encoder.slq_config.tokens.ids)
    assert adapter["base_model_name_or_path"] == encoder.slq_config.backbone


def test_what_the_backbone_suppresses_stays_suppressed(checkpoint, tmp_path):
    encoder = SLQEncoder.from_backbone(checkpoint(), num_queries=4, device="cpu", form="merged")
    encoder.backbone.generation_config.suppress_tokens = [5]
    encoder.save_pretrained(tmp_path / "once")
    SLQEncoder(tmp_path / "once").save_pretrained(tmp_path / "twice")
    for folder in ("once", "twice"):
        generation = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert generation["suppress_tokens"] == [5, *encoder.slq_config.tokens.ids]


def test_the_merged_form_is_the_whole_model(encoder, tmp_path):
    encoder.save_pretrained(tmp_path, form="merged")
    whole = {"config.json", "generation_config.json", "latent_queries.safetensors", "model.safetensors"}
    assert files(tmp_path) == ROOT | MEAN | whole
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(encoder.slq_config.tokens.ids)
    # It still chats, with the learned rows in place and the backbone in memory untouched.
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    rows = model.get_input_embeddings().weight[list(encoder.slq_config.tokens.ids)]
    assert torch.equal(rows, encoder.queries)
    assert not torch.equal(encoder.backbone.get_input_embeddings().weight[list(encoder.slq_config.tokens.ids)], rows)
    answer = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=20, do_sample=False)
    assert not set(answer[0].tolist()) & set(encoder.slq_config.tokens.ids)


def test_at_a_real_vocabulary_the_folder_stays_small(tmp_path):
    """Adapter form beside a 152k vocabulary: weights under 1 MB at H = 4096 and N = 32, the rest under 5 MB."""
    backbone = build(tmp_path / "big", rows=151_936)
    encoder = SLQEncoder.from_backbone(backbone, num_queries=32, seed=0, device="cpu")
    encoder.save_pretrained(tmp_path / "slq")
    tokenizer = (tmp_path / "slq" / "tokenizer.json").stat().st_size
    total = sum((tmp_path / "slq" / name).stat().st_size for name in files(tmp_path / "slq"))
    assert total - tokenizer < 5_000_000
    weights = (tmp_path / "slq" / "adapter_model.safetensors").stat().st_size
    assert weights + 32 * (4096 - 32) * 4 < 1_000_000
    stock = SentenceTransformer(str(tmp_path / "slq"), device="cpu")
    assert np.abs(stock.encode(["hi"]) - encoder.encode(["hi"])).max() < 1e-6


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_reloading_gives_the_same_bits(encoder, mixed, form, tmp_path):
    encoder.save_pretrained(tmp_path, form=form)
    again = SLQEncoder(tmp_path)
    assert np.array_equal(again.encode(mixed), encoder.encode(mixed))
    again.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path) - {"again"} - {
        f for f in files(tmp_path) if f.startswith("again")
    }


def test_an_adapter_saved_from_a_merged_model_names_that_model(encoder, mixed, tmp_path):
    encoder.save_pretrained(tmp_path / "merged", form="merged")
    SLQEncoder(tmp_path / "merged").save_pretrained(tmp_path / "adapter", form="adapter")
    expected = encoder.encode(mixed)
    assert np.array_equal(SLQEncoder(tmp_path / "adapter").encode(mixed), expected)
    assert np.abs(SentenceTransformer(str(tmp_path / "adapter"), device="cpu").encode(mixed) - expected).max() < 1e-6


def test_the_last_query_alone_needs_no_weights(checkpoint, mixed, tmp_path):
    encoder = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, pooling="last", device="cpu")
    encoder.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*WordWeights"))
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    assert np.abs(stock.encode(mixed) - encoder.encode(mixed)).max() < 1e-6


def test_prompts_truncation_and_precision_agree_with_stock(checkpoint, mixed, tmp_path):
    prompts = {"query": "find the picture", "document": ""}
    encoder = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cpu", prompts=prompts)
    encoder.save_pretrained(tmp_path)
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    assert stock.prompts == encoder.prompts == prompts
    for call in (
        lambda m: m.encode_query(mixed),
        lambda m: m.encode_document(mixed),
        lambda m: m.encode(mixed, prompt="another"),
        lambda m: m.encode(mixed, truncate_dim=8, normalize_embeddings=True),
    ):
        assert np.abs(call(encoder) - call(stock)).max() < 1e-6
    assert np.abs(encoder.encode_query(mixed) - encoder.encode_document(mixed)).max() > 1e-3
    assert encoder.encode(mixed, precision="binary").dtype == np.int8
    scores = encoder.similarity(encoder.encode(mixed), encoder.encode(mixed))
    assert torch.allclose(scores.diagonal(), torch.ones(len(mixed)), atol=1e-5)


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_processes_of_the_host_encode_the_same(encoder, mixed, monkeypatch):
    """They are spawned, so the model is pickled; here they are forked, because a spawned one imports for seconds."""
    expected = encoder.encode(mixed)
    assert np.array_equal(pickle.loads(pickle.dumps(encoder)).encode(mixed), expected)
    monkeypatch.setattr(
        "sentence_transformers.base.model.mp.get_context", lambda _: multiprocessing.get_context("fork")
    )
    assert np.abs(encoder.encode(mixed, device=["cpu", "cpu"]) - expected).max() < 1e-6


def test_threads_share_a_stock_model(encoder, mixed, tmp_path):
    """As in a web service, whose requests come in threads."""
    encoder.save_pretrained(tmp_path)
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    chosen = [n % len(mixed) for n in range(48)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: stock.encode([mixed[n], *mixed[: n % 3]])[0], chosen))
    assert np.abs(np.stack(found) - encoder.encode(mixed)[chosen]).max() < 1e-6


@pytest.mark.parametrize("kind", ["qwen3_vl", "internvl"])
def test_without_free_rows_the_merged_form_adds_them(tmp_path, mixed, kind):
    backbone = build(tmp_path / "full", kind, spare=0)
    with pytest.raises(ValueError, match="form='merged'"):
        SLQEncoder.from_backbone(backbone, num_queries=4)
    encoder = SLQEncoder.from_backbone(backbone, num_queries=4, seed=0, form="merged", device="cpu")
    rows = len(encoder.backbone.get_input_embeddings().weight)
    encoder.save_pretrained(tmp_path / "slq")
    assert len(encoder.backbone.get_input_embeddings().weight) == rows
    with pytest.raises(ValueError, match="too few rows"):
        encoder.save_pretrained(tmp_path / "adapter", form="adapter")
    stock = SentenceTransformer(str(tmp_path / "slq"), device="cpu")
    assert np.abs(stock.encode(mixed) - encoder.encode(mixed)).max() < 1e-6
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "slq")
    ids, before = torch.tensor([[5, 6, 7]]), encoder.backbone
    assert torch.allclose(whole(input_ids=ids).logits[..., :rows], before(input_ids=ids).logits, atol=1e-5)
    assert np.array_equal(SLQEncoder(tmp_path / "slq").encode(mixed), encoder.encode(mixed))


@pytest.fixture
def saved(tmp_path):
    backbone = build(tmp_path / "backbone")
    encoder = SLQEncoder.from_backbone(backbone, num_queries=4, seed=0, device="cpu")
    encoder.save_pretrained(tmp_path / "slq")
    return tmp_path


def test_an_absent_backbone_is_named_and_a_moved_one_can_be_given(saved):
    expected = SLQEncoder(saved / "slq").encode("a")
    shutil.move(saved / "backbone", saved / "elsewhere")
    with pytest.raises(OSError, match=r"was trained on the backbone .*backbone.*Bring it back, or say where it is"):
        SLQEncoder(saved / "slq")
    moved = SLQEncoder(saved / "slq", backbone=saved / "elsewhere")
    assert np.array_equal(moved.encode("a"), expected)
    moved.save_pretrained(saved / "again")
    assert np.array_equal(SLQEncoder(saved / "again").encode("a"), expected), "saving again records the new folder"


def test_a_wrong_backbone_that_is_given_does_not_take_the_name_of_the_recorded_one(saved):
    build(saved / "other", seed=1)
    recorded = f"^{saved / 'slq'} was trained on the backbone '{saved / 'backbone'}', but "
    with pytest.raises(ValueError, match=f"{recorded}'{saved / 'other'}' is another: its "):
        SLQEncoder(saved / "slq", backbone=saved / "other")
    with pytest.raises(OSError, match=f"{recorded}nothing can be loaded from '{saved / 'nowhere'}'"):
        SLQEncoder(saved / "slq", backbone=saved / "nowhere")


@pytest.mark.parametrize("change", ["weights", "one row", "rows", "config"])
def test_another_backbone_is_refused(saved, change):
    if change == "weights":
        build(saved / "backbone", seed=1)
    elif change == "rows":
        build(saved / "backbone", spare=80)
    else:
        model = AutoModelForImageTextToText.from_pretrained(saved / "backbone")
        if change == "one row":
            with torch.no_grad():
                model.get_input_embeddings().weight[77, 3] += 1
        else:
            model.config.text_config.rope_parameters["rope_theta"] = 5.0
        model.save_pretrained(saved / "backbone")
    with pytest.raises(ValueError, match=r"but this one is another: its .*would give wrong vectors"):
        SLQEncoder(saved / "slq")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_same_backbone_in_another_dtype_is_accepted(saved, dtype):
    assert SLQEncoder(saved / "slq", model_kwargs={"dtype": dtype}).backbone.dtype == dtype


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_backbone_whose_layers_alone_differ_is_refused(checkpoint, tmp_path, form):
    """As a merged LoRA leaves them: the token embeddings are the same."""
    SLQEncoder.from_backbone(checkpoint(), num_queries=4, device="cpu").save_pretrained(tmp_path / "slq", form=form)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        SLQEncoder(tmp_path / "slq", backbone=checkpoint(), model_kwargs={"dtype": dtype}, device="cpu")
    own = SLQEncoder(tmp_path / "slq", device="cpu").backbone
    SLQEncoder(tmp_path / "slq", backbone=own)
    tuned = AutoModelForImageTextToText.from_pretrained(checkpoint())
    layer = tuned.get_submodule("model.language_model.layers.1.self_attn.q_proj")
    with torch.no_grad():
        layer.weight += 0.01 * torch.randn(len(layer.weight), 1) @ torch.randn(1, layer.weight.shape[1])
    with pytest.raises(ValueError, match="this one is another: its layers differ"):
        SLQEncoder(tmp_path / "slq", backbone=tuned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "auto"])
def test_what_was_saved_from_float16_loads_in_any_precision(checkpoint, saved, tmp_path, dtype):
    options = {"num_queries": 4, "seed": 0, "device": "cpu", "dtype": torch.float16}
    SLQEncoder.from_backbone(checkpoint(), **options).save_pretrained(tmp_path / "built")
    SLQEncoder(saved / "slq", device="cpu").half().save_pretrained(tmp_path / "loaded")
    for name in ("built", "loaded"):
        SLQEncoder(tmp_path / name, device="cpu", model_kwargs={"dtype": dtype})
    record = [json.loads((folder / "slq_config.json").read_text()) for folder in (saved / "slq", tmp_path / "loaded")]
    assert record[0]["fingerprint"] == record[1]["fingerprint"], "a precision of a load is none of the model"
    (values := record[1]["fingerprint"])["table_sha256"] = "float16:0"
    values["table_sample"][0] += 0.5
    (tmp_path / "loaded" / "slq_config.json").write_text(json.dumps(record[1]))
    with pytest.raises(ValueError, match="token embeddings differ"):
        SLQEncoder(tmp_path / "loaded", device="cpu", model_kwargs={"dtype": dtype})


def test_a_float16_load_of_another_backbone_is_refused(saved):
    build(saved / "backbone", seed=1)
    with pytest.raises(ValueError, match="embeddings differ"):
        SLQEncoder(saved / "slq", model_kwargs={"dtype": torch.float16})


def test_a_loaded_backbone_is_shared_and_frozen(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint())
    processor = AutoProcessor.from_pretrained(checkpoint())
    template, words = processor.chat_template, len(processor.tokenizer)
    encoder = SLQEncoder.from_backbone(model, processor, num_queries=4)
    assert encoder.backbone is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (processor.chat_template, len(processor.tokenizer)) == (template, words), "the caller's processor is theirs"
    other = SLQEncoder.from_backbone(model, processor, num_queries=6)
    assert other.backbone is encoder.backbone
    assert encoder.encode("a").shape == other.encode("a").shape


def test_chat_is_bit_identical_before_between_and_after_encoding(encoder, mixed):
    ids = torch.tensor([[5, 6, 7, 8]])

    def answer():
        return encoder.backbone.generate(ids, max_new_tokens=12, do_sample=False)

    before = answer()
    encoder.encode(mixed)
    assert torch.equal(answer(), before)


def test_a_model_without_a_name_cannot_be_an_adapter(checkpoint, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint())
    model.config._name_or_path = model.name_or_path = ""
    processor = AutoProcessor.from_pretrained(checkpoint())
    encoder = SLQEncoder.from_backbone(model, processor, num_queries=4, device="cpu")
    with pytest.raises(ValueError, match="has no name"):
        encoder.save_pretrained(tmp_path / "slq")
    encoder.save_pretrained(tmp_path / "slq", form="merged")
    named = SLQEncoder.from_backbone(model, processor, num_queries=4, backbone_name=str(checkpoint()))
    named.save_pretrained(tmp_path / "named")
    with pytest.raises(ValueError, match="pass processor="):
        SLQEncoder.from_backbone(model)


def test_a_backbone_may_be_read_from_elsewhere_than_the_folder_names(checkpoint, tmp_path):
    """A copy on a local disk is read, and the hub name is recorded, for whoever gets the folder."""
    loaded = SLQEncoder.from_backbone(checkpoint(), num_queries=4, backbone_name="org/backbone", revision="main")
    loaded.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("org/backbone", None)


def test_wrong_folders_and_widths_get_a_clear_error(encoder, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"no saved SLQ model.*SLQEncoder\.from_backbone"):
        SLQEncoder(checkpoint())
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"saved SLQ model already. Load it with SLQEncoder"):
        SLQEncoder.from_backbone(tmp_path)
    with pytest.raises(ValueError, match=r"shape \(4, 16\), but \(number of queries, 32\)"):
        SLQEncoder.from_backbone(checkpoint(), init=torch.zeros(4, 16))
    config = json.loads((tmp_path / "slq_config.json").read_text())
    (tmp_path / "slq_config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(ValueError, match="Upgrade slq-embed"):
        SLQEncoder(tmp_path)
    (tmp_path / "slq_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read"):
        SLQEncoder(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="are missing"):
        SLQEncoder(tmp_path)


def test_the_model_card_is_right_and_its_snippet_runs(encoder, tmp_path, capsys):
    from tests.training import toy_pairs, toy_train

    toy_train(encoder, toy_pairs(), tmp_path / "run")
    encoder.save_pretrained(tmp_path / "slq")
    assert files(tmp_path / "slq") == ROOT | MEAN | {"adapter_config.json", "adapter_model.safetensors"}, (
        "no data in it"
    )
    card = (tmp_path / "slq" / "README.md").read_text()
    for stated in (
        "| Latent queries | 4 |",
        "| Parameters trained | 129 |",
        "| Loss | SymmetricInfoNCELoss |",
        f"| Temperature | {encoder.temperature:.6f} (learned) |",
        "8 rows of image and text",
        "vLLM serves a folder of `slq_embed.saving.export_vllm` right",
        encoder.slq_config.backbone.rsplit("/", 1)[-1],
    ):
        assert stated in card, f"{stated!r} is not in:\n{card}"
    assert str(tmp_path) not in card.replace(f'SentenceTransformer("{tmp_path}/slq")', "")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(snippet, {})
    assert "tensor([[1.0" in capsys.readouterr().out


def test_the_card_of_a_language_model_names_texts_only(encoder, tmp_path):
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("measured with 5.23")
    folder = write(tmp_path / "llama", others.llama())
    SLQEncoder.from_backbone(folder, num_queries=2, device="cpu").save_pretrained(tmp_path / "slq")
    card = (tmp_path / "slq" / "README.md").read_text()
    assert "on a frozen language model" in card
    assert "| Inputs | text; text is read up to" in card
    assert "image" not in card
    encoder.save_pretrained(tmp_path / "both")
    assert "| Inputs | text, images, videos, both with text; text" in (tmp_path / "both" / "README.md").read_text()


def test_modules_that_a_folder_would_not_have_are_refused(checkpoint, mixed, tmp_path):
    model = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cpu")
    model.save_pretrained(tmp_path / "slq")
    model.append(Dense(32, 8))
    with pytest.raises(ValueError, match=r"modules were changed \(LatentQueryTransformer, .*, Dense\)"):
        model.save_pretrained(tmp_path / "with")
    assert not (tmp_path / "with").exists()
    behind = SentenceTransformer(
        modules=[*SentenceTransformer(str(tmp_path / "slq"), device="cpu"), model[-1]], device="cpu"
    )
    assert np.abs(behind.encode(mixed) - model.encode(mixed)).max() < 1e-6

"""The self-check: what it accepts, what it refuses with which words, and what follows from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoProcessor

from slq_embed import PrefixStore, SLQEncoder
from slq_embed.backbone import check, families, self_check
from slq_embed.backbone.__main__ import main
from slq_embed.backbone.families import load_backbone
from slq_embed.backbone.query_tokens import private_processor
from slq_embed.prefix import passes
from tests.families import llava, newer_others, others, qwen
from tests.families.building import Parts, write

MIXED = ["hello", "a much longer text about red circles, blue squares and everything else that there is", "x"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Any:
    """Folders of tiny backbones, built once."""
    known: dict[str, Path] = {}

    def get(name: str, parts: Parts, seed: int = 0) -> Path:
        if name not in known:
            known[name] = write(tmp_path_factory.mktemp(name), parts, seed)
        return known[name]

    return get


def loaded(folder: Path, **options: Any) -> tuple[Any, Any]:
    return load_backbone(str(folder), **options), AutoProcessor.from_pretrained(folder)


def hybrid() -> Parts:
    """Each layer has attention and a state-space model side by side, which no prefix can hold."""
    sizes = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
    return others.text_only("falcon_h1", head_dim=8, **sizes)


@pytest.fixture
def llama(folders) -> Path:
    return folders("llama", others.llama())


def test_a_report_says_what_was_compared(llama):
    report = check(*loaded(llama))
    assert (report.schedule, report.reason, report.free_rows) == ("prefix", None, 64)
    assert all(finding.ok for finding in report.findings)
    text = str(report)
    assert text.startswith("llama (float32): prefix\n")
    for name in (
        "earlier tokens do not see later ones",
        "prefix path alone: value",
        "prefix path in a batch: gradient",
    ):
        assert name in text
    assert "64 free rows for queries" in text
    assert json.loads(json.dumps(report.to_dict()))["schedule"] == "prefix"
    assert report.seconds < 60


def test_rounding_is_estimated_only_where_results_are_apart(llama, monkeypatch):
    """The estimate runs every input once more."""
    monkeypatch.setattr(self_check, "_rounded", lambda *args: pytest.fail("it was estimated"))
    assert check(*loaded(llama)).schedule == "prefix"


def test_checking_leaves_no_trace(llama):
    model, processor = loaded(llama)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    template, vocabulary = processor.chat_template, processor.get_vocab()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    check(model, processor)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (processor.chat_template, processor.get_vocab()) == (template, vocabulary)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_by_its_own_error(llama, dtype):
    report = check(*loaded(llama, dtype=dtype))
    assert report.schedule == "prefix"
    limit = next(finding.allowed for finding in report.findings if finding.name == "prefix path in a batch: value")
    assert 1e-5 < limit <= 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_count_padding_are_found(llama, monkeypatch, dtype):
    """In half precision too: such an error is larger than rounding."""

    def counting(decoder: Any, features: Any) -> torch.Tensor:
        mask = features["attention_mask"]
        stride = 1 if mask.all() else 3  # far enough that relative positions differ too
        return torch.arange(mask.shape[1]).expand(mask.shape) * stride

    monkeypatch.setattr(passes, "token_positions", counting)
    report = check(*loaded(llama, dtype=dtype))
    assert report.schedule is None
    assert "other embeddings in a batch than alone" in str(report.reason)


def test_a_prefix_that_is_not_exact_is_not_taken(llama, monkeypatch):
    """The queries then run with the whole sequence."""
    run = passes.run_prefix

    def wrong(decoder: Any, features: Any) -> Any:
        return [passes.PrefixRow(row.layers, row.last_position + 5, row.axes) for row in run(decoder, features)]

    monkeypatch.setattr("slq_embed.prefix.source.run_prefix", wrong)
    report = check(*loaded(llama))
    assert report.schedule == "all_positions"
    assert next(finding.name for finding in report.findings if not finding.ok) == "prefix path alone: value"


def _off_by_one(row: passes.PrefixRow) -> passes.PrefixRow:
    return replace(row, last_position=row.last_position + 1)


def _without_the_first_token(row: passes.PrefixRow) -> passes.PrefixRow:
    return replace(row, layers=tuple(tuple(part[:, 1:] for part in layer) for layer in row.layers))


def _padding_is_seen(prefix: passes.Prefix) -> passes.Prefix:
    return replace(prefix, attention_mask=torch.ones_like(prefix.attention_mask))


def _neighbours_leak(prefix: passes.Prefix) -> passes.Prefix:
    """A hundredth of it."""

    def leaking(part: torch.Tensor) -> torch.Tensor:
        return part + 1e-2 * (part.roll(1, dims=0) - part)

    return replace(prefix, states={name: leaking(state) for name, state in prefix.states.items()})


@pytest.fixture(scope="module")
def many(folders) -> SLQEncoder:
    """60 queries on linear attention, whose gradients are 2e-4 apart by rounding."""
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("measured with transformers 5.23")
    folder = folders("qwen3_5", qwen.qwen3_5(), seed=1)
    return SLQEncoder.from_backbone(folder, num_queries=60, seed=1, device="cpu")


class TestManyQueries:
    """Linear attention rounds more where a query comes close to zero. The limit grows with that, and still finds errors."""

    def test_they_are_taken(self, many, folders):
        assert many.transformer.schedule == "prefix"
        again = SLQEncoder.from_backbone(
            folders("minicpmv4_7", qwen.minicpmv4_7()), num_queries=60, seed=0, device="cpu"
        )
        assert again.transformer.schedule == "prefix"

    @pytest.mark.parametrize("wrong", [_off_by_one, _without_the_first_token])
    def test_a_wrong_prefix_is_found(self, many, monkeypatch, wrong):
        run = passes.run_prefix
        monkeypatch.setattr("slq_embed.prefix.source.run_prefix", lambda *args: [wrong(row) for row in run(*args)])
        report = self_check.examine(many.transformer)
        assert report.schedule == "all_positions"
        assert "prefix path alone: value" in [finding.name for finding in report.findings if not finding.ok]

    @pytest.mark.parametrize("wrong", [_padding_is_seen, _neighbours_leak])
    def test_a_wrong_batch_is_found(self, many, monkeypatch, wrong):
        collate = passes.collate
        monkeypatch.setattr("slq_embed.prefix.source.collate", lambda *args: wrong(collate(*args)))
        report = self_check.examine(many.transformer)
        assert report.schedule == "all_positions"
        assert "prefix path in a batch: value" in [finding.name for finding in report.findings if not finding.ok]


def test_a_check_that_takes_long_is_announced(many, monkeypatch, caplog):
    self_check.examine(many.transformer)
    assert not caplog.records
    monkeypatch.setattr(self_check, "_LONG_S", 0.0)
    report = self_check.examine(many.transformer)
    (record,) = caplog.records
    assert f"self-check of this {report.model_type} takes about" in record.getMessage()


def test_text_attention_in_both_directions_is_refused(folders):
    parts = others.text_only("gemma3_text", use_bidirectional_attention=True, head_dim=8)
    folder = folders("both", parts)
    for count in (1, 3):
        with pytest.raises(
            ValueError, match=r"gemma3_text: it lets earlier tokens see later ones, so its inputs would see"
        ):
            SLQEncoder.from_backbone(folder, num_queries=count, device="cpu")


def test_a_norm_does_not_hide_attention_in_both_directions(folders):
    """The sum of what leaves a fresh LayerNorm is constant, so its gradient is zero whatever a token sees."""
    report = check(*loaded(folders("norm", others.text_only("megatron-bert"))))
    assert report.schedule is None
    assert "lets earlier tokens see later ones" in str(report.reason)


def test_positions_that_plain_sentence_transformers_would_count_from_the_padding_are_refused(folders):
    """GPT-2 learns a vector for each position. A short text beside a long one would have the vectors of the wrong ones."""
    report = check(*loaded(folders("gpt2", others.text_only("gpt2"))))
    assert report.schedule is None
    assert "otherwise in a padded batch than alone where no positions are given, as plain Sentence Transformers" in str(
        report.reason
    )


def test_a_backbone_that_cannot_count_positions_itself_is_refused(llama, monkeypatch):
    def fails(*args: Any) -> Any:
        raise TypeError("position_ids are missing")

    monkeypatch.setattr(self_check, "_without_positions", fails)
    report = check(*loaded(llama))
    assert report.schedule is None
    assert "fails without positions, which plain Sentence Transformers does not give (TypeError: pos" in str(
        report.reason
    )
    assert "FAIL padding, where no positions are given" in str(report)


def test_rows_that_do_not_act_are_refused(folders, monkeypatch):
    """Gemma 3n gives the rows past its text to its towers, so a query there would be read as a piece of an image."""
    pytest.importorskip("timm")
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("Gemma 3n reads its tables in another way there")
    folder = folders("gemma3n", others.gemma3n())
    assert check(*loaded(folder)).schedule == "prefix"
    monkeypatch.setattr(
        "slq_embed.saving.assembly.usable_rows", lambda backbone: len(families.embedding_table(backbone))
    )
    report = check(*loaded(folder))
    assert report.schedule is None
    assert "does not let the rows of its embedding table act as queries" in str(report.reason)


def test_the_processor_of_another_backbone_is_refused(folders, llama, monkeypatch):
    monkeypatch.setattr("slq_embed.backbone.self_check.samples", lambda reads_images: ["same"] * 3)
    report = check(*loaded(llama))
    assert "gives different inputs the same embedding" in str(report.reason)


def test_a_backbone_that_leaves_images_out_is_refused(checkpoint, monkeypatch):
    """As Phi-4-multimodal does where embeddings come in. Images of other shapes would have other numbers of tokens."""
    model, processor = loaded(checkpoint("qwen2_vl"))
    features = model.model.get_image_features

    def blank(*args: Any, **kwargs: Any) -> Any:
        found = features(*args, **kwargs)
        found.pooler_output = tuple(map(torch.zeros_like, found.pooler_output))
        return found

    monkeypatch.setattr(model.model, "get_image_features", blank)
    report = check(model, processor)
    assert report.schedule is None
    assert "gives different inputs the same embedding" in str(report.reason)


def test_a_processor_that_loses_its_template_has_that_of_its_tokenizer(tmp_path):
    """Phi-4-multimodal's class does not take one; the tokenizer reads the file that the processor wrote."""
    processor = others.phi4_multimodal().processor
    processor.save_pretrained(tmp_path)
    assert families.loses_template(processor)
    assert not families.loses_template(llava.llava().processor)
    assert families.load_processor(str(tmp_path)).chat_template == processor.chat_template
    own = private_processor(AutoProcessor.from_pretrained(tmp_path))
    assert own.chat_template == processor.chat_template


def test_an_error_of_the_backbone_is_the_reason(folders):
    model, processor = loaded(folders("llava", llava.llava()))
    processor.patch_size = 4  # four times the tokens that the tower has features for
    report = check(model, processor)
    assert "fails on a sample input (ValueError: Image features and image tokens do not match" in str(report.reason)
    assert "FAIL input and queries as one sequence" in str(report)


def test_an_architecture_is_refused_without_a_run(llama):
    report = check(transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=8, d_kv=4, d_ff=8)), None)
    assert report.schedule is None
    assert "is an encoder-decoder" in str(report)
    assert not report.findings


class TestAllPositions:
    """A backbone for which only whole sequences are exact."""

    @pytest.fixture
    def encoder(self, folders) -> SLQEncoder:
        if Version(transformers.__version__) < Version("5.23"):
            pytest.skip("measured with transformers 5.23")
        return SLQEncoder.from_backbone(folders("hybrid", hybrid()), num_queries=3, seed=0, device="cpu")

    def test_it_encodes_and_trains(self, encoder):
        assert encoder.slq_config.schedule == "all_positions"
        together = encoder.encode(MIXED)
        assert np.abs(together - np.stack([encoder.encode(text) for text in MIXED])).max() < 1e-5
        embeddings = encoder(encoder.preprocess(MIXED))["sentence_embedding"]
        assert np.abs(embeddings.detach().numpy() - together).max() < 1e-5
        (embeddings[0] @ embeddings[1]).backward()
        assert encoder.queries.grad is not None
        assert encoder.queries.grad.norm() > 0

    def test_the_schedule_is_in_the_saved_folder(self, encoder, tmp_path):
        encoder.save_pretrained(tmp_path)
        record = json.loads((tmp_path / "slq_config.json").read_text())
        assert record["schedule"] == "all_positions"
        again = SLQEncoder(tmp_path, device="cpu")
        assert again.transformer.schedule == "all_positions"
        assert np.array_equal(again.encode(MIXED), encoder.encode(MIXED))

    def test_other_queries_share_it(self, encoder):
        other = encoder.with_queries(seed=1)
        assert other.transformer.schedule == "all_positions"
        results = encoder.encode(MIXED, query_sets={"other": other})
        assert np.abs(results["other"] - other.encode(MIXED)).max() < 1e-5

    def test_there_is_nothing_to_store(self, encoder):
        with pytest.raises(ValueError, match=r"A falcon_h1 has no prefixes: .* Train without a store"):
            encoder.prefix_store = PrefixStore()


def test_a_backbone_of_the_table_is_not_checked(checkpoint, monkeypatch):
    monkeypatch.setattr("slq_embed.saving.assembly.examine", lambda transformer: pytest.fail("it was checked"))
    encoder = SLQEncoder.from_backbone(checkpoint(), num_queries=3, device="cpu")
    assert (encoder.slq_config.schedule, encoder.transformer.schedule) == (None, "prefix")


def test_texts_only_means_no_images(llama, images, tmp_path):
    encoder = SLQEncoder.from_backbone(llama, num_queries=3, device="cpu")
    assert encoder.modalities == ["text", "message"]
    with pytest.raises(ValueError, match=r"Input [01](?: of 2)?: There is an image, but a llama reads texts only"):
        encoder.encode(["a", images[0]])
    encoder.save_pretrained(tmp_path)
    modalities = json.loads((tmp_path / "sentence_bert_config.json").read_text())["modality_config"]
    assert set(modalities) == {"text", "message"}


def test_gemma_scales_rows_of_its_table(folders):
    model, _ = loaded(folders("gemma", others.gemma()))
    assert families.embedding_scale(model) == pytest.approx(32**0.5)


def test_gemma_rounds_queries_as_its_table_rounds_rows(folders):
    """In half precision: plain Sentence Transformers reads the queries from the table."""
    folder = folders("gemma", others.gemma())
    encoder = SLQEncoder.from_backbone(folder, num_queries=4, seed=0, device="cpu", dtype=torch.bfloat16)
    layer, queries = encoder.backbone.get_input_embeddings(), encoder.queries.detach()
    with torch.no_grad():
        layer.weight[:4] = queries
        assert torch.equal(layer(torch.arange(4)), encoder.transformer.query_inputs())


def test_the_command_prints_and_writes_reports(llama, tmp_path, capsys):
    assert main([str(llama), "--json", str(tmp_path / "a.json")]) == 0
    assert "llama (float32): prefix" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())[str(llama)]["free_rows"] == 64
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    assert main([str(tmp_path / "t5")]) == 1
    assert "encoder-decoder" in capsys.readouterr().out

    def test_images_and_a_norm_of_embeddings(self, folders, tmp_path):
        """Inkling 2: attention and convolutions in each layer, and the merged form only."""
        if Version(transformers.__version__) < Version("5.23"):
            pytest.skip("measured with transformers 5.23")
        folder = folders("inkling2", newer_others.inkling2())
        assert check(*loaded(folder)).schedule == "all_positions"
        encoder = SLQEncoder.from_backbone(folder, num_queries=3, seed=0, device="cpu", form="merged")
        image = Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3))
        inputs = ["hello", image, {"image": image, "text": "a much longer text about red circles"}]
        together = encoder.encode(inputs)
        assert np.abs(together - np.stack([encoder.encode(one) for one in inputs])).max() < 1e-5
        encoder.save_pretrained(tmp_path)
        stock = SentenceTransformer(str(tmp_path), device="cpu")
        assert np.abs(stock.encode(inputs) - together).max() < 1e-5

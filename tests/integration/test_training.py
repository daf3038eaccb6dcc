"""Training through the host's trainer: losses, checkpoints, resume, best model, several processes."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from sentence_transformers import InputExample, SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer import losses
from torch.utils.data import DataLoader
from transformers import AutoProcessor, PreTrainedModel, TrainerCallback

import slq_embed.encoder as encoder_module
from slq_embed import QueryAdapter, SLQEncoder, SymmetricInfoNCELoss
from slq_embed.backbone.families import embedding_table
from slq_embed.data import retrieval_set
from slq_embed.evaluation import ImageTextRetrievalEvaluator
from slq_embed.training import CachedSymmetricInfoNCELoss
from tests.families import llava, others, qwen
from tests.families.building import write
from tests.training import arguments, toy_pairs, toy_train

BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
LOSSES = {
    "MultipleNegativesSymmetricRankingLoss": lambda m: losses.MultipleNegativesSymmetricRankingLoss(m),
    "MultipleNegativesRankingLoss": lambda m: losses.MultipleNegativesRankingLoss(m, **BOTH),
    "CachedMultipleNegativesSymmetricRankingLoss": lambda m: losses.CachedMultipleNegativesSymmetricRankingLoss(
        m, mini_batch_size=2
    ),
    "CachedMultipleNegativesRankingLoss": lambda m: losses.CachedMultipleNegativesRankingLoss(
        m, mini_batch_size=2, **BOTH
    ),
    "MatryoshkaLoss": lambda m: losses.MatryoshkaLoss(m, losses.MultipleNegativesRankingLoss(m, **BOTH), [32, 16, 8]),
    "SymmetricInfoNCELoss": SymmetricInfoNCELoss,
}


def history(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:.*SymmetricRankingLoss.*deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*SymmetricRankingLoss.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("Cached") else name for name in LOSSES]
)
def test_every_loss_learns_eight_pairs(encoder, name, tmp_path):
    """Recall rises well above chance (1/8) and only the queries (and the temperature) reach the optimizer."""
    pairs = toy_pairs()
    measure = ImageTextRetrievalEvaluator(*retrieval_set(pairs))
    assert measure(encoder)["text_to_image_recall@1"] <= 0.375
    trainer = toy_train(
        encoder,
        pairs,
        tmp_path,
        loss=LOSSES[name](encoder),
        max_steps=60,
        learning_rate=0.1,
        per_device_train_batch_size=8,
        weight_decay=0.5,
    )
    groups = trainer.optimizer.param_groups
    trained = [parameter for group in groups for parameter in group["params"]]
    assert sorted(p.numel() for p in trained) == ([1] if name == "SymmetricInfoNCELoss" else []) + [4 * 32]
    assert all(group["weight_decay"] == 0 for group in groups if group["params"])
    values = history(trainer)
    assert values[-1] < 0.75 * values[0]
    assert measure(encoder)["text_to_image_recall@1"] >= 0.5


def test_the_cached_loss_has_the_gradient_of_the_plain_one(encoder, images):
    def gradient(loss):
        encoder.queries.grad = None
        loss([encoder.preprocess([*images, "x"]), encoder.preprocess(["a", "bb", "ccc", "dd d", "e"])], None).backward()
        return encoder.queries.grad.clone()

    encoder.train()
    plain = gradient(losses.MultipleNegativesRankingLoss(encoder, **BOTH))
    cached = gradient(losses.CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=2, **BOTH))
    assert (plain - cached).norm() < 1e-4 * plain.norm()


@pytest.mark.parametrize("build", [llava.llava_next, others.molmo2, qwen.qwen3_5])
def test_cached_losses_cut_the_images_of_any_family(build, images, tmp_path):
    """Tiles padded to the most; patches counted over the batch; patches of each image."""
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("measured with transformers 5.23")
    encoder = SLQEncoder.from_backbone(write(tmp_path, build()), num_queries=3, seed=0, device="cpu")
    columns = ([images[0], "a", images[1], {"image": images[2], "text": "b"}], ["a", images[3], "bb", "ccc"])
    encoder.train()

    def gradient(loss, chosen):
        encoder.queries.grad = None
        loss([encoder.preprocess(column) for column in chosen], None).backward()
        return encoder.queries.grad.clone()

    plain = gradient(losses.MultipleNegativesRankingLoss(encoder), columns)
    cached = losses.CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=2)
    assert (plain - gradient(cached, columns)).norm() < 1e-4 * plain.norm()
    ours = gradient(SymmetricInfoNCELoss(encoder), columns)
    cached = CachedSymmetricInfoNCELoss(encoder, mini_batch_size=3)
    assert (ours - gradient(cached, columns)).norm() < 1e-4 * ours.norm()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_images_that_one_process_would_cut_is_refused(encoder, tmp_path, workers):
    """That is accelerate's default. It joins and cuts tensors only."""
    stream = SimpleNamespace(dataset=toy_pairs().dataset.to_iterable_dataset())
    options = {"loss": SymmetricInfoNCELoss(encoder), "max_steps": 1, "dataloader_num_workers": workers}
    with pytest.raises(
        ValueError, match=r'Let each process make its own: pass accelerator_config=\{"dispatch_batches": False\}'
    ):
        toy_train(encoder, stream, tmp_path, **options)
    before = encoder.queries.detach().clone()
    toy_train(encoder, stream, tmp_path, accelerator_config={"dispatch_batches": False}, **options)
    assert not torch.equal(before, encoder.queries.detach())


def test_the_prefix_runs_without_autograd_and_the_backbone_stays_in_eval(encoder, images):
    """Training must go through the prefix path: no prefix token may be differentiated."""
    calls = []
    hook = encoder.backbone.base_model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(
            (kwargs["inputs_embeds"].shape[1], kwargs["inputs_embeds"].requires_grad)
        ),
        with_kwargs=True,
    )
    encoder.train()
    embedding = encoder(encoder.preprocess(images[:2]))["sentence_embedding"]
    hook.remove()
    (prefix, prefix_grad), (queries, queries_grad) = calls
    assert prefix > queries == 4
    assert (prefix_grad, queries_grad) == (False, True)
    assert embedding.requires_grad
    assert not encoder.backbone.training


def test_model_fit_scripts_work(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = toy_pairs().dataset
    examples = [InputExample(texts=[row["image"], row["text"]]) for row in rows]
    loader = DataLoader(examples, batch_size=4, shuffle=True)
    before = encoder.queries.detach().clone()
    encoder.fit([(loader, losses.MultipleNegativesRankingLoss(encoder, **BOTH))], epochs=1, show_progress_bar=False)
    assert not torch.equal(before, encoder.queries.detach())


def test_checkpoints_are_stock_folders(encoder, tmp_path):
    toy_train(encoder, toy_pairs(), tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "checkpoint-2"
    loaded = SentenceTransformer(str(checkpoint), device="cpu")
    assert loaded.tokenizer.padding_side == "left"
    assert torch.allclose(
        torch.from_numpy(loaded.encode(["a red circle"])), torch.from_numpy(encoder.encode(["a red circle"])), atol=1e-6
    )
    assert not list(checkpoint.glob("model*.safetensors"))
    assert (
        json.loads((checkpoint / "slq_config.json").read_text())["log_temperature"]
        == encoder.transformer.log_temperature.item()
    )


@pytest.mark.parametrize("loss", [SymmetricInfoNCELoss, CachedSymmetricInfoNCELoss])
def test_the_temperature_of_a_model_that_the_trainer_builds_is_trained(checkpoint, uninterrupted, tmp_path, loss):
    """A search for hyperparameters has model_init: the trainer gives its loss a new model at each run."""
    trainer = SentenceTransformerTrainer(
        args=arguments(tmp_path, **RESUMABLE | {"save_strategy": "no"}),
        model_init=lambda: untrained_model(checkpoint),
        train_dataset=toy_pairs().dataset,
        loss=loss,
    )
    for _ in range(2):
        trainer.train()
        assert torch.allclose(trainer.model.queries, uninterrupted[0].queries, atol=1e-5)
        assert trainer.model.temperature == pytest.approx(uninterrupted[0].temperature)


class KilledError(RuntimeError):
    pass


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


RESUMABLE = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}


def untrained_model(checkpoint) -> SLQEncoder:
    torch.manual_seed(0)
    return SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cpu")


@pytest.fixture(scope="module")
def uninterrupted(checkpoint, tmp_path_factory) -> tuple[SLQEncoder, list[float]]:
    """A model and its losses, for all tests of runs that are killed and resumed."""
    model = untrained_model(checkpoint)
    return model, history(toy_train(model, toy_pairs(), tmp_path_factory.mktemp("whole"), **RESUMABLE))


@pytest.mark.parametrize("kill_at", [3, 5])
def test_resuming_after_a_kill_gives_the_same_losses(checkpoint, uninterrupted, tmp_path, kill_at):
    whole, expected = uninterrupted
    with pytest.raises(KilledError):
        toy_train(untrained_model(checkpoint), toy_pairs(), tmp_path, callbacks=[Kill(kill_at)], **RESUMABLE)
    resumed = untrained_model(checkpoint)
    trainer = toy_train(resumed, toy_pairs(), tmp_path, resume=True, **RESUMABLE)
    assert history(trainer) == expected
    assert torch.equal(resumed.queries, whole.queries)
    assert resumed.temperature == whole.temperature


@pytest.fixture(scope="module")
def run_of_two_steps(checkpoint, tmp_path_factory) -> Path:
    """A checkpoint with a head and an adapter."""
    folder = tmp_path_factory.mktemp("run")
    toy_train(untrained_model(checkpoint).with_queries(**PARTS), toy_pairs(), folder, **RESUMABLE | {"max_steps": 2})
    return folder / "checkpoint-2"


PARTS = {"projection": 8, "query_adapter": QueryAdapter(rank=2, targets=("q_proj",))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "last"}, "pooling was 'mean', and is 'last'"),
        ({"pooling": "weighted"}, "pooling was 'mean', and is 'weighted'"),
        ({"instructions": {"text": "{text}!"}}, r"instructions\['text'\] was '.*', and is '{text}!'"),
        ({"max_text_chars": 9}, "max_text_chars was 8192, and is 9"),
        ({"image_kwargs": {"do_resize": False}}, r"image_kwargs\['do_resize'\] was None, and is False"),
        ({"num_queries": 3}, "num_queries was 4, and is 3"),
        ({"projection": None}, "projection was 8, and is None"),
        (
            {"query_adapter": QueryAdapter(rank=4, alpha=4, targets=["q_proj"])},
            r"query_adapter\['rank'\] was 2, and is 4",
        ),
        ({"query_adapter": None, "deep_queries": True}, "query_adapter was .*; deep_queries was False, and is True"),
        ({"backbone": "other weights"}, "the backbone was '.*', and is another one: its token embeddings differ"),
        ({"backbone": "qwen2_vl"}, "the backbone was '.*', and is another one"),
    ],
)
def test_a_run_does_not_go_on_with_another_model(checkpoint, run_of_two_steps, tmp_path, changes, message):
    given = {"num_queries": 4, "seed": 0, "device": "cpu", **PARTS, **changes}
    backbone = given.pop("backbone", "qwen3_vl")
    if backbone == "other weights":
        plain = untrained_model(checkpoint)
        embedding_table(plain.backbone).data.add_(0.1)
        model = SLQEncoder.from_backbone(plain.backbone, AutoProcessor.from_pretrained(checkpoint()), **given)
    else:
        model = SLQEncoder.from_backbone(checkpoint(backbone), **given)
    before = model.queries.detach().clone()
    with pytest.raises(ValueError, match=rf"checkpoint-2 is a checkpoint of another model: .*{message}.*\. Build the"):
        toy_train(model, toy_pairs(), tmp_path, resume=str(run_of_two_steps), **RESUMABLE)
    assert torch.equal(model.queries, before)


def test_a_run_goes_on_with_the_same_model_built_otherwise(checkpoint, run_of_two_steps, tmp_path, monkeypatch):
    """In another precision, from another folder, with an adapter's default written out; its backbone is read once."""
    read = []
    taken = encoder_module.fingerprint
    monkeypatch.setattr(encoder_module, "fingerprint", lambda backbone: read.append(backbone) or taken(backbone))
    moved = shutil.copytree(checkpoint(), tmp_path / "moved")
    same = PARTS | {"query_adapter": QueryAdapter(rank=2, alpha=4, targets=["q_proj"])}
    model = SLQEncoder.from_backbone(moved, num_queries=4, seed=1, device="cpu", dtype=torch.bfloat16, **same)
    trainer = toy_train(model, toy_pairs(), tmp_path / "o", resume=str(run_of_two_steps), **RESUMABLE)
    assert trainer.state.global_step == 8
    assert len(read) == 1


def best_model_settings(pairs) -> dict:
    return {
        "evaluator": ImageTextRetrievalEvaluator(*retrieval_set(pairs), name="toy"),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 6,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_toy_mean_recall",
        "learning_rate": 0.1,
    }


def test_the_best_model_is_reloaded_without_a_second_backbone(encoder, tmp_path):
    pairs = toy_pairs()
    loaded = []
    original = PreTrainedModel.from_pretrained.__func__
    PreTrainedModel.from_pretrained = classmethod(lambda cls, *a, **k: loaded.append(cls) or original(cls, *a, **k))
    try:
        trainer = toy_train(encoder, pairs, tmp_path, **best_model_settings(pairs))
    finally:
        PreTrainedModel.from_pretrained = classmethod(original)
    assert not loaded
    best = SLQEncoder(trainer.state.best_model_checkpoint, backbone=encoder.backbone)
    assert torch.equal(best.queries, encoder.queries)
    assert (tmp_path / "eval" / "image_text_retrieval_toy_results.csv").is_file()


class Damage(TrainerCallback):
    """Destroys every checkpoint when training ends, before the best one is reloaded."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == args.max_steps:
            for file in Path(args.output_dir).glob("checkpoint-*/adapter_model.safetensors"):
                file.write_bytes(b"damaged")


def test_a_failed_reload_of_the_best_model_raises(encoder, tmp_path, caplog):
    """The trainer only logs it, so the model refuses to be used as if it were the best one."""
    pairs = toy_pairs()
    settings = best_model_settings(pairs)
    settings["max_steps"] = 5  # the last step saves nothing new
    with caplog.at_level(logging.ERROR):
        toy_train(encoder, pairs, tmp_path, callbacks=[Damage()], **settings)
    with pytest.raises(RuntimeError, match=r"best checkpoint .* could not be loaded"):
        encoder.encode("a")
    with pytest.raises(RuntimeError, match="could not be loaded"):
        encoder.save_pretrained(tmp_path / "final")
    damaged = encoder.state_dict() | {"0.bias.queries": torch.zeros(4, 5)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        encoder.load_state_dict(damaged)
    with pytest.raises(RuntimeError, match="could not be loaded"):
        encoder.encode("a")
    encoder.model_card_data.set_best_model_step(9)  # another training, before anything was loaded
    encoder.load_state_dict(encoder.state_dict())
    assert encoder.encode("a").shape == (32,)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_bf16_autocast_and_the_gradient_checkpointing_flag(encoder, tmp_path):
    trainer = toy_train(encoder, toy_pairs(), tmp_path, bf16=True, gradient_checkpointing=True)
    assert all(map(torch.isfinite, map(torch.tensor, history(trainer))))
    assert encoder.queries.dtype == torch.float32
    assert encoder.backbone.dtype == torch.float32


def test_a_bfloat16_backbone_trains_float32_queries(checkpoint, tmp_path):
    encoder = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cpu", dtype=torch.bfloat16)
    exact = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cpu")
    assert encoder.backbone.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(
        torch.from_numpy(encoder.encode(["a red circle"])), torch.from_numpy(exact.encode(["a red circle"]))
    ).item() == pytest.approx(1, abs=1e-2)
    toy_train(encoder, toy_pairs(), tmp_path)
    assert encoder.queries.dtype == torch.float32
    assert encoder.queries.grad is None or torch.isfinite(encoder.queries.grad).all()


def test_a_stock_loaded_adapter_is_frozen(encoder, tmp_path):
    """Documented: training further goes through SLQEncoder."""
    encoder.save_pretrained(tmp_path)
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    trainable = [name for name, parameter in stock.named_parameters() if parameter.requires_grad]
    assert not any("trainable_tokens" in name for name in trainable)
    further = SLQEncoder(tmp_path)
    before = further.queries.detach().clone()
    toy_train(further, toy_pairs(), tmp_path / "more")
    assert not torch.equal(before, further.queries.detach())

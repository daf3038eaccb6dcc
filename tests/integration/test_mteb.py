"""mteb gets a model that reads images beside texts, under a name of its own."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from sentence_transformers import SentenceTransformer

from slq_embed import SLQEncoder, pretrained
from slq_embed.evaluation import mteb_model
from slq_embed.toy import captions, render, sample_scenes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # mteb's own

TASKS = {  # a text task, and image tasks in every direction
    "MockPairClassificationTask": "t2t",
    "MockAny2AnyRetrievalT2ITask": "t2i",
    "MockImageTextPairClassificationTask": "i2t",
    "MockZeroShotClassificationTask": "i2t",
    "MockMultiChoiceTask": "it2i",
    "MockImageClassificationTask": "i2c",
}


@pytest.fixture(scope="module")
def mteb():
    return pytest.importorskip("mteb")


@pytest.fixture(scope="module")
def model():
    return SLQEncoder(pretrained("slq-tiny"), device="cpu")


def mock_tasks(modalities=frozenset({"text", "image"})):
    from mteb.mocks import ALL_MOCK_TASK_TEST_GRID

    tasks = {type(task).__name__: task for task in ALL_MOCK_TASK_TEST_GRID}
    return {name: task for name, task in tasks.items() if modalities.issuperset(task.metadata.modalities)}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_of_every_direction_runs(mteb, model, task):
    mock = mock_tasks()[task]
    assert mock.metadata.category == TASKS[task]
    result = mteb.evaluate(mteb_model(model), mock, cache=None, show_progress_bar=False)
    assert not result.exceptions
    (scores,) = result.task_results
    assert np.isfinite(scores.get_score())


@pytest.mark.slow
def test_every_text_and_image_task_runs(mteb, model):
    results = mteb.mock_run(mteb_model(model))
    done = {name for name, result in results.items() if type(result).__name__ == "TaskResult"}
    assert done == {task.metadata.name for task in mock_tasks().values()}
    assert len(done) >= 43
    assert results.all_passed


def test_an_image_beside_a_text_is_not_dropped(mteb, model):
    from mteb._create_dataloaders import create_dataloader

    scenes = sample_scenes(3, "test")
    rows = {"image": [render(scene) for scene in scenes], "text": [captions(scene)[0] for scene in scenes]}
    dataset = Dataset.from_dict(rows, features=Features({"image": Image(), "text": Value("string")}))
    task = mock_tasks()["MockMultiChoiceTask"].metadata
    loader = create_dataloader(dataset, task_metadata=task, input_column=["image", "text"], batch_size=2)
    wrapper = mteb_model(model)
    embeddings = wrapper.encode(loader, task_metadata=task, hf_split="test", hf_subset="default")
    both = model.encode([{"image": i, "text": t} for i, t in zip(rows["image"], rows["text"], strict=True)])
    assert np.abs(embeddings - both).max() < 1e-5
    assert np.abs(model.encode(rows["text"]) - both).max() > 0.01


def test_a_folder_its_name_and_a_loaded_model_are_taken(mteb, model, tmp_path):
    model.save_pretrained(tmp_path / "my model", form="adapter")
    folder = mteb_model(tmp_path / "my model").mteb_model_meta
    assert folder.name == "slq-embed/my-model"
    assert mteb_model(str(tmp_path / "my model")).mteb_model_meta == folder
    assert mteb_model(model).mteb_model_meta.name == "slq-embed/slq-tiny-16-queries"
    assert mteb_model(model).mteb_model_meta.revision == folder.revision
    plain = mteb_model(SentenceTransformer(str(tmp_path / "my model"), device="cpu"), "org/plain").mteb_model_meta
    assert (plain.name, plain.modalities) == ("org/plain", ["text", "image"])
    assert len(plain.revision) == 64
    assert mteb_model(model, "org/name", "r1").mteb_model_meta.revision == "r1"


def test_what_changes_the_embeddings_changes_the_revision(mteb, tmp_path):
    """Else mteb would answer from an earlier model's results."""
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    model.save_pretrained(tmp_path / "model", form="adapter")
    plain = SentenceTransformer(str(tmp_path / "model"), device="cpu")

    def revision(encoder):
        return mteb_model(encoder).mteb_model_meta.revision

    for encoder, weight in ((model, model.queries), (plain, next(plain.parameters()))):
        revisions = [revision(encoder)]
        assert revision(encoder) == revisions[0]
        with torch.no_grad():
            weight[0] += 0.1
        revisions.append(revision(encoder))
        encoder.prompts = {"query": "find:", "document": "keep:"}
        revisions.append(revision(encoder))
        encoder.truncate_dim = 64
        revisions.append(revision(encoder))
        assert len(set(revisions)) == 4


@pytest.mark.parametrize("name", ["slq-tiny", "a/b/c", "a b/c", "", "/x"])
def test_a_name_that_mteb_cannot_file_is_refused(model, name):
    with pytest.raises(ValueError, match="needs an organisation and a name"):
        mteb_model(model, name)


def test_without_mteb_it_is_imported_and_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.setitem(sys.modules, "mteb.models", None)
    spec = importlib.util.find_spec("slq_embed.evaluation.benchmark")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    with pytest.raises(ImportError, match=r"pip install 'slq-embed\[mteb\]'"):
        benchmark.mteb_model(model)

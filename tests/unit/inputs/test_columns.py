"""Columns that the trainer would misread are named before a run, and image-text pairs say where their rows are."""

from __future__ import annotations

import pytest
from datasets import Dataset, Features, Value
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from slq_embed import SymmetricInfoNCELoss
from slq_embed.data import DistinctImageBatchSampler
from slq_embed.inputs.columns import require_inputs
from slq_embed.training import mine_negatives, plan_prefixes, sweep
from tests.training import arguments, toy_pairs

PATHS = Dataset.from_dict({"image": ["photos/0.png", "photos/1.png"], "text": ["a", "b"], "label": [0, 1]})
TEXT = {"text": Value("string")}
NUMBERS = Dataset.from_dict({"anchor": ["a", "b"], "klass": [3, 4], "label": [0, 1]})
READERS = {
    "sampler": lambda model, dataset: DistinctImageBatchSampler(dataset, batch_size=2, drop_last=False),
    "plan": lambda model, dataset: plan_prefixes(model, dataset, epochs=2),
    "mining": lambda model, dataset: mine_negatives(
        model, dataset, anchor=dataset.column_names[1], positive=dataset.column_names[0], num_negatives=1
    ),
    "trainer": lambda model, dataset: SentenceTransformerTrainer(
        model, arguments("output"), train_dataset=dataset, loss=MultipleNegativesRankingLoss(model)
    ),
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """A trainer makes its output folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("reader", READERS)
def test_paths_that_would_be_texts_are_refused(encoder, reader):
    with pytest.raises(
        ValueError, match=r"'image' holds strings.*always a text.*cast_column\('image', datasets\.Image"
    ):
        READERS[reader](encoder, PATHS)


@pytest.mark.parametrize("name", ["photo", "img", "url"])
def test_paths_are_known_by_their_ends_under_any_name(name):
    paths = PATHS.rename_column("image", name)
    with pytest.raises(ValueError, match=f"The column '{name}' holds strings"):
        require_inputs(paths)
    require_inputs(
        paths.map(lambda row: {name: {"text": row[name]}}, features=Features({**paths.features, name: TEXT}))
    )
    require_inputs(Dataset.from_dict({name: ["photo of a.png", "a second text"]}))


def test_lists_of_texts_are_named(encoder):
    lists = Dataset.from_dict({"anchor": ["a"], "positive": ["b"], "negatives": [["c", "d"]]})
    with pytest.raises(ValueError, match=r"'negatives' holds lists of texts.*'negatives_1' and 'negatives_2'"):
        READERS["trainer"](encoder, lists)
    chat = [{"role": "user", "content": "a"}]
    require_inputs(Dataset.from_dict({"anchor": [chat], "positive": ["b"]}))


@pytest.mark.parametrize("reader", READERS)
def test_a_column_of_numbers_is_named(encoder, reader):
    with pytest.raises(ValueError, match=r"'klass' holds int64.*remove_columns\('klass'\)"):
        READERS[reader](encoder, NUMBERS)


@pytest.mark.parametrize("reader", ["sampler", "plan", "trainer"])
def test_labels_that_are_strings_are_named(encoder, reader):
    classes = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"], "label": ["cats", "dogs"]})
    with pytest.raises(
        ValueError, match=r"'label' holds strings, but labels are numbers.*class_encode_column\('label'\)"
    ):
        READERS[reader](encoder, classes)
    require_inputs(classes.class_encode_column("label"))


def test_texts_images_and_labels_pass():
    require_inputs(toy_pairs(2).dataset)
    require_inputs(PATHS.remove_columns("image").add_column("score", [0.5, 0.5]))
    require_inputs(PATHS.with_transform(lambda batch: batch))  # who knows what it gives


def test_rows_that_are_no_dataset_are_refused(encoder):
    for rows in ([{"text": "a"}], {"text": ["a"]}):
        with pytest.raises(ValueError, match=rf"dataset is a {type(rows).__name__}, but a Dataset of the package"):
            plan_prefixes(encoder, rows, epochs=2)


def test_the_sampler_names_the_column_that_it_needs():
    with pytest.raises(ValueError, match=r"\['image', 'text'\], but DistinctImageBatchSampler needs 'label'"):
        DistinctImageBatchSampler(toy_pairs(2).dataset.remove_columns("label"), batch_size=2, drop_last=False)


@pytest.mark.parametrize("settings", [{}, {"max_steps": -1}], ids=["steps", "epochs"])
def test_the_trainer_is_given_pairs_in_place_of_their_dataset(encoder, tmp_path, settings):
    with pytest.raises(AttributeError, match=r"pass pairs\.dataset instead"):
        SentenceTransformerTrainer(
            encoder,
            arguments(tmp_path, **settings),
            train_dataset=toy_pairs(4),
            loss=SymmetricInfoNCELoss(encoder),
        )


def test_pairs_do_where_a_dataset_does(encoder, tmp_path):
    pairs = toy_pairs(4)
    assert len(pairs) == 4
    assert len(plan_prefixes(encoder, pairs, epochs=2, levels=["keys_values"]).options) == 2
    assert sweep(encoder, arguments(tmp_path, max_steps=1), pairs, [{"num_queries": 2}]).variants[0].loss > 0

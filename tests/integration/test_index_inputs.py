"""The search index with its model: what goes in, what is searched with, and of which model the index is."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slq_embed import SLQEncoder, pretrained
from slq_embed.index import EmbeddingIndex, image_files, table
from slq_embed.toy import captions, render, sample_scenes


def test_images_texts_and_both_are_searched_by_each_other(tmp_path):
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    scenes = sample_scenes(40, "test")
    for number, scene in enumerate(scenes):
        render(scene, seed=number).save(tmp_path / f"{number:02}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    files = image_files(tmp_path)
    assert len(files) == 41
    index = EmbeddingIndex(model)
    (skipped,) = index.add(files, batch_size=8, show_progress_bar=True)
    assert "broken.png" in skipped.name
    texts = [captions(scene)[0] for scene in scenes]
    results = index.search(texts, k=1)
    assert sum(line[0].metadata["path"].endswith(f"{n:02}.png") for n, line in enumerate(results)) >= 36
    assert index.search(files[5], k=2)[0].id == str(files[5])
    assert index.search(render(scenes[5], seed=5), k=1)[0].score == pytest.approx(1, abs=1e-5)
    assert len(index.search({"image": files[5], "text": "now in blue"}, k=3)) == 3
    index.add(texts, ids=[f"text {n}" for n in range(40)], metadata=[{"of": n} for n in range(40)])
    hit = next(hit for hit in index.search(files[5], k=10) if hit.id.startswith("text"))
    assert hit.metadata == {"of": 5}
    assert index.search([], k=3) == []
    with pytest.raises(ValueError, match="one of them ends at index 2"):
        index.add(texts, ids=["one", "two"])
    index.add([{"image": files[0], "text": "in red"}], ids=["both"])
    index.save(tmp_path / "index")
    again = EmbeddingIndex.load(tmp_path / "index", model)
    assert [h.id for h in again.search(texts[3])] == [h.id for h in index.search(texts[3])]
    with pytest.raises(ValueError, match=r"in the index already: \['.*00\.png'\]"):
        index.add(files[:1])
    other = model.with_queries(4, seed=9)
    with pytest.raises(ValueError, match="another model"):
        EmbeddingIndex.load(tmp_path / "index", other)
    model.truncate_dim = 16
    with pytest.raises(ValueError, match=r"dimension 192, but this model's embeddings have 16"):
        EmbeddingIndex.load(tmp_path / "index", model)


def test_file_names_need_not_be_unicode_and_folders_are_no_images(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to("nowhere")
    try:
        render(sample_scenes(1, "test")[0]).save(tmp_path / "caf\udce9.png")
    except OSError:
        pytest.skip("this file system takes Unicode only")
    (file,) = image_files(tmp_path)
    index = EmbeddingIndex(SLQEncoder(pretrained("slq-tiny"), device="cpu"))
    assert index.add([file]) == []
    (hit,) = index.search(file)
    assert hit.id.endswith("caf\\udce9.png")
    assert Path(hit.metadata["path"]) == file


def test_one_thing_is_one_thing_and_names_may_be_of_any_type():
    pandas = pytest.importorskip("pandas")
    index = EmbeddingIndex(SLQEncoder(pretrained("slq-tiny"), device="cpu"))
    index.add("a red circle", [Path("a")], [{"n": 1}])
    index.add({"text": "two blue stars"}, iter([5]))
    index.add("a green square", "green", {"n": 2})
    assert index.metadata("green") == {"n": 2}
    assert index.delete("green") == 1
    index.add("a brown heart", 7)
    index.add_embeddings(torch.ones(2, 192), torch.tensor([8, 9]))
    assert index.delete(torch.tensor([7, 8, 9])) == 3
    with pytest.raises(ValueError, match="one of them ends at index 1"):
        index.add(["a brown heart", "a grey star"], 7)
    assert index.delete(7) == 0
    assert (index.ids(), Path("a") in index, 5 in index) == (["a", "5"], True, True)
    assert index.delete("5a") == index.delete(np.array([7])) == 0
    assert index.delete("a") == index.delete(np.array([5])) == 1
    table = pandas.DataFrame({"text": ["a circle", "two stars", "a square"], "name": ["c", "t", "s"]}).iloc[[2, 0, 1]]
    index.add(table["text"], table["name"])
    for id_ in "cts":
        assert index.metadata(id_)["text"] == table.set_index("name")["text"][id_]
    assert index.search("two stars", k=np.int64(1))[0].id == "t"
    index.add_embeddings([], [])
    assert index.search_embeddings([]) == []


def test_what_is_given_no_id_or_metadata_gets_its_own(tmp_path):
    """A path names itself. The id of another input is random: the same text can come twice."""
    file = tmp_path / "a.png"
    render(sample_scenes(1, "test")[0]).save(file)
    index = EmbeddingIndex(SLQEncoder(pretrained("slq-tiny"), device="cpu"))
    index.add(file)
    for text in ["a red circle", ["a red circle"]]:
        index.add(text)
    index.add({"image": file, "text": "but in blue"})
    path, *others = index.ids()
    assert path == str(file)
    assert (len(set(others)), {len(id_) for id_ in others}) == (3, {32})
    known = [{"path": str(file)}, {"text": "a red circle"}, {"text": "a red circle"}]
    assert [index.metadata(id_) for id_ in index.ids()] == [*known, {"image": str(file), "text": "but in blue"}]


def test_numbers_of_numpy_are_metadata_as_those_of_python_are():
    index = EmbeddingIndex(dimension=4)
    values = {"year": np.int64(2024), "price": np.float32(2.5), "sold": np.bool_(True), "sizes": [np.int16(3)]}
    index.add_embeddings(np.eye(4), list("abcd"), [values] * 4)
    assert index.metadata("a") == {"year": 2024, "price": 2.5, "sold": True, "sizes": [3]}
    assert (
        len(index.search_embeddings(np.eye(4)[0], where={"year": {"$gte": np.int64(2024)}, "sold": np.bool_(True)})[0])
        == 4
    )
    for wrong in (np.datetime64("2024-01-01"), np.float32("nan"), np.eye(2)):
        with pytest.raises(ValueError, match="cannot be stored"):
            index.add_embeddings(np.eye(4)[:1], ["e"], [{"x": wrong}])


def test_a_filter_is_read_before_the_queries_are_embedded(monkeypatch):
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    index = EmbeddingIndex(model)
    index.add("a red circle")
    monkeypatch.setattr(model.transformer, "forward", lambda *_: pytest.fail("it was embedded"))
    with pytest.raises(ValueError, match=r"\$near"):
        index.search("a red circle", where={"year": {"$near": 1}})


def test_another_model_is_refused_whatever_happened_in_between(tmp_path):
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    index = EmbeddingIndex(model)
    index.add_embeddings(model.encode(["a", "b"]), ["a", "b"])
    index.save(tmp_path)
    without = EmbeddingIndex.load(tmp_path)
    without.delete(["b"])
    without.save(tmp_path)
    with pytest.raises(ValueError, match="another model"):
        EmbeddingIndex.load(tmp_path, model.with_queries(4, seed=9))
    with torch.no_grad():
        model.queries.add_(0.1)  # trained further
    for call in (lambda: index.add(["c"]), lambda: index.search("a"), lambda: EmbeddingIndex.load(tmp_path, model)):
        with pytest.raises(ValueError, match="another model"):
            call()
    index.delete(["a", "b"])
    assert index.add(["c"], ["c"]) == []
    assert index.search("c")[0].id == "c", "an empty index takes any model"


def _other_layers(folder, model):
    """The same token embeddings and queries, under layers that were trained on."""
    for file in shutil.copytree(model.slq_config.backbone, folder).glob("*.safetensors"):
        weights = {name: w * (0.9 if "mlp.up_proj" in name else 1) for name, w in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})
    return SLQEncoder.from_backbone(folder, num_queries=4, seed=0, device="cpu")


def _other_template(folder, model):
    model.save_pretrained(folder)
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text("utf8").replace("user", "assistant"), "utf8")
    return SLQEncoder(folder, device="cpu")


@pytest.mark.parametrize("change", [_other_layers, _other_template])
def test_what_changes_embeddings_makes_another_model(encoder, change, tmp_path):
    index = EmbeddingIndex(encoder)
    index.add(["a red circle"], ["x"])
    index.save(tmp_path / "index")
    other = change(tmp_path / "other", encoder)
    assert np.abs(other.encode("a red circle") - encoder.encode("a red circle")).max() > 1e-3
    with pytest.raises(ValueError, match="another model"):
        EmbeddingIndex.load(tmp_path / "index", other)


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_is_the_same_in_each_form_and_precision(encoder, form, precision, tmp_path):
    index = EmbeddingIndex(encoder)
    index.add(["a red circle", "a blue square"], ["x", "y"])
    index.save(tmp_path / "index")
    encoder.save_pretrained(tmp_path / "model", form=form)
    again = SLQEncoder(tmp_path / "model", device="cpu", model_kwargs={"dtype": precision})
    assert EmbeddingIndex.load(tmp_path / "index", again).search("a red circle")[0].id == "x"


def test_a_search_meanwhile_does_not_forget_the_model(monkeypatch):
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    index, searching = EmbeddingIndex(model), threading.Event()

    length = table.IndexTable.__len__

    def slow(self):
        rows = length(self)
        if threading.current_thread() is not threading.main_thread():
            searching.set()
            time.sleep(0.5)
        return rows

    monkeypatch.setattr(table.IndexTable, "__len__", slow)
    other = threading.Thread(target=lambda: index.search("a red circle"))
    other.start()
    searching.wait()
    index.add(["a red circle"])
    other.join()
    assert index._identity.digest is not None


@pytest.mark.parametrize(
    ("prompts", "default"), [({"p": "find:"}, "p"), ({"query": "find:", "passage": "keep:"}, None), ({}, None)]
)
def test_prompts_are_those_of_the_host(prompts, default):
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    model.prompts, model.default_prompt_name = prompts, default
    index = EmbeddingIndex(model)
    index.add(["a red circle"])
    (hit,) = index.search("one red circle")
    expected = model.encode_query("one red circle") @ model.encode_document("a red circle")
    assert hit.score == pytest.approx(float(expected), abs=1e-5)


def test_others_search_while_inputs_are_awaited():
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    index, other, results = EmbeddingIndex(model), EmbeddingIndex(model), []
    other.add(["a red circle"], ["it"])

    def slow():
        yield "two blue stars"
        thread = threading.Thread(target=lambda: results.append(other.search("a red circle")[0].id), daemon=True)
        thread.start()
        thread.join(60)
        yield "a green square"

    index.add(slow())
    assert results == ["it"]


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    forward, sizes = type(model.transformer).forward, []

    def small(self, features, **kwargs):
        sizes.append(len(features["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, features, **kwargs)

    monkeypatch.setattr(type(model.transformer), "forward", small)
    index = EmbeddingIndex(model)
    index.add([f"{n} red circles" for n in range(6)], range(6), batch_size=4)
    assert sorted(index.ids()) == list("012345")
    with pytest.raises(ValueError, match="batch_size is 0"):
        index.add(["a"], batch_size=0)


def test_a_dataset_is_indexed_by_its_columns():
    datasets = pytest.importorskip("datasets")
    scenes = sample_scenes(6, "test")
    rows = {"image": [render(scene) for scene in scenes], "text": [captions(scene)[0] for scene in scenes]}
    dataset = datasets.Dataset.from_dict({**rows, "sku": [f"s{n}" for n in range(6)]})
    index = EmbeddingIndex(SLQEncoder(pretrained("slq-tiny"), device="cpu"))
    assert index.add(dataset["image"], ids=dataset["sku"], metadata=dataset.select_columns(["text", "sku"])) == []
    hits = index.search(rows["text"], k=1)
    assert sum(line[0].metadata["text"] == text for line, text in zip(hits, rows["text"], strict=True)) >= 5
    assert hits[0][0].id == hits[0][0].metadata["sku"]

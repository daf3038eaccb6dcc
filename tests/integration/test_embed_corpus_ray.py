"""A corpus embedded on a local Ray cluster: every form of input, the same vectors as encode, nothing lost and nothing doubled."""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slq_embed import SLQEncoder, pretrained
from slq_embed.toy import captions, render, sample_scenes
from tests.scripts import EXAMPLES, ROOT

pytest.importorskip("ray", reason='Ray is not installed: pip install "ray[data]"')
pytestmark = pytest.mark.slow  # each process of a cluster imports all

SCENES = sample_scenes(12, "test")
BAD, LATIN = b"no image", "café".encode("latin-1")
SCRIPT = """
import json, os, pathlib, sys, time
import ray
import embed_corpus_ray as example

marker = pathlib.Path(sys.argv[2])

class Dying(example.Embed):
    '''Ends the process of the actor, once, after two batches.'''
    done = 0
    def __call__(self, batches):
        if self.done == 2 and not marker.exists():
            marker.write_text(str(self.done))
            os._exit(1)
        self.done += 1
        return super().__call__(batches)

class Slow(example.Embed):
    def __call__(self, batches):
        time.sleep(1)
        return super().__call__(batches)

if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False)
    os.chdir(sys.argv[3])  # what the cluster starts from now on stays where it was
    plain = example.Embed
    for kind, *argv in json.loads(sys.argv[1]):
        example.Embed = {"plain": plain, "dying": Dying, "slow": Slow}[kind]
        example.main(argv)
"""


def png(number: int) -> bytes:
    render(SCENES[number], 7).save(content := io.BytesIO(), "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Twelve scenes and a bad image as a folder, jsonl, parquet (four files) and two shards, which have a bad text, too."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "photos").mkdir()
    content = {f"{number:02}": png(number) for number in range(12)} | {"bad": BAD}
    texts = {f"{number:02}": captions(scene)[0] for number, scene in enumerate(SCENES)} | {"bad": "a text"}
    for name, image in content.items():
        (root / "photos" / f"{name}.png").write_bytes(image)
    rows = [{"id": name, "image": f"photos/{name}.png", "caption": texts[name], "price": 2.5} for name in content]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = list(content)
    for part in range(4):
        chosen = names[part::4]
        images = [{"bytes": content[name], "path": None} for name in chosen]
        pq.write_table(pa.table({"id": chosen, "image": images}), root / f"part-{part}.parquet")
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            members = {f"{name}.png": content[name] for name in names[shard::2]}
            members |= {f"{name}.txt": texts[name].encode() for name in names[shard::2]}
            members |= {f"latin-{shard}.png": content["00"], f"latin-{shard}.txt": LATIN}
            for name, data in sorted(members.items()):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    model.prompts = {"document": "Describe what this shows."}
    model.save(root / "model")
    return root


def command(calls: list[list[object]], folder: Path, moved: Path | None = None) -> dict[str, object]:
    """Arguments of a process in which a cluster of two CPUs, started in ``folder``, runs these calls from ``moved``."""
    (folder / "script.py").write_text(SCRIPT)
    arguments = json.dumps([list(map(str, call)) for call in calls])
    return {
        "args": [
            *(sys.executable, "-W", "ignore", str(folder / "script.py"), arguments),
            *(str(folder / "marker"), str(moved or folder)),
        ],
        "env": {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (EXAMPLES, ROOT))),
            "OMP_NUM_THREADS": "1",
            "RAY_worker_niceness": "0",
        },
        "cwd": folder,
    }


def run(calls: list[list[object]], folder: Path, moved: Path | None = None) -> str:
    process = subprocess.run(**command(calls, folder, moved), capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout + process.stderr


def embeddings(output: Path) -> dict[str, np.ndarray]:
    """By id; an id that comes twice is an error."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted((output / "embeddings").glob("*.parquet")))
    ids = [Path(name).stem for name in table[0].to_pylist()]
    assert len(set(ids)) == len(ids), "an input was embedded twice"
    return dict(zip(ids, np.array(table["embedding"].to_pylist(), np.float32), strict=True))


def furthest(found: dict[str, np.ndarray], corpus: Path, inputs: list[object]) -> float:
    """The largest difference of a number from what encode_document gives with the corpus' model, which has a prompt."""
    assert sorted(found) == [f"{number:02}" for number in range(12)]
    model = SLQEncoder(corpus / "model", device="cpu")
    expected = model.encode_document(inputs)
    assert np.abs(expected - model.encode(inputs)).max() > 1e-3, "the prompt changes nothing"
    return max(float(np.abs(found[f"{number:02}"] - expected[number]).max()) for number in range(12))


JSONL = ["--id", "id", "--image", "image", "--text", "caption", "--keep", "price"]


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory) -> tuple[Path, str]:
    """Each form embedded in one cluster: shards by an actor that dies after two batches, the folder twice, parquet in two parts that overlap.

    The model and the inputs of jsonl are named by relative paths, from a folder that the cluster was not started in.
    """
    folder = tmp_path_factory.mktemp("done")
    parts = [corpus / f"part-{part}.parquet" for part in range(4)]
    parquet = ["--id", "id", "--image", "image"]
    shards = [corpus / "0.tar", corpus / "1.tar"]
    shared = ["--model", corpus / "model", "--batch", 5, "--output"]
    calls = [
        ["plain", "--input", corpus / "photos", *shared, folder / "folder"],
        ["plain", "--input", corpus / "photos", *shared, folder / "folder"],
        ["plain", "--input", "rows.jsonl", *JSONL, "--model", "model", "--output", folder / "jsonl"],
        ["plain", "--input", *parts[2:], *parquet, *shared, folder / "parquet"],
        ["plain", "--input", *parts[:3], *parquet, *shared, folder / "parquet"],
        ["dying", "--input", *shards, "--image", "png", "--text", "txt", *shared, folder / "shards", "--batch", 2],
    ]
    return folder, run(calls, folder, corpus)


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet", "shards"])
def test_each_form_gives_the_vectors_of_encode(done, corpus, kind):
    """Also where the actor was killed, and where the same command ran twice."""
    folder, output = done
    inputs = [corpus / "photos" / f"{number:02}.png" for number in range(12)]
    if kind in ("jsonl", "shards"):
        texts = [captions(scene)[0] for scene in SCENES]
        inputs = [{"image": path, "text": text} for path, text in zip(inputs, texts, strict=True)]
    assert furthest(embeddings(folder / kind), corpus, inputs) < 1e-5
    assert (folder / "marker").read_text() == "2", "no actor died after two batches"
    assert output.count("12 embeddings in") == 5
    assert f"12 embeddings in {folder / 'folder' / 'embeddings'}, 0 of them new" in output
    assert f"12 embeddings in {folder / 'parquet' / 'embeddings'}, 6 of them new" in output


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet", "shards"])
def test_a_bad_record_is_named_with_the_reason(done, kind):
    folder, _ = done
    lines = (folder / kind / "skipped.jsonl").read_text().splitlines()
    reasons = {Path(name).stem: reason for name, reason in (json.loads(line).values() for line in lines)}
    assert "is not an image that can be read" in reasons.pop("bad")
    assert sorted(reasons) == (["latin-0", "latin-1"] if kind == "shards" else [])
    assert all("'utf-8' codec can't decode byte 0xe9" in reason for reason in reasons.values())


@pytest.fixture
def example(monkeypatch):
    """The example in this process, for what it does before there is a cluster, and in a task."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("embed_corpus_ray")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep"], r"--keep was \['price'\], and is \[\]"),
        (["--text", "id"], r"--text was 'caption', and is 'id'"),
        (
            ["--prompt", "other", "--dtype", "bfloat16"],
            r"prompt was 'Describe .*, and is 'other'; --dtype was 'float32', and",
        ),
        (["--model", "other"], r"digest of the model was '[0-9a-f]+', and is '[0-9a-f]+'"),
    ],
)
def test_other_settings_in_one_output_are_refused(done, corpus, example, tmp_path, options, message):
    """Else what was embedded would be skipped, or files of two kinds lie side by side."""
    folder, _ = done
    if "--model" in options:
        options = ["--model", str(tmp_path)]
        model = SLQEncoder(corpus / "model", device="cpu")
        model.queries.data += 1
        model.save(tmp_path)
    call = ["--input", corpus / "rows.jsonl", *JSONL, "--model", corpus / "model"]
    call += ["--output", folder / "jsonl", *options]
    with pytest.raises(SystemExit, match=rf"has embeddings with other settings: {message}.*\. Give another --output"):
        example.main(list(map(str, call)))


@pytest.mark.parametrize(
    ("source", "option", "reason"),
    [
        ("photos", "--id", "a folder, where the path of an image is its id"),
        ("photos", "--text", "a folder, where"),
        ("0.tar", "--id", "shards, where the key is the id"),
    ],
)
def test_a_column_that_the_input_does_not_have_is_refused(corpus, example, tmp_path, source, option, reason):
    call = ["--input", corpus / source, option, "name", "--output", tmp_path / "out"]
    with pytest.raises(SystemExit, match=f"{option} names a column, but the input is {reason}.* Leave it out"):
        example.main(list(map(str, call)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            "part-1.parquet",
            ["--id", "name", "--image", "image"],
            r"part-1\.parquet has no column 'name'. It has id, image\.",
        ),
        (
            "rows.jsonl",
            ["--id", "id", "--text", "caption", "--keep", "cost"],
            "no column 'cost'. It has caption, id, image, price",
        ),
    ],
)
def test_a_column_that_is_not_there_is_named(corpus, example, tmp_path, source, options, message):
    with pytest.raises(SystemExit, match=message):
        example.main(["--input", str(corpus / source), *options, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_texts_in_bytes_are_read(corpus, example, tmp_path):
    """What shards hold is bytes. One that is not UTF-8 is left out, and named."""
    reader = SLQEncoder(corpus / "model", device="cpu").transformer
    task = example.Preprocess(None, ("id", None, "txt"), [], corpus, None, tmp_path, reader)
    rows = task(pa.table({"id": ["good", "latin"], "txt": ["café".encode(), LATIN]}))
    kept, features = pickle.loads(rows["batch"][0].as_py())
    assert kept["id"].to_pylist() == ["good"]
    expected = reader.preprocess([{"text": "café"}], keyed=False)
    assert features["input_ids"].tolist() == expected["input_ids"].tolist()
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["id"] == "latin"


def test_a_model_that_keeps_fewer_numbers_keeps_them_here(example, tmp_path):
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu", truncate_dim=64)
    model.save(tmp_path / "model")
    texts = pa.table({"id": ["a", "b"], "text": ["a red circle", "two green stars"]})
    task = example.Preprocess(None, ("id", None, "text"), [], tmp_path, None, tmp_path, model.transformer)
    found = example.Embed(str(tmp_path / "model"), "float32")(task(texts))
    expected = model.encode_document(texts["text"].to_pylist())
    assert np.abs(np.array(found["embedding"].to_pylist()) - expected).max() < 1e-6


def test_the_files_are_plain_parquet(done):
    """Lists of one length, which LanceDB takes for vectors, and the columns that were to be kept."""
    folder, _ = done
    (path, *_) = (folder / "jsonl" / "embeddings").glob("*.parquet")
    schema = pq.read_schema(path)
    assert schema.names == ["id", "price", "embedding"]
    assert schema.field("embedding").type == pa.list_(pa.float32(), 192)


def test_the_page_makes_a_lancedb_table_of_it(done, corpus, tmp_path, monkeypatch, capsys):
    """The block of the page, with the files that Ray wrote."""
    pytest.importorskip("lancedb")
    page = (ROOT / "docs" / "guides" / "large-corpora.md").read_text("utf8")
    block = re.search(r"needs the output of Ray -->\n```python\n(.*?)```", page, flags=re.S)
    (tmp_path / "embeddings").symlink_to(done[0] / "folder")
    monkeypatch.chdir(tmp_path)
    model = SLQEncoder(corpus / "model", device="cpu")
    names = {"model": model}
    exec(block[1], names)
    assert names["corpus"].count_rows() == 12
    inputs = [corpus / "photos" / f"{number:02}.png" for number in range(12)]
    nearest = int((model.encode_document(inputs) @ model.encode_query("a big red circle")).argmax())
    assert Path(capsys.readouterr().out.strip()).name == f"{nearest:02}.png"


def test_a_killed_run_goes_on(corpus, tmp_path):
    parquet = [corpus / f"part-{part}.parquet" for part in range(4)]
    options = ["--model", corpus / "model", "--input", *parquet, "--id", "id", "--image", "image"]
    options += ["--batch", 2, "--output", tmp_path / "out"]
    killed = subprocess.Popen(**command([["slow", *options]], tmp_path), start_new_session=True)
    while killed.poll() is None and not list((tmp_path / "out").glob("done/*.parquet")):
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it ended before it was killed"
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "embeddings").glob("*.parquet")}
    assert 0 < len(before) < 4
    output = run([["plain", *options]], tmp_path)
    assert "12 embeddings in" in output
    inputs = [corpus / "photos" / f"{number:02}.png" for number in range(12)]
    assert furthest(embeddings(tmp_path / "out"), corpus, inputs) < 1e-5
    kept = [
        name for name, when in before.items() if (tmp_path / "out" / "embeddings" / name).stat().st_mtime_ns == when
    ]
    assert kept, "everything was embedded again"

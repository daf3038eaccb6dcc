"""A corpus embedded on a local Ray cluster: every form of input, the same vectors as encode, nothing lost and nothing doubled."""

from __future__ import annotations

import io
import json
import os
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
from tests.scripts import EXAMPLES

pytest.importorskip("ray", reason='Ray is not installed: pip install "ray[data]"')
pytestmark = pytest.mark.slow  # each process of a cluster imports all

SCENES = sample_scenes(12, "test")
BAD = b"no image"
SCRIPT = """
import json, os, pathlib, sys, time
import ray
import embed_corpus_ray as example

marker = pathlib.Path(sys.argv[2])

class Dying(example.Embed):
    '''Ends the process of the actor, once.'''
    def __call__(self, batches):
        if not marker.exists():
            marker.touch()
            os._exit(1)
        return super().__call__(batches)

class Slow(example.Embed):
    def __call__(self, batches):
        time.sleep(1)
        return super().__call__(batches)

if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False)
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
    """Twelve scenes and a bad image as a folder, jsonl, parquet (four files) and two shards."""
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
            for name in names[shard::2]:
                info = tarfile.TarInfo(f"{name}.png")
                info.size = len(content[name])
                tar.addfile(info, io.BytesIO(content[name]))
    model = SLQEncoder(pretrained("slq-tiny"), device="cpu")
    model.prompts = {"document": "Describe what this shows."}
    model.save(root / "model")
    return root


def command(calls: list[list[object]], folder: Path) -> dict[str, object]:
    """Arguments of a process in which a cluster of two CPUs runs these calls of the example."""
    (folder / "script.py").write_text(SCRIPT)
    arguments = json.dumps([list(map(str, call)) for call in calls])
    return {
        "args": [sys.executable, "-W", "ignore", str(folder / "script.py"), arguments, str(folder / "marker")],
        "env": {**os.environ, "PYTHONPATH": str(EXAMPLES), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"},
        "cwd": folder,
    }


def run(calls: list[list[object]], folder: Path, code: int = 0) -> str:
    process = subprocess.run(**command(calls, folder), capture_output=True, text=True, check=False)
    assert process.returncode == code, process.stderr[-4000:]
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


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory) -> tuple[Path, str]:
    """Each form embedded in one cluster: shards by an actor that dies, the folder twice."""
    folder = tmp_path_factory.mktemp("done")
    jsonl = ["--id", "id", "--image", "image", "--text", "caption", "--keep", "price"]
    parquet = [corpus / f"part-{part}.parquet" for part in range(4)]
    shards = [corpus / "0.tar", corpus / "1.tar"]
    shared = ["--model", corpus / "model", "--batch", 5, "--output"]
    calls = [
        ["plain", "--input", corpus / "photos", *shared, folder / "folder"],
        ["plain", "--input", corpus / "photos", *shared, folder / "folder"],
        ["plain", "--input", corpus / "rows.jsonl", *jsonl, *shared, folder / "jsonl"],
        ["plain", "--input", *parquet, "--id", "id", "--image", "image", *shared, folder / "parquet"],
        ["dying", "--input", *shards, "--image", "png", *shared, folder / "shards"],
    ]
    return folder, run(calls, folder)


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet", "shards"])
def test_each_form_gives_the_vectors_of_encode(done, corpus, kind):
    """Also where the actor was killed, and where the same command ran twice."""
    folder, output = done
    inputs = [corpus / "photos" / f"{number:02}.png" for number in range(12)]
    if kind == "jsonl":
        texts = [captions(scene)[0] for scene in SCENES]
        inputs = [{"image": path, "text": text} for path, text in zip(inputs, texts, strict=True)]
    assert furthest(embeddings(folder / kind), corpus, inputs) < 1e-5
    assert (folder / "marker").exists(), "no actor died"
    assert output.count("12 embeddings in") == 5


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet", "shards"])
def test_a_bad_record_is_named_with_the_reason(done, kind):
    folder, _ = done
    (line,) = (folder / kind / "skipped.jsonl").read_text().splitlines()
    name, reason = json.loads(line).values()
    assert Path(name).stem == "bad"
    assert "is not an image that can be read" in reason


def test_the_files_are_plain_parquet(done):
    """Lists of one length, which LanceDB takes for vectors, and the columns that were to be kept."""
    folder, _ = done
    (path, *_) = (folder / "jsonl" / "embeddings").glob("*.parquet")
    schema = pq.read_schema(path)
    assert schema.names == ["id", "price", "embedding"]
    assert schema.field("embedding").type == pa.list_(pa.float32(), 192)


def test_a_killed_run_goes_on(corpus, tmp_path):
    parquet = [corpus / f"part-{part}.parquet" for part in range(4)]
    options = [
        "--model",
        corpus / "model",
        "--input",
        *parquet,
        "--id",
        "id",
        "--image",
        "image",
        "--batch",
        2,
        "--output",
        tmp_path / "out",
    ]
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
    other = run([["plain", *options, "--dtype", "bfloat16"]], tmp_path, code=1)
    assert "has embeddings of another model" in other

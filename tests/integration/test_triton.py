"""Triton's Python backend with plain Sentence Transformers in it serves the same vectors. Set SLQ_TRITON to the server's command.

That is ``tritonserver`` with a Python backend whose Python has this project's packages.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from slq_embed import SLQEncoder, pretrained
from slq_embed.toy import captions, render, sample_scenes

SERVER = os.environ.get("SLQ_TRITON")
pytestmark = pytest.mark.skipif(SERVER is None, reason="SLQ_TRITON does not name a tritonserver")

CONFIG = """
backend: "python"
max_batch_size: 16
input [
  { name: "text", data_type: TYPE_STRING, dims: [1], optional: true },
  { name: "image", data_type: TYPE_STRING, dims: [1], optional: true }
]
output [{ name: "embedding", data_type: TYPE_FP32, dims: [192] }]
dynamic_batching { max_queue_delay_microseconds: 2000 }
instance_group [{ kind: KIND_CPU, count: 1 }]
parameters { key: "folder", value { string_value: "FOLDER" } }
"""
MODEL = """
import base64, io, json
import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image
from sentence_transformers import SentenceTransformer


class TritonPythonModel:
    def initialize(self, args):
        folder = json.loads(args["model_config"])["parameters"]["folder"]["string_value"]
        self.model = SentenceTransformer(folder, device="cpu")

    def execute(self, requests):
        rows, sizes = [], []
        for request in requests:
            parts = {}
            for name in ("text", "image"):
                if (tensor := pb_utils.get_input_tensor_by_name(request, name)) is not None:
                    parts[name] = [value.decode() for value in tensor.as_numpy()[:, 0]]
            if "image" in parts:
                parts["image"] = [Image.open(io.BytesIO(base64.b64decode(value))) for value in parts["image"]]
            rows += [dict(zip(parts, row)) for row in zip(*parts.values())]
            sizes.append(len(next(iter(parts.values()))))
        found = np.split(self.model.encode(rows, batch_size=16), np.cumsum(sizes)[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("embedding", part)]) for part in found]
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("triton")
    (folder / "models" / "slq" / "1").mkdir(parents=True)
    (folder / "models" / "slq" / "config.pbtxt").write_text(CONFIG.replace("FOLDER", str(pretrained("slq-tiny"))))
    (folder / "models" / "slq" / "1" / "model.py").write_text(MODEL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [
        "--http-address",
        "127.0.0.1",
        "--http-port",
        str(port),
        "--allow-grpc",
        "false",
        "--allow-metrics",
        "false",
    ]
    command = [*shlex.split(SERVER or ""), "--model-repository", str(folder / "models"), *flags]
    with (folder / "log.txt").open("w") as output:
        running = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
            while not is_ready(address):
                log = (folder / "log.txt").read_text()[-3000:]
                assert running.poll() is None, log
                assert time.monotonic() < deadline, log
                time.sleep(0.5)
            yield address
        finally:
            running.terminate()
            running.wait(60)


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/models/slq/ready") as answer:
            return int(answer.status) == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def ask(url: str, rows: list[dict[str, str]]) -> np.ndarray:
    """The embeddings of rows that have the same keys."""
    inputs = [
        {"name": name, "shape": [len(rows), 1], "datatype": "BYTES", "data": [row[name] for row in rows]}
        for name in rows[0]
    ]
    with urllib.request.urlopen(f"{url}/v2/models/slq/infer", json.dumps({"inputs": inputs}).encode()) as answer:
        (output,) = json.loads(answer.read())["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


@pytest.mark.parametrize("names", [("text",), ("image",), ("text", "image")], ids="+".join)
def test_the_vectors_are_ours_alone_in_a_batch_and_from_threads(url, names):
    scenes = sample_scenes(12, "test")
    inputs = [{"text": captions(scene)[0], "image": render(scene, seed=3)} for scene in scenes]
    inputs[0]["text"] = "a longer text with\ttabs and Ünïcode 🟥"
    inputs = [{name: row[name] for name in names} for row in inputs]
    expected = SLQEncoder(pretrained("slq-tiny"), device="cpu").encode(inputs)
    sent = [{name: png(value) if name == "image" else value for name, value in row.items()} for row in inputs]
    with ThreadPoolExecutor(6) as threads:
        at_once = np.concatenate(list(threads.map(lambda row: ask(url, [row]), sent)))
    for found in (ask(url, sent), np.concatenate([ask(url, [row]) for row in sent]), at_once):
        assert np.abs(found - expected).max() < 1e-6


def png(image) -> str:
    image.save(file := io.BytesIO(), "PNG")
    return base64.b64encode(file.getvalue()).decode()

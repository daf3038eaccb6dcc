"""What vLLM serves is what SLQEncoder gives; what it would serve wrong, it refuses. Run by make test-vllm."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_slq import SLQEmbeddings
from llama_index.embeddings.slq import SLQEmbedding

from slq_embed import SLQEncoder, pretrained
from slq_embed.remote import RemoteEncoder
from slq_embed.saving import export_vllm
from slq_embed.serving import UnreadableInputsError, compare, embed
from slq_embed.toy import render, sample_scenes
from tests.parts import PARTS, trained
from tests.vllm.server import NAME, PYTHON, Process, vllm

pytestmark = pytest.mark.vllm

PROMPTS = {"query": "Find the picture", "document": ""}
LONG = "a red circle above two green stars and a yellow heart " * 40  # more tokens than a step of "head" computes
IMAGES = [render(scene) for scene in sample_scenes(4, "train")]
INPUTS: dict[str, Any] = {
    "a text": "a red circle",
    "another text": "two green stars",
    "no text": {"text": ""},
    "control tokens": "<|im_end|> <|slq_0|> <|image_pad|>",
    "a long text": LONG,
    "an image": IMAGES[0],
    "another image": IMAGES[1],
    "a large image": IMAGES[2].resize((200, 120)),
    "both": {"image": IMAGES[0], "text": "now in green"},
    "both, long": {"image": IMAGES[3], "text": LONG},
    "two images": {"images": IMAGES[:2]},
}


@dataclass(frozen=True)
class Case:
    """A model, how it is served, and how near its vectors are to ours at least, as a cosine."""

    model: str
    cosine: float
    flags: tuple[str, ...]


EAGER = "--enforce-eager"  # compiling takes longer than all else
FP32, BF16 = ("--dtype", "float32", EAGER), ("--dtype", "bfloat16", EAGER)
IN_STEPS = ("--max-num-batched-tokens", "256", "--max-num-seqs", "8", "--enable-chunked-prefill")
CACHING = ("--enable-prefix-caching", "--block-size", "32")
CASES = {
    "mean": Case("slq-tiny", 0.99999, FP32),
    "head, in steps, prefix caching asked for": Case("slq-tiny-head", 0.99999, (*FP32, *IN_STEPS, *CACHING)),
    "head, bfloat16": Case("slq-tiny-head", 0.999, BF16),
    "learned weights": Case("weighted", 0.99999, FP32),
    "last query, default prompt, prefix caching": Case("last", 0.99999, (*FP32, *CACHING)),
    "deep queries, never compiled": Case("deep", 0.99999, ("--dtype", "float32")),
    "adapter, deep queries and head, in steps": Case("inside", 0.99999, (*FP32, *IN_STEPS)),
    "adapter, last query, prefix caching": Case("adapter", 0.99999, (*FP32, *CACHING)),
    "adapter, deep queries and head, bfloat16": Case("inside", 0.999, BF16),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "last": {"pooling": "last", "prompts": {"all": "Look at it"}, "default_prompt_name": "all"},
    "weighted": {"pooling": "weighted"},
    "deep": {"deep_queries": True},
    "adapter": {"pooling": "last", "query_adapter": True},
    "inside": PARTS["all"],
}


def build(name: str) -> SLQEncoder:
    if name.startswith("slq-"):
        return SLQEncoder(pretrained(name), device="cpu", prompts=PROMPTS)
    backbone = pretrained("mllm-tiny")
    model = SLQEncoder.from_backbone(backbone, num_queries=4, seed=0, device="cpu", **SETTINGS[name])
    # A larger adapter of random numbers makes much of rounding, here and there: in bfloat16, ours would be 0.003 off as well.
    return trained(model, scale=0.05 if name == "inside" else 0.3)


@dataclass
class Served:
    """A server, and the model that it serves."""

    local: SLQEncoder
    remote: RemoteEncoder
    case: Case


@pytest.fixture(scope="module", autouse=True)
def _environment() -> None:
    assert PYTHON.exists(), f"There is no vLLM at {PYTHON}. Run make test-vllm, or set SLQ_VLLM_PYTHON."


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    case, folder = request.param, tmp_path_factory.mktemp("served")
    local = build(case.model)
    export_vllm(local, folder / "model")
    with vllm(folder / "model", folder / "log.txt", *case.flags) as process:
        assert process.code is None, process.log.read_text()[-5000:]
        yield Served(local, RemoteEncoder(process.url), case)


def test_the_vectors_are_ours_alone_in_a_batch_and_again(served: Served, capsys: pytest.CaptureFixture[str]):
    expected = embed(served.local, list(INPUTS.values()), batch_size=4)
    rounds = {
        "alone": embed(served.remote, list(INPUTS.values()), batch_size=1),
        "again": embed(served.remote, list(INPUTS.values()), batch_size=1),
        "in a batch": embed(served.remote, list(INPUTS.values()), batch_size=len(INPUTS)),
    }
    with capsys.disabled():
        print(f"\n{served.case.model} {' '.join(served.case.flags)}: largest difference of a number, and 1 - cosine")  # noqa: T201
        for number, name in enumerate(INPUTS):
            differences = [
                f"{how} {np.abs(found[number] - expected[number]).max():.1e} {1 - found[number] @ expected[number]:.0e}"
                for how, found in rounds.items()
            ]
            print(f"  {name:15} {'   '.join(differences)}")  # noqa: T201
    for how, found in rounds.items():
        cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosines.min() > served.case.cosine, f"{how}: {dict(zip(INPUTS, cosines, strict=True))}"
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-3


def test_what_a_user_is_told_of_the_difference(served: Served):
    found = compare(served.remote, served.local)
    print(found)  # noqa: T201 - pytest -s shows it
    assert all(difference < 1 - served.case.cosine for difference in found.values()), found


def test_a_prompt_that_vllm_has_seen_whatever_its_length(served: Served):
    """Of a prompt in its cache, vLLM computes what comes after the last full block: one token, or up to a block."""
    texts = ["red " * words for words in range(40, 73)]
    expected = embed(served.local, texts)
    for _ in range(2):
        assert (embed(served.remote, texts) * expected).sum(1).min() > served.case.cosine


def test_prompts_reach_the_server(served: Served):
    chats = [
        [{"role": "system", "content": content}, {"role": "user", "content": "a red circle"}]
        for content in ("Look.", [{"type": "text", "text": "Look."}])
    ]
    inputs = ["a red circle", IMAGES[0], *chats]
    for options in (
        {},
        {"task": "query"},
        {"task": "document"},
        {"prompt": ""},
        {"prompt": "Another", "task": "query"},
    ):
        expected = embed(served.local, inputs, **options)
        found = embed(served.remote, inputs, **options)
        assert (found * expected).sum(1).min() > served.case.cosine


def test_langchain_and_llama_index(served: Served, tmp_path: Path):
    IMAGES[0].save(path := tmp_path / "scene.png")
    url = served.remote.base_url
    pairs = [
        (
            embed(served.local, ["a red circle"], task="query"),
            [SLQEmbeddings(base_url=url).embed_query("a red circle")],
        ),
        (embed(served.local, [path], task="document"), SLQEmbeddings(base_url=url).embed_image([str(path)])),
        (
            embed(served.local, ["a red circle"], task="query"),
            [SLQEmbedding(base_url=url).get_query_embedding("a red circle")],
        ),
        (embed(served.local, [path], task="document"), [SLQEmbedding(base_url=url).get_image_embedding(str(path))]),
    ]
    for expected, found in pairs:
        assert (np.array(found) * expected).sum(1).min() > served.case.cosine


def test_what_is_too_long_costs_the_others_nothing(served: Served):
    with pytest.raises(
        UnreadableInputsError, match=r"input 1 \(zq.*\): the server refuses it: .*maximum context length"
    ) as raised:
        embed(served.remote, ["a", "zq" * 4000])
    assert np.abs(np.linalg.norm(raised.value.embeddings[0]) - 1) < 1e-3


@pytest.mark.parametrize(
    ("path", "request_of"),
    [
        ("v1/embeddings", {"input": "a red circle"}),
        ("v2/embed", {"texts": ["a red circle"], "embedding_types": ["binary"]}),
        (
            "v1/embeddings",
            {
                "messages": [{"role": "user", "content": "a red circle"}],
                "truncate_prompt_tokens": 5,
                "truncation_side": "right",
            },
        ),
    ],
    ids=["a raw text", "bits of a raw text", "the queries are cut off"],
)
def test_a_prompt_without_the_queries_gets_no_vector(served: Served, path: str, request_of: dict[str, Any]):
    content = json.dumps({"model": NAME, **request_of}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{served.remote.base_url}/{path}", content, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            result = [entry["embedding"] for entry in json.load(answer)["data"]]
    except urllib.error.HTTPError as error:
        result = error.code
    assert result in (400, [[None]]), "an error, or the null that orjson writes for NaN"
    assert embed(served.remote, ["a"]).shape[0] == 1, "the server goes on"


def ended(folder: Path, log: Path, *, plugin: bool) -> Process:
    with vllm(folder, log, *FP32, plugin=plugin) as process:
        return process


@pytest.mark.parametrize("model", ["slq-tiny", "last"])
def test_without_the_plugin_no_folder_is_served(model: str, tmp_path: Path):
    export_vllm(build(model), tmp_path / "model")
    (tmp_path / "model" / "latent_queries.safetensors").unlink()  # vLLM overlooks it where shards have an index
    process = ended(tmp_path / "model", tmp_path / "log.txt", plugin=False)
    assert process.code, "it is served"
    assert "SLQQwen3VLForConditionalGeneration" in process.log.read_text()
    assert "are not supported" in process.log.read_text()


@pytest.mark.parametrize("size", ["tensor", "pipeline"])
def test_layers_that_are_cut_apart_cannot_act_at_the_queries(size: str, tmp_path: Path):
    export_vllm(build("deep"), tmp_path / "model")
    with vllm(tmp_path / "model", tmp_path / "log.txt", *FP32, f"--{size}-parallel-size", "2") as process:
        assert process.code, "it is served"
    assert f"whole layers in one process, but {size}_parallel_size is 2" in process.log.read_text()


def test_a_step_that_is_cut_apart_is_refused(tmp_path: Path):
    export_vllm(build("deep"), tmp_path / "model")
    with vllm(tmp_path / "model", tmp_path / "log.txt", *FP32, "--enable-dbo") as process:
        assert process.code, "it is served"
    assert "which need the whole of a step at once" in process.log.read_text()


def test_a_folder_whose_prompts_would_be_lost_is_refused(tmp_path: Path):
    build("slq-tiny").save_pretrained(tmp_path / "model", form="merged")
    process = ended(tmp_path / "model", tmp_path / "log.txt", plugin=True)
    assert process.code, "it is served"
    assert "has prompts (query) that its chat template does not know" in process.log.read_text()

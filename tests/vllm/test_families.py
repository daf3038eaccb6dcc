"""Which families vLLM serves with the vectors of SLQEncoder, and which are refused: tiny models, in float32, on a CPU.

Each is embedded in steps of 128 tokens, shorter than the long inputs: alone, again, and in a batch. `make test-vllm` runs what is used
most; `make test-vllm-families` runs all.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm_slq import PREFIX
from vllm_slq.measured import ARCHITECTURES

from slq_embed import SLQEncoder
from slq_embed.inputs.rows import read_row
from slq_embed.remote import _messages
from slq_embed.saving import export_vllm
from slq_embed.saving.folder import edited_json
from slq_embed.serving import embed
from tests.families import FAMILIES
from tests.parts import PARTS, trained
from tests.vllm import interpreted
from tests.vllm.backbones import build, build_llava_that_begins_texts
from tests.vllm.server import PYTHON, ROOT, SETTINGS

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # of the hosts' processors

MOST_USED = ("qwen2_vl", "qwen2_5_vl", "internvl3", "llama", "lfm2_vl", "cohere2_vision", "aya_vision")
OTHERS = (
    *("qwen3_vl", "internvl3_5", "llava", "llava_next", "granite_vision", "granite4_vision", "idefics3", "smolvlm"),
    *("qwen3_vl_moe", "pixtral", "mistral3", "glm4v", "glm4v_moe", "glm_ocr", "gemma3n", "llama4", "paddleocr_vl"),
    *("qwen3", "gemma", "gemma3_text", "smollm3", "cohere2_moe"),
)
TRANSFORMERS = (
    *("exaone4_5", "fast_vlm", "glm46v", "glmga", "hyperclovax_vision_v2", "lighton_ocr"),
    *("llava_next_video", "muse_glimmer", "perception_lm", "video_llama_3", "vipllava"),
)
"""Which vLLM runs with the code of transformers, as Aya Vision and SmolLM3."""
HALF = ("qwen3_5", "qwen3_5_moe", "minicpmv4_6")
"""Linear attention, which vLLM computes on a CPU in bfloat16 only."""
ONE_IMAGE = ("llava_onevision",)
BOTH_DIRECTIONS = ("gemma3", "gemma4")
OTHER_IMAGES = ("aria",)
"""Whose images vLLM computes otherwise."""
UNKNOWN = {
    **dict.fromkeys(("kimi_k25", "ovis2", "phi4_multimodal", "qwen2_5_omni_thinker"), "are not supported"),
    **dict.fromkeys(("qwen3_omni_moe_thinker", "idefics2", "video_llava", "deepseek_vl"), "are not supported"),
    **dict.fromkeys(("deepseek_vl_hybrid", "janus", "chameleon", "cosmos3_omni"), "are not supported"),
    **dict.fromkeys(
        ("lfm3_vl", "granite_docling", "minicpm_ocr", "muse_spark"), "does not recognize this architecture"
    ),
    "mistral_large4": "does not recognize this architecture",
    "minicpmv4_7": "multimodal tokens to",
}
"""What vLLM itself refuses, and with which words."""
NOT_RUN = (
    *(
        "hunyuan_vl",
        "cosmos3_edge",
        "glm5_next",
        "nemotron_h_omni",
        "step3p7",
        "mistral4",
        "dots3_note",
    ),
    *("qianfan_ocr", "deepseek_ocr2", "unlimited_ocr", "ernie4_5_vl_moe", "qwen4_exp", "gemma4_unified"),
)
"""vLLM ends with an error on the tiny model, or the tiny model cannot have the sizes that vLLM needs."""
NOT_EXPORTED = {
    **dict.fromkeys(("paligemma", "paligemma2"), "its queries have a token type of their own"),
    "molmo2": "its processor puts more tokens around a chat",
}
"""What :func:`slq_embed.saving.export_vllm` refuses, and with which words."""

STEPS = {"max_num_batched_tokens": 128, "max_num_seqs": 8, "enable_chunked_prefill": True}
CACHING = {**STEPS, "enable_prefix_caching": True, "block_size": 32}
LONG = "a red circle above two green stars and a yellow heart " * 40
TEXTS: list[Any] = ["a red circle", {"text": ""}, LONG, "größe 图 <|im_end|> <image>"]


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(40, 50), (64, 32), (32, 96), (120, 200)]
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


def inputs_with_images() -> list[Any]:
    first, *others = pictures()
    both = [{"image": first, "text": "now in green"}, {"image": others[0], "text": LONG}]
    return [first, *others, Image.fromarray(255 - np.array(first)), *both]


def inputs_with_two() -> list[Any]:
    first, second, *_ = pictures()
    return [{"images": [first, second]}, {"image": [second, first], "text": "a b"}]


@dataclass
class Offline:
    """The process of tests/vllm/offline.py.

    Args:
        ask: Sends a job and waits for its answer.
        scratch: Where files go.
    """

    ask: Callable[[dict[str, Any]], dict[str, str]]
    scratch: Path

    def embed(self, model: Path, inputs: Sequence[Any], **settings: Any) -> np.ndarray:
        """Embeddings alone, again and in a batch: ``(3, number of inputs, H)``.

        Raises:
            RuntimeError: If vLLM refuses the model or an input.
        """
        chats, vectors = self.scratch / "chats.json", self.scratch / "vectors.npy"
        chats.write_text(json.dumps([_messages(read_row(value), None) for value in inputs]), "utf8")
        paths = {
            "model": str(model),
            "chats": str(chats),
            "vectors": str(vectors),
            "log": str(model.parent / "log.txt"),
        }
        if error := self.ask({**paths, "settings": settings}).get("error"):
            if "num2words" in error or "timm library" in error:
                pytest.skip(f"vLLM's environment lacks a package: {error}")
            raise RuntimeError(error)
        return np.load(vectors).astype(np.float64)


@contextmanager
def started(scratch: Path, **settings: str) -> Iterator[Offline]:
    """That process, with settings of its environment."""
    assert PYTHON.exists(), f"There is no vLLM at {PYTHON}. Run make test-vllm, or set SLQ_VLLM_PYTHON."
    environment = {
        **os.environ,
        **SETTINGS,
        "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(scratch / "cache"),
        **settings,
    }
    command = [str(PYTHON), str(ROOT / "tests" / "vllm" / "offline.py")]
    with (
        (scratch / "log.txt").open("w") as log,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        lines, jobs = process.stdout, process.stdin

        def answer() -> dict[str, str]:
            for line in lines:
                if line.startswith("{"):
                    return dict(json.loads(line))
            raise AssertionError(f"vLLM has ended:\n{(scratch / 'log.txt').read_text()[-3000:]}")

        def ask(job: dict[str, Any]) -> dict[str, str]:
            jobs.write(json.dumps(job) + "\n")
            jobs.flush()
            return answer()

        answer()  # it is ready
        yield Offline(ask, scratch)
        jobs.close()


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Offline]:
    """vLLM as it is on a CPU."""
    with started(tmp_path_factory.mktemp("offline")) as process:
        yield process


@pytest.fixture(scope="module")
def gpu_runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Offline]:
    """vLLM with the runner that it has on a GPU."""
    if subprocess.run([str(PYTHON), "-c", "import triton"], capture_output=True, check=False).returncode:
        pytest.skip("vLLM's environment has no Triton, which its runner for GPUs needs")
    with started(tmp_path_factory.mktemp("gpu"), **interpreted.SETTINGS) as process:
        yield process


@pytest.fixture(params=["offline", "gpu_runner"])
def either(request: pytest.FixtureRequest) -> Offline:
    """Both, one after the other."""
    process: Offline = request.getfixturevalue(request.param)
    return process


def exported(name: str, folder: Path, **options: Any) -> tuple[SLQEncoder, Path]:
    backbone = build(name, folder / "backbone")
    encoder = trained(SLQEncoder.from_backbone(backbone, num_queries=4, seed=0, device="cpu", form="merged", **options))
    export_vllm(encoder, folder / "model")
    return encoder, folder / "model"


def inputs_of(encoder: SLQEncoder) -> list[Any]:
    return [*TEXTS, *inputs_with_images(), *inputs_with_two()] if encoder.transformer.reader.reads_images else TEXTS


def distances(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """1 - cosine."""
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
    return 1 - (found * expected).sum(-1) / norms


def require_listed(folder: Path) -> None:
    """The plugin says of others that nobody has compared their vectors."""
    names = json.loads((folder / "config.json").read_text("utf8"))["architectures"]
    assert {name.removeprefix(PREFIX) for name in names} <= ARCHITECTURES


def require_ours(name: str, encoder: SLQEncoder, inputs: list[Any], found: np.ndarray, limit: float = 1e-5) -> None:
    expected = embed(encoder, inputs, batch_size=1).astype(np.float64)
    apart = distances(expected[:, None], expected[None])
    assert apart[~np.eye(len(inputs), dtype=bool)].min() > limit, "the inputs are too alike for this to mean anything"
    differences = distances(found, expected)
    print(f"{name}: 1 - cosine {differences.max():.0e}")  # noqa: T201 - pytest -s shows it
    assert differences.max() < limit, differences


def marked(names: Sequence[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def test_each_family_is_in_one_list():
    lists = (MOST_USED, OTHERS, TRANSFORMERS, HALF, ONE_IMAGE, BOTH_DIRECTIONS, OTHER_IMAGES, tuple(UNKNOWN), NOT_RUN)
    lists = (*lists, tuple(NOT_EXPORTED))
    assert sorted(sum(lists, ())) == sorted(FAMILIES)


@pytest.mark.parametrize("name", [*MOST_USED, *marked((*OTHERS, *TRANSFORMERS))])
def test_the_vectors_are_ours(name: str, either: Offline, tmp_path: Path):
    encoder, folder = exported(name, tmp_path)
    inputs = inputs_of(encoder)
    require_ours(name, encoder, inputs, either.embed(folder, inputs, **STEPS))
    require_listed(folder)


@pytest.mark.parametrize("name", ["qwen2_vl", "aya_vision", *marked((*MOST_USED[1:-1], *OTHERS, *TRANSFORMERS))])
def test_the_vectors_are_ours_where_the_model_is_compiled(name: str, offline: Offline, tmp_path: Path):
    encoder, folder = exported(name, tmp_path)
    inputs = inputs_of(encoder)
    # Where vLLM compiles, it first tries the largest video, which takes a CPU many minutes.
    settings = {**STEPS, "enforce_eager": False, "skip_mm_profiling": True}
    require_ours(name, encoder, inputs, offline.embed(folder, inputs, **settings))


def test_it_is_said_what_nobody_has_compared(offline: Offline, tmp_path: Path):
    _, folder = exported("llama", tmp_path)
    offline.embed(folder, TEXTS[:1])
    log, said = tmp_path / "log.txt", "nobody has compared the vectors of SLQInternLM3ForCausalLM"
    assert said not in log.read_text("utf8")
    with edited_json(folder / "config.json") as config:
        config["architectures"] = ["SLQInternLM3ForCausalLM"]  # which vLLM computes as a Llama
    offline.embed(folder, TEXTS[:1])
    assert said in log.read_text("utf8")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MOST_USED, *OTHERS, *TRANSFORMERS])
def test_the_vectors_are_ours_with_prefix_caching(name: str, either: Offline, tmp_path: Path):
    encoder, folder = exported(name, tmp_path, pooling="last")
    inputs = inputs_of(encoder)
    require_ours(name, encoder, inputs, either.embed(folder, inputs, **CACHING))


@pytest.mark.parametrize(
    "name",
    [*MOST_USED[:4], *marked(sorted({*MOST_USED[4:], *OTHERS, *TRANSFORMERS}))],
)
def test_what_acts_inside_the_layers_does_so(name: str, either: Offline, tmp_path: Path):
    encoder, folder = exported(name, tmp_path, **PARTS["all"])
    inputs = inputs_of(encoder)
    require_ours(name, encoder, inputs, either.embed(folder, inputs, **STEPS))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"enable_lora": True}, "acts in layers that --enable-lora replaces"),
        ({"enable_prompt_embeds": True}, "which a prompt of embeddings does not have"),
    ],
)
def test_settings_with_which_vectors_would_be_wrong_are_refused(
    settings: dict[str, bool], said: str, offline: Offline, tmp_path: Path
):
    _, folder = exported("llama", tmp_path, query_adapter=True)
    with pytest.raises(RuntimeError, match=said):
        offline.embed(folder, TEXTS, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True], ids=["queries", "adapter"])
@pytest.mark.parametrize("name", HALF)
def test_linear_attention_is_served_in_bfloat16(name: str, adapter: bool, either: Offline, tmp_path: Path):
    encoder, folder = exported(name, tmp_path, model_kwargs={"dtype": "bfloat16"}, query_adapter=adapter)
    inputs = [value for value in inputs_of(encoder) if value is not LONG]
    expected = embed(encoder, inputs, batch_size=1).astype(np.float64)
    differences = distances(either.embed(folder, inputs, dtype="bfloat16"), expected)
    require_listed(folder)
    print(f"{name}, bfloat16: 1 - cosine {differences.max():.0e}")  # noqa: T201
    assert differences.max() < 1e-3, differences


@pytest.mark.parametrize("name", ONE_IMAGE)
def test_one_image_is_served_where_vllm_cuts_several_otherwise(name: str, either: Offline, tmp_path: Path):
    encoder, folder = exported(name, tmp_path)
    inputs = [*TEXTS, *inputs_with_images()]
    require_ours(name, encoder, inputs, either.embed(folder, inputs, **STEPS))
    require_listed(folder)
    with pytest.raises(RuntimeError, match=r"At most 1 image\(s\) may be provided in one prompt"):
        either.embed(folder, inputs_with_two())


def test_a_token_that_the_processor_adds_at_the_start(offline: Offline, tmp_path: Path):
    """vLLM tokenizes a rendered chat as it is, so a folder of export_vllm writes that token, and others are refused."""
    backbone = build_llava_that_begins_texts(tmp_path / "backbone")
    encoder = trained(SLQEncoder.from_backbone(backbone, num_queries=4, seed=0, device="cpu"))
    export_vllm(encoder, tmp_path / "model")
    inputs = inputs_of(encoder)
    require_ours("llava", encoder, inputs, offline.embed(tmp_path / "model", inputs))
    again = embed(SLQEncoder(tmp_path / "model", device="cpu"), inputs)
    assert distances(again, embed(encoder, inputs)).max() < 1e-5, "the token stands there once"
    encoder.save_pretrained(tmp_path / "merged", form="merged")
    with pytest.raises(RuntimeError, match="adds a token at the start"):
        offline.embed(tmp_path / "merged", TEXTS)


@pytest.mark.parametrize("name", BOTH_DIRECTIONS)
def test_images_that_need_both_directions_are_refused_on_a_cpu(name: str, offline: Offline, tmp_path: Path):
    encoder, folder = exported(name, tmp_path)
    with pytest.raises(RuntimeError, match="tokens of an image see each other in both directions"):
        offline.embed(folder, TEXTS)
    found = offline.embed(folder, TEXTS, language_model_only=True, **STEPS)
    require_ours(f"{name}, texts alone", encoder, TEXTS, found)
    with pytest.raises(RuntimeError, match="At most 0 image"):
        offline.embed(folder, inputs_with_images(), language_model_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_IMAGES)
def test_images_that_vllm_computes_otherwise_are_refused(name: str, either: Offline, tmp_path: Path):
    encoder, folder = exported(name, tmp_path)
    with pytest.raises(RuntimeError, match="whose images vLLM computes otherwise than transformers"):
        either.embed(folder, TEXTS)
    require_ours(f"{name}, texts alone", encoder, TEXTS, either.embed(folder, TEXTS, language_model_only=True, **STEPS))
    require_listed(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNKNOWN)
def test_vllm_refuses(name: str, offline: Offline, tmp_path: Path):
    encoder, folder = exported(name, tmp_path)
    with pytest.raises(RuntimeError, match=UNKNOWN[name]):
        offline.embed(folder, inputs_of(encoder), **({"dtype": "bfloat16"} if name.startswith("minicpmv") else {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_EXPORTED)
def test_the_export_refuses(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=NOT_EXPORTED[name]):
        exported(name, tmp_path)

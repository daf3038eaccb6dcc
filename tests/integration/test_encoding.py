"""The encoding pipeline: the same embeddings as the simple path, streamed, resumable, for several query sets at once."""

from __future__ import annotations

import copy
import json
import multiprocessing
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import slq_embed.encoding.batches as encoding
import slq_embed.encoding.to_file as encoded_file
import slq_embed.inputs.rows as input_rows
import slq_embed.modules.latent_query_transformer as latent_query_transformer
import slq_embed.prefix.source as prefix_source
from slq_embed import PrefixStore, SLQEncoder
from slq_embed.inputs.pdf import PdfPage
from tests.checkpoints import FAMILIES
from tests.forks import forked, needs_fork


@pytest.fixture
def folder(tmp_path) -> list[Path]:
    """Images of mixed sizes."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(20):
        size = rng.integers(16, 64, 2)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def simple(encoder, inputs) -> np.ndarray:
    """One at a time, through the module itself."""
    with torch.no_grad():
        return np.concatenate([encoder(encoder.preprocess([v]))["sentence_embedding"].numpy() for v in inputs])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_pipeline_gives_what_the_simple_path_gives(checkpoint, folder, mixed, kind, workers):
    encoder = SLQEncoder.from_backbone(checkpoint(kind), num_queries=4, seed=0, device="cpu")
    encoder.num_workers = workers
    inputs = [*mixed, *folder]
    assert np.abs(encoder.encode(inputs, batch_size=7) - simple(encoder, inputs)).max() < 1e-5


def test_every_option_of_encode_gives_what_the_host_gives(encoder, mixed, monkeypatch):
    calls = [
        {},
        {"prompt": "Find it."},
        {"prompt_name": "query"},
        {"normalize_embeddings": True, "truncate_dim": 8},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"precision": "int8"},
        {"output_value": "token_embeddings"},
        {"output_value": None},
        {"device": "cpu", "show_progress_bar": True},
    ]
    encoder.prompts["query"] = "A query."
    found = [encoder.encode(mixed, batch_size=4, **call) for call in calls] + [encoder.encode(mixed[0])]
    found += [encoder.encode([]), encoder.encode([], convert_to_tensor=True), encoder.encode_query(mixed)]
    monkeypatch.delattr(SLQEncoder, "_inference")
    host = [encoder.encode(mixed, batch_size=4, **call) for call in calls] + [encoder.encode(mixed[0])]
    host += [encoder.encode([]), encoder.encode([], convert_to_tensor=True), encoder.encode_query(mixed)]
    for call, ours, theirs in zip([*calls, "one", "none", "none", "query"], found, host, strict=True):
        assert type(ours) is type(theirs), call
        assert len(ours) == len(theirs), call
        if isinstance(ours, np.ndarray):
            assert ours.shape == theirs.shape, call
            # A byte may fall on either side of a bound.
            assert np.abs(ours.astype(float) - theirs.astype(float)).max(initial=0) <= (
                1 if ours.dtype == np.int8 else 1e-6
            )
        elif isinstance(ours, torch.Tensor):
            assert ours.shape == theirs.shape, call
            assert ours.numel() == 0 or (ours - theirs).abs().max() < 1e-6
        elif isinstance(ours[0], torch.Tensor):
            assert all((a - b).abs().max() < 1e-6 for a, b in zip(ours, theirs, strict=True)), call


def test_like_sizes_go_together(encoder, folder, monkeypatch):
    """Batches as they come would have several times the padding."""
    shapes = []
    run = latent_query_transformer.run_all_positions

    def watched(decoder, features, *queries):
        mask = features["attention_mask"]
        shapes.append((mask.numel(), int(mask.sum())))
        return run(decoder, features, *queries)

    monkeypatch.setattr(latent_query_transformer, "run_all_positions", watched)
    inputs = [*folder, *("word " * n for n in range(1, 21))]
    inputs = [inputs[n] for n in np.random.default_rng(1).permutation(40)]
    encoder.encode(inputs, batch_size=5)
    padded, real = map(sum, zip(*shapes, strict=True))
    as_they_come = sum(encoder.preprocess(inputs[n : n + 5])["input_ids"].numel() for n in range(0, 40, 5))
    assert padded - real < 0.35 * (as_they_come - real)


def test_a_stream_is_read_as_it_is_needed(encoder, monkeypatch):
    monkeypatch.setattr(encoding, "WINDOW", 2)
    read = []

    def endless():
        number = 0
        while True:
            read.append(number)
            yield f"text {number}"
            number += 1

    results = encoder.encode_stream(endless(), batch_size=4)
    places = [place for _ in range(3) for place in next(results).indices]
    assert len(set(places)) == 12
    assert max(places) < len(read) <= 16
    first = next(encoder.encode_stream(["a", "b"]))
    assert np.abs(first.embeddings[first.indices.index(1)].numpy() - encoder.encode("b")).max() < 1e-6


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_named_skipped_and_listed(encoder, folder, tmp_path, workers):
    encoder.num_workers = workers
    folder[3].write_bytes(b"no image")
    folder[11].write_bytes(folder[11].read_bytes()[:-30])
    inputs = [*folder, 5.0, "a text"]
    results = list(encoder.encode_stream(inputs, batch_size=8))
    skipped = {row.index: row for result in results for row in result.skipped}
    assert set(skipped) == {3, 11, 20}
    assert "3.png" in skipped[3].name
    assert "cannot be decoded" in skipped[11].reason
    assert "is a float" in skipped[20].reason
    assert sorted(place for result in results for place in result.indices) == sorted(set(range(22)) - set(skipped))
    with pytest.raises(ValueError, match=r"Input \d+ \(.*(3|11)\.png\): .*(cannot be|no.?t an image)"):
        encoder.encode(folder)


@pytest.mark.parametrize("workers", [None, 2])
def test_no_worker_is_started_for_nothing(encoder, folder, monkeypatch, workers):
    started = []
    loader = encoding.DataLoader
    monkeypatch.setattr(encoding, "DataLoader", lambda *a, **k: started.append(k["num_workers"]) or loader(*a, **k))
    monkeypatch.setattr(encoding, "default_workers", lambda kind: 2)
    encoder.num_workers = workers
    encoder.encode(folder[0])
    encoder.encode(folder[:4], batch_size=4)
    encoder.encode(["a text"] * 40, batch_size=4)
    encoder.encode(folder[:6], batch_size=4)
    encoder.encode(folder, batch_size=4)
    assert started == [1, 2]


@pytest.mark.parametrize("workers", [None, 2])
def test_a_process_that_may_have_no_children_starts_none(encoder, folder, monkeypatch, workers):
    """Such are the processes of the host's pool, of multiprocessing.Pool and of some task queues."""
    monkeypatch.setattr(encoding, "default_workers", lambda kind: 2)
    expected = encoder.encode(folder)
    encoder.num_workers = workers
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    assert np.abs(encoder.encode(folder, batch_size=4) - expected).max() < 1e-5


def test_decoded_images_do_not_pile_up(encoder, folder, monkeypatch):
    """A file of 200 kB may be an image of 40 MB, and a window holds a thousand files."""
    decoded, decode = [], input_rows.decode

    def remembered(*arguments):
        image = decode(*arguments)
        decoded.append(weakref.ref(image))
        return image

    monkeypatch.setattr(input_rows, "decode", remembered)
    stream = encoder.encode_stream(folder, batch_size=2)
    alive = [sum(image() is not None for image in decoded) for _ in stream]
    assert len(alive) == 10
    assert max(alive) <= 4


@pytest.mark.parametrize("kind", ["image", "video"])
def test_few_images_in_memory_are_read_ahead(encoder, images, monkeypatch, kind):
    image = images[0]
    value = image if kind == "image" else {"video": [image, image], "max_frames": 1}
    monkeypatch.setattr(encoding, "WINDOW_BYTES", 3 * image.width * image.height * (5 if kind == "image" else 10))
    read = []
    stream = encoder.encode_stream((read.append(n) or value for n in range(40)), batch_size=2)
    next(stream)
    assert len(read) == 6


def test_shorter_embeddings_in_a_stream_and_a_file(encoder, mixed, tmp_path):
    encoder.truncate_dim = 8
    expected = encoder.encode(mixed)
    assert expected.shape == (6, 8)
    (result,) = encoder.encode_stream(mixed)
    assert np.abs(result.embeddings.numpy() - expected[result.indices]).max() < 1e-6
    assert np.abs(encoder.encode_to_file(mixed, tmp_path / "e.npy").embeddings - expected).max() < 1e-6


def test_inputs_without_names_are_told_apart(encoder, images, tmp_path):
    inputs = [*images, {"text": "in blue", "image": images[0]}]
    file = tmp_path / "e.npy"
    encoder.encode_to_file(inputs, file)
    assert encoder.encode_to_file([images[0].copy(), *inputs[1:]], file).encoded == 0
    for other in ([images[1], *inputs[1:]], [*images, {"text": "in red", "image": images[0]}]):
        with pytest.raises(ValueError, match="other inputs"):
            encoder.encode_to_file(other, file)
    chat = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [{"type": "image", "image": images[0]}]},
    ]
    encoder.encode_to_file([chat], tmp_path / "chat.npy")
    with pytest.raises(ValueError, match="other inputs"):
        encoder.encode_to_file([[{**chat[0], "content": "Look away."}, chat[1]]], tmp_path / "chat.npy")


def test_every_text_and_path_of_a_list_of_dicts_is_compared(encoder, folder, tmp_path):
    """Not only a sample, as of images in memory: a benchmark whose 100th text was corrected is another one."""
    inputs = [{"image": folder[n % 20], "text": f"text {n}"} for n in range(100)]
    file = tmp_path / "e.npy"
    encoder.encode_to_file(inputs, file)
    assert encoder.encode_to_file(inputs, file).encoded == 0
    sampled = set(np.linspace(0, 99, 64).astype(int).tolist())
    number = next(n for n in range(100) if n not in sampled)
    for other in ({"image": folder[0], "text": "changed"}, {"image": folder[0], "text": f"text {number}"}):
        with pytest.raises(ValueError, match="other inputs"):
            encoder.encode_to_file([*inputs[:number], other, *inputs[number + 1 :]], file)


@pytest.mark.parametrize(
    "make",
    [
        lambda number: {"video": f"{number}.mp4", "fps": 2, "max_frames": 8},
        lambda number: {"images": [Path("a.png"), Path(f"{number}.png")], "text": "which is it?"},
        lambda number: [{"role": "user", "content": [{"type": "text", "text": f"text {number}"}]}],
        lambda number: PdfPage(Path("a.pdf"), number + 1),
    ],
)
def test_every_text_and_path_is_compared_wherever_it_stands(make):
    inputs = [make(number) for number in range(100)]
    changed = [*inputs[:1], make(1000), *inputs[2:]]
    assert encoded_file._inputs_digest(inputs) == encoded_file._inputs_digest(copy.deepcopy(inputs))
    assert encoded_file._inputs_digest(inputs) != encoded_file._inputs_digest(changed)


def test_a_path_is_not_the_text_that_spells_it(encoder, folder, tmp_path):
    """Names that were embedded as texts by mistake are not taken for the images."""
    encoder.encode_to_file([str(path) for path in folder], tmp_path / "e.npy")
    with pytest.raises(ValueError, match="other inputs"):
        encoder.encode_to_file(folder, tmp_path / "e.npy")


def test_embeddings_in_a_file(encoder, folder, tmp_path):
    folder[3].write_bytes(b"no image")
    inputs = [*folder, "a text"]
    result = encoder.encode_to_file(inputs, tmp_path / "e.npy", batch_size=4)
    assert result.encoded == 20
    assert "3.png" in result.report()
    good = [n for n in range(21) if n != 3]
    assert np.abs(result.embeddings[good] - encoder.encode([inputs[n] for n in good])).max() < 1e-6
    assert np.isnan(result.embeddings[3]).all()
    again = encoder.encode_to_file(inputs, tmp_path / "e.npy")
    assert (again.encoded, len(again.skipped)) == (0, 1)
    Image.new("RGB", (20, 20)).save(folder[3])
    mended = encoder.encode_to_file(inputs, tmp_path / "e.npy")
    assert (mended.encoded, mended.report()) == (1, "nothing was skipped")
    assert not np.isnan(mended.embeddings).any()
    for change, message in [
        (lambda: encoder.encode_to_file(inputs[::-1], tmp_path / "e.npy"), "other inputs"),
        (lambda: encoder.encode_to_file(inputs, tmp_path / "e.npy", prompt="x"), "another model"),
        (lambda: encoder.encode_to_file(inputs, tmp_path / "e.npy", dtype="float16"), "another dtype"),
        (lambda: encoder.encode_to_file(inputs, tmp_path / "e.bin"), r"ends in \.npy"),
        (lambda: encoder.encode_to_file(inputs, tmp_path / "i.npy", dtype="int8"), "dtype is 'int8', but one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            change()
    with torch.no_grad():
        encoder.queries.add_(1)
    with pytest.raises(ValueError, match="another model"):
        encoder.encode_to_file(inputs, tmp_path / "e.npy")


@pytest.mark.parametrize("name", ["e.npy", "e.progress.npy", "e.progress.json"])
def test_a_file_that_was_removed_is_begun_anew(encoder, tmp_path, name):
    encoder.encode_to_file(["a", "b"], tmp_path / "e.npy")
    (tmp_path / name).unlink()
    result = encoder.encode_to_file(["a", "b"], tmp_path / "e.npy")
    assert result.encoded == 2
    assert np.abs(result.embeddings - encoder.encode(["a", "b"])).max() < 1e-6


def _encode_slowly(encoder, path):
    encoded_file._BATCHES_A_FLUSH = 1
    forward = encoder.forward
    encoder.forward = lambda *a, **k: (time.sleep(0.1), forward(*a, **k))[1]
    encoder.encode_to_file([f"text {n}" for n in range(100)], path, batch_size=2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_an_exception_ends_keeps_what_it_computed(encoder, tmp_path, monkeypatch, error):
    inputs, path = [f"text {n}" for n in range(12)], tmp_path / "e.npy"
    with monkeypatch.context() as patched:
        forward, calls = encoder.forward, iter(range(6))

        def interrupted(*args, **kwargs):
            if next(calls) == 4:
                raise error("stopped")
            return forward(*args, **kwargs)

        patched.setattr(encoder, "forward", interrupted)
        with pytest.raises(error, match="stopped"):
            encoder.encode_to_file(inputs, path, batch_size=2)
    result = encoder.encode_to_file(inputs, path)
    assert result.encoded == 4
    assert np.abs(result.embeddings - encoder.encode(inputs)).max() < 1e-6


@needs_fork
def test_a_killed_run_goes_on_where_it_was(encoder, tmp_path):
    path = tmp_path / "e.npy"
    deadline = time.monotonic() + 60
    progress = path.with_suffix(".progress.npy")
    with forked(_encode_slowly, encoder, path):
        while not (progress.exists() and (np.load(progress) == 1).sum() >= 6) and time.monotonic() < deadline:
            time.sleep(0.02)
    done = int((np.load(progress) == 1).sum())
    assert 6 <= done < 100
    inputs = [f"text {n}" for n in range(100)]
    result = encoder.encode_to_file(inputs, path)
    assert result.encoded == 100 - done
    assert np.abs(result.embeddings - encoder.encode(inputs)).max() < 1e-6
    assert json.loads(path.with_suffix(".progress.json").read_text())["shape"] == [100, 32]


def test_several_query_sets_share_one_prefix(checkpoint, encoder, mixed, tmp_path, monkeypatch):
    others = {
        "few": SLQEncoder.from_backbone(encoder.backbone, num_queries=2, seed=1, backbone_name=str(checkpoint())),
        "last": SLQEncoder.from_backbone(encoder.backbone, num_queries=6, seed=2, pooling="last", truncate_dim=8),
    }
    sets = {"own": encoder, **others}
    alone = {name: model.encode(mixed) for name, model in sets.items()}
    rows = []
    run = prefix_source.run_prefix
    monkeypatch.setattr(
        prefix_source,
        "run_prefix",
        lambda decoder, features: rows.extend(features["input_ids"]) or run(decoder, features),
    )
    together = encoder.encode(mixed, query_sets=sets, batch_size=4)
    assert len(rows) == len(mixed)
    assert list(together) == ["own", "few", "last"]
    for name in sets:
        assert together[name].shape == alone[name].shape
        assert np.abs(together[name] - alone[name]).max() < 1e-6
    one = encoder.encode("hello", query_sets=sets)
    assert np.abs(one["few"] - alone["few"][0]).max() < 1e-6
    tensors = encoder.encode(mixed, query_sets=sets, convert_to_tensor=True, normalize_embeddings=True)
    assert tensors["last"].norm(dim=1) == pytest.approx(torch.ones(6))
    encoder.prefix_store = PrefixStore()
    encoder.encode(mixed)
    rows.clear()
    assert np.abs(encoder.encode(mixed, query_sets=sets)["few"] - alone["few"]).max() < 1e-6
    assert not rows
    stranger = SLQEncoder.from_backbone(checkpoint(), num_queries=4, seed=0, device="cpu")
    told = SLQEncoder.from_backbone(encoder.backbone, instructions={"text": "Say {text}."})
    turned = encoder.with_queries(2)
    turned.processor.chat_template = turned.processor.chat_template.replace("user", "reader")
    refused = [(stranger, "another backbone"), (told, "other instructions"), (turned, "another chat template")]
    for other, message in refused:
        for method in (encoder.encode, lambda *args, **options: list(encoder.encode_stream(*args, **options))):
            with pytest.raises(ValueError, match=f"'bad' cannot share .* {message}"):
                method(mixed, query_sets={"bad": other})


def test_a_query_set_gets_its_own_prompt_or_is_refused(encoder, mixed):
    asked = encoder.with_queries(2, seed=1)
    asked.prompts = {"query": "find it."}
    for one, other in ((encoder, asked), (asked, encoder)):
        with pytest.raises(ValueError, match="it has another prompt; pass prompt="):
            one.encode_query(mixed, query_sets={"bad": other})
    for method, options in (("encode_query", {"prompt": "find it."}), ("encode_document", {}), ("encode", {})):
        found = getattr(encoder, method)(mixed, query_sets={"asked": asked}, **options)["asked"]
        assert np.abs(found - getattr(asked, method)(mixed)).max() < 1e-6


def test_workers_read_ahead_beside_a_gpu_only(monkeypatch, caplog):
    assert encoding.default_workers("cpu") == 0
    monkeypatch.setattr(encoding.os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda path: type("U", (), {"free": 8 << 30}))
    assert encoding.default_workers.__wrapped__("cuda") == 8
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda path: type("U", (), {"free": 64 << 20}))
    assert encoding.default_workers.__wrapped__("cuda") == 0
    assert "--shm-size" in caplog.text

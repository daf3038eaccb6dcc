"""What a prefix store in a folder costs: writing, opening, reading with its check, counting and forgetting.

    python benchmarks/store.py [--quick] [--entries 100000] [--folder FOLDER] [--json FILE]

Entries are 20 to 60 KB of random bfloat16 states, as of a small backbone. They are written, looked up and read in batches
of 32 in random order, as a training run does. "plain files" reads the same files with ``safetensors.torch.load_file`` and
nothing else: no check, no store. "cold" reads files that the system has dropped from its cache. The second process opens
and reads the folder of the first. The folder is removed at the end. 100,000 entries take 4 GB and some minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from safetensors.torch import load_file

from slq_embed import PrefixStore

BATCH = 32
Timings = dict[str, float]


def key_of(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def entry_of(number: int, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """512 bytes a token, 40 to 120 tokens."""
    tokens = 40 + number * 7919 % 81
    start = number * 104729 % 1_000_000
    states = noise[start : start + 256 * tokens].view(4, 2, 1, tokens, 32).clone()
    return {"position": torch.tensor([tokens - 1, 3]), "states": states}


def batches(numbers: Sequence[int]) -> Iterator[list[bytes]]:
    for start in range(0, len(numbers), BATCH):
        yield [key_of(int(number)) for number in numbers[start : start + BATCH]]


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def write_all(entries: Any, count: int) -> tuple[float, int]:
    """Seconds to claim, write and release; bytes of the tensors."""
    noise = torch.randn(1_100_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    seconds, payload = 0.0, 0
    for start in range(0, count, BATCH):
        batch = {key_of(n): entry_of(n, noise) for n in range(start, min(count, start + BATCH))}
        payload += sum(part.nbytes for entry in batch.values() for part in entry.values())

        def write(batch: dict[bytes, Any] = batch) -> None:
            claimed = entries.claim(batch)
            entries.write(batch, 10**12)
            entries.release(claimed)

        seconds += timed(write)
    return seconds, payload


def touch(entry: dict[str, torch.Tensor]) -> None:
    """Use an entry as a batch does: one copy of its states."""
    entry["states"].clone()


def read_all(entries: Any, numbers: Sequence[int], lengths: bool) -> float:
    def read() -> None:
        for keys in batches(numbers):
            if lengths and len(entries.lengths(keys)) < len(keys):
                raise RuntimeError("An entry is missing.")
            for entry in entries.read(keys).values():
                touch(entry)

    return timed(read)


def read_plain(folder: Path, numbers: Sequence[int]) -> float:
    def read() -> None:
        for keys in batches(numbers):
            for key in keys:
                touch(load_file(folder / key[:1].hex() / f"{key.hex()}.safetensors"))

    return timed(read)


def drop_from_cache(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, count: int, samples: int) -> tuple[Timings, dict[str, float]]:
    """Seconds for each job, with the unit in its name; sizes."""
    rng = np.random.default_rng(0)
    some = rng.permutation(count)[:samples]
    seconds: Timings = {}
    store = PrefixStore(folder, budget="1TB")
    whole, payload = write_all(store._entries, count)
    seconds["write, an entry"] = whole / count
    store.close()
    seconds["open, with the default budget"] = timed(lambda: PrefixStore(folder))
    store = PrefixStore(folder, budget="1TB")
    seconds["len"] = timed(lambda: len(store))
    seconds["nbytes"] = timed(lambda: store.nbytes)
    for turn in range(2):  # the first turn fills the system's cache
        readings = {
            "plain files, an entry": read_plain(folder, some),
            "read, an entry": read_all(store._entries, some, lengths=False),
            "lengths and read, an entry": read_all(store._entries, some, lengths=True),
        }
        if turn:
            seconds |= {name: value / len(some) for name, value in readings.items()}
    command = [sys.executable, __file__, "--read", str(folder), "--entries", str(count), "--samples", str(samples)]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    seconds |= {"second process: open": float(words[-2]), "second process: read, an entry": float(words[-1])}
    if hasattr(os, "posix_fadvise"):
        drop_from_cache(folder)
        seconds["cold: plain files, an entry"] = read_plain(folder, some[::2]) / len(some[::2])
        seconds["cold: read, an entry"] = read_all(store._entries, some[1::2], lengths=False) / len(some[1::2])
    blocks = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    sizes = {
        "payload_bytes": payload,
        "disk_over_payload": blocks / payload,
        "file_over_payload": store.nbytes / payload,
    }
    seconds["forget 100"] = timed(lambda: store.forget([key_of(int(number)) for number in some[:100]]))
    if len(store) != count - 100:
        raise RuntimeError(f"{len(store)} of {count} entries are left after 100 were forgotten.")
    store.close()
    return seconds, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 entries: a check that it runs, not a measurement")
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=10_000, help="entries that are read in each turn")
    parser.add_argument("--folder", type=Path, help="where to create the folder; default: the system's temporary files")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    count = 2000 if args.quick else args.entries
    samples = min(args.samples, count)
    if args.read:
        started = time.perf_counter()
        store = PrefixStore(args.read, budget="1TB")
        opened = time.perf_counter() - started
        some = np.random.default_rng(1).permutation(args.entries)[:samples]
        print(opened, read_all(store._entries, some, lengths=False) / samples)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        seconds, sizes = measure(Path(folder), count, samples)
    print(f"{count} entries, {sizes['payload_bytes'] / 1e9:.2f} GB of tensors; torch {torch.__version__}")
    for name, value in seconds.items():
        warm, cold = seconds["plain files, an entry"], seconds.get("cold: plain files, an entry", 0)
        plain = cold if name.startswith("cold") else warm
        ratio = f"{value / plain:6.2f} x plain files" if "read" in name or "plain" in name else ""
        print(f"{name:>32}: {value * 1e3:10.3f} ms {ratio}")
    print(f"on disk: {sizes['disk_over_payload']:.3f} x the tensors' bytes")
    common.write(args.json, {"entries": count, "seconds": seconds, **sizes})


if __name__ == "__main__":
    main()

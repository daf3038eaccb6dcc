"""The search index at scale: build time, size, queries a second and recall against exact search, for each kind.

    python benchmarks/index.py [--quick] [--json FILE]
    python benchmarks/index.py --gpu           # with faiss-gpu: the kinds that a GPU holds, there and on the CPU

One million embeddings of 256 dimensions (IVF and HNSW beside exact search) and 100,000 of 2,048 (exact, and quantized with and
without rescoring). They are normal, the n-th dimension scaled by n ** -0.6, turned and normalised: like learned embeddings,
they vary along few directions much and along many a little, where uniform noise would have no neighbours and clusters would be too
easy. Other data give other recalls. Queries are drawn the same way, anew. Recall is the share of the ten exact nearest that is among the ten found. Queries go in
batches of 100, through ids and metadata; the index is saved, and searched as it is loaded: memory-mapped.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from common import versions, write

from slq_embed.index import EmbeddingIndex
from slq_embed.index.faiss_types import has_gpu

K, BATCH, DECAY = 10, 100, 0.6
KINDS = {
    (1_000_000, 256): [
        ("Flat", ""),
        ("IVF4096,Flat", "nprobe=16"),
        ("IVF4096,Flat", "nprobe=64"),
        ("HNSW32,Flat", "efSearch=64"),
        ("HNSW32,Flat", "efSearch=256"),
    ],
    (100_000, 2048): [
        ("Flat", ""),
        ("SQ8", ""),
        ("SQ4", ""),
        ("SQ4,RFlat", "k_factor_rf=4"),
        ("RaBitQ", ""),
        ("RaBitQ,RFlat", "k_factor_rf=10"),
    ],
}
ON_GPU = ("Flat", "IVF4096,Flat", "IVF128,Flat")


def draw(count: int, dimension: int, seed: int) -> np.ndarray:
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((dimension, dimension)))[0].astype(np.float32)
    rows = np.random.default_rng(seed).standard_normal((count, dimension), dtype=np.float32)
    rows *= np.arange(1, dimension + 1, dtype=np.float32) ** -DECAY
    rows = rows @ turn  # quantizers work by dimension
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def build(rows: np.ndarray, factory: str) -> tuple[EmbeddingIndex, float]:
    index = EmbeddingIndex(dimension=rows.shape[1], factory=factory, gpu=False)
    started = time.perf_counter()
    for start in range(0, len(rows), 50_000):
        part = rows[start : start + 50_000]
        index.add_embeddings(part, [str(n) for n in range(start, start + len(part))])
    index.search_embeddings(rows[:1])  # which makes types that learn from less
    return index, time.perf_counter() - started


def search(index: EmbeddingIndex, queries: np.ndarray, rounds: int) -> tuple[list[set[int]], float]:
    """What was found, and queries a second."""
    found: list[set[int]] = []
    taken = []
    for _ in range(rounds + 1):
        found.clear()
        started = time.perf_counter()
        for start in range(0, len(queries), BATCH):
            for hits in index.search_embeddings(queries[start : start + BATCH], K):
                found.append({int(hit.id) for hit in hits})
        taken.append(time.perf_counter() - started)
    return found, len(queries) / statistics.median(taken[1:])


def recall(found: list[set[int]], exact: list[set[int]]) -> float:
    return sum(len(a & b) for a, b in zip(found, exact, strict=True)) / sum(map(len, exact))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the embeddings: a check that it runs")
    parser.add_argument("--gpu", action="store_true", help="the kinds that a GPU holds, on the CPU and on the GPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.gpu and not has_gpu():
        raise SystemExit("There is no faiss-gpu, or no GPU: pip install 'slq-embed[faiss-gpu]'.")
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {faiss.omp_get_max_threads()} threads",
        "versions": {**versions(), "faiss": faiss.__version__, "numpy": np.__version__},
        "kinds": [],
    }
    print(result["machine"], result["versions"])
    for (count, dimension), kinds in KINDS.items():
        count = count // 10 if args.quick else count
        rows, queries = draw(count, dimension, 1), draw(200 if args.quick else 1000, dimension, 2)
        exact: list[set[int]] = []
        rate_of_exact = 0.0
        made: dict[str, tuple[EmbeddingIndex, float]] = {}
        print(f"{count} embeddings of {dimension} dimensions, {len(queries)} queries, medians of {args.rounds} rounds")
        with tempfile.TemporaryDirectory() as temporary:
            for factory, parameters in kinds:
                if args.quick:
                    factory = factory.replace("4096", "128")
                if args.gpu and factory not in ON_GPU:
                    continue
                if factory not in made:
                    made.clear()
                    made[factory] = build(rows, factory)
                index, seconds = made[factory]
                index.search_parameters = parameters
                started = time.perf_counter()
                index.save(Path(temporary) / "index")
                saving = time.perf_counter() - started
                size = sum(file.stat().st_size for file in Path(temporary).rglob("*") if file.is_file())
                started = time.perf_counter()
                loaded = EmbeddingIndex.load(Path(temporary) / "index", gpu=False)
                loading = time.perf_counter() - started
                found, rate = search(loaded, queries, args.rounds)
                if not exact:
                    exact, rate_of_exact = found, rate
                row = {"count": count, "dimension": dimension, "factory": factory, "parameters": parameters}
                row |= {
                    "recall": recall(found, exact),
                    "queries_per_second": rate,
                    "against_exact": rate / rate_of_exact,
                }
                row |= {"build_seconds": seconds, "save_seconds": saving, "load_seconds": loading, "bytes": size}
                if args.gpu:
                    there = EmbeddingIndex.load(Path(temporary) / "index", gpu=True)
                    found, rate = search(there, queries, args.rounds)
                    row |= {"gpu_recall": recall(found, exact), "gpu_queries_per_second": rate}
                    row["gpu_against_cpu"] = rate / row["queries_per_second"]
                result["kinds"].append(row)
                print(
                    f"{factory:>14} {parameters:<16} recall@10 {row['recall']:.3f}  {row['queries_per_second']:8.0f} queries/s ({row['against_exact']:6.1f} x)  "
                    f"built {seconds:6.1f} s, saved {saving:5.1f} s, loaded {loading:.2f} s, {size / 1e9:.2f} GB",
                    flush=True,
                )
                if args.gpu:
                    of_both = f"{rate:8.0f} queries/s ({row['gpu_against_cpu']:6.1f} x the CPU)"
                    print(f"{'on the GPU':>31} recall@10 {row['gpu_recall']:.3f}  {of_both}", flush=True)
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory {result['peak_memory_bytes'] / 1e9:.1f} GB")
    write(args.json, result)


if __name__ == "__main__":
    main()

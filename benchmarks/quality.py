"""Does a frozen backbone with latent queries retrieve as well as LoRA and full fine-tuning, and what does each forget?

    python benchmarks/quality.py [--world toy] [--seeds 0 1 2 3 4] [--output FOLDER] [--json FILE]
    python benchmarks/quality.py --world photos --seeds 0 1 2 [--prefixes FOLDER]
    python benchmarks/quality.py --world photos --time 4
    python benchmarks/quality.py --quick --json FILE

The same backbone, pairs, batches, steps, loss, schedule and evaluation for all methods. The learning rates of each, out of RATES
and PART_RATES, and when it stops, out of STOPS, are chosen on the validation split with the first seed; what is reported comes from
the test split. Methods without latent queries read the embedding from the last token, and from the others in READOUTS where nothing is
trained; the best is chosen on validation, too. Each run has a process of its own and writes a file into the output folder: a run
that was killed goes on.

Columns: text-to-image recall by kind of query, answers_kept (the share of answers that are the same as before the
training), same_bits (whether the logits are), numbers trained, seconds and peak memory above the weights of the training. The
JSON file has these, and the results of all runs in the folder, chosen or not.

--quick: QUICK_METHODS, one seed, few steps, the learning rates in QUICK. --prefixes: runs with latent queries keep the prefixes in
this folder, and share them; `seconds` counts the time to compute them all the same. The folder may grow to tens of GB; it can be removed.
--time N: the seconds of N steps, in place of all else. The methods take turns, twice, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import machine, parser, peak_above_weights, quiet, timed, write
from methods import METHODS, OURS, READOUTS, Retriever, build, train
from photo_world import PhotoWorld
from worlds import ToyWorld

from slq_embed import PrefixStore
from slq_embed.evaluation import best_ranks

RATES: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(OURS, (1e-2, 4e-2, 1.6e-1)),
    "slq_adapters_head": (4e-2, 1.6e-1),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2),
    "full_finetuning": (3e-5, 1e-4, 3e-4, 1e-3),
}
PART_RATES = dict.fromkeys(("slq_head", "slq_deep", "slq_adapters"), (2e-3, 8e-3))
"""Of what is trained beside the queries. These then have PART_OF; RATES are tried with the default rates of the parts."""
PART_OF = 4e-2
STOPS = [0.5, 1.0]  # shares of the steps; the schedule is that of all steps
QUICK = {**dict.fromkeys(OURS, 4e-2), "lora": 1e-3, "full_finetuning": 1e-4}
QUICK_METHODS = ("zero_shot", "slq", "slq_adapters", "lora", "full_finetuning")
TEMPERATURE_RATE = 4e-2
RECALL_AT = (1, 5, 10)
WORLDS: dict[str, Any] = {"toy": ToyWorld, "photos": PhotoWorld}
SIZES = {"toy": (64, 32, torch.float32), "photos": (64, 16, torch.bfloat16)}  # steps, pairs a step, precision


def run(options: dict[str, Any], prefixes: Path | None) -> dict[str, Any]:
    """Train one retriever. Measure it on the validation split at each stop, and on both splits at the end."""
    world = WORLDS[options["world"]](**options["sizes"])
    backbone, processor = world.load()
    backbone = backbone.to(options["device"]).eval()
    precision = SIZES[options["world"]][2]
    store = PrefixStore(prefixes) if prefixes and options["method"] in OURS else None
    names = ("method", "readout")
    retriever = build(
        *(options[name] for name in names),
        backbone,
        processor,
        options["rate"] or 0.0,
        options["seed"],
        precision,
        store,
        options.get("parts"),
    )
    before = world.knowledge(backbone, processor)
    seconds, peaks, stops = 0.0, [0], {}
    if retriever.trained:
        draw = (options["seed"], options["steps"], options["batch"])
        if store is not None and prefixes is not None:
            seconds = fill(retriever, world.batches(*draw), prefixes / f"{'-'.join(map(str, draw))}.json")
        step = train(retriever, world.batches(*draw), options["steps"], TEMPERATURE_RATE)
        done = 0
        for share in options["stops"]:
            goal = round(share * options["steps"])
            steps = partial(list, islice(step, goal - done))

            def until_stop(steps: Any = steps) -> None:
                peaks.append(peak_above_weights(steps, options["device"], times=1))

            seconds, done = seconds + timed(until_stop, options["device"]), goal
            stops[str(share)] = recalls(retriever, world, "validation")
    after = world.knowledge(backbone, processor)
    kept = [one == other for one, other in zip(before.answers, after.answers, strict=True)]
    result: dict[str, Any] = {
        "trained_numbers": retriever.numbers,
        "seconds": seconds,
        "peak_bytes": max(peaks),
        "answers_kept": sum(kept) / len(kept),
        "same_bits": before.bits == after.bits,
        "answers_right": after.right,
        "answers_right_before": before.right,
    }
    if after.perplexity is not None:
        result |= {"perplexity": after.perplexity, "perplexity_before": before.perplexity}
    stops = stops or {"1.0": recalls(retriever, world, "validation")}
    return result | {"validation": stops, "test": recalls(retriever, world, "test")}


def time_steps(options: dict[str, Any]) -> list[float]:
    """Seconds of some training steps, after one that is not counted. Nothing is kept between them."""
    world = WORLDS[options["world"]](**options["sizes"])
    backbone, processor = world.load()
    backbone = backbone.to(options["device"]).eval()
    rate = RATES[options["method"]][0]
    precision = SIZES[options["world"]][2]
    retriever = build(options["method"], "last", backbone, processor, rate, options["seed"], precision)
    steps = options["time"] + 1
    step = train(retriever, world.batches(options["seed"], steps, options["batch"]), steps, TEMPERATURE_RATE)
    return [timed(partial(next, step), options["device"]) for _ in range(steps)][1:]


def fill(retriever: Retriever, batches: Any, record: Path) -> float:
    """Compute the prefixes of all batches, or read how many seconds that took in an earlier run."""
    if not record.exists():
        started = time.perf_counter()
        with torch.no_grad():
            for columns in batches:
                for column in columns:
                    retriever(column)
        record.write_text(json.dumps(time.perf_counter() - started))
    seconds: float = json.loads(record.read_text())
    return seconds


def recalls(retriever: Retriever, world: Any, split: str) -> dict[str, float]:
    """Recall both ways for each kind of query; under the kind's own name, the one that is compared."""
    result: dict[str, float] = {}
    encoded: dict[int, torch.Tensor] = {}
    for kind, held_out in world.retrieval(split).items():
        if (images := encoded.get(id(held_out.images))) is None:
            images = encoded[id(held_out.images)] = retriever.encode(held_out.images)
        texts = retriever.encode(held_out.texts)
        owner, order = torch.tensor(held_out.image_of), torch.arange(len(images))
        ways = {"": best_ranks(texts, images, owner, order), "image_to_text_": best_ranks(images, texts, order, owner)}
        for way, ranks in ways.items():
            result |= {f"{way}{kind}@{k}": float((ranks < k).double().mean()) for k in RECALL_AT}
        result[kind] = result[f"{kind}@{world.recall_at}"]
    return result


def result_of(folder: Path, options: dict[str, Any], prefixes: Path | None) -> dict[str, Any]:
    """The result of a run: that of an earlier one with the same options, or else of a process of its own."""
    named = [options[key] for key in ("method", "readout", "rate", "parts", "seed") if key in options]
    name = "-".join(map(str, (*named, options["stops"][-1])))
    path = folder / f"{name}.json"
    if path.exists() and (done := json.loads(path.read_text()))["options"] == options:
        return done["result"]
    print(f"{name} ...", flush=True, file=sys.stderr)
    result = in_its_process(options, prefixes)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"options": options, "result": result}, indent=2) + "\n")
    partial.replace(path)  # a killed run leaves no half file
    return result


def in_its_process(options: dict[str, Any], prefixes: Path | None = None) -> Any:
    """What a run returns, in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--run", json.dumps(options)]
    command += ["--prefixes", str(prefixes)] if prefixes else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        raise RuntimeError(f"The run {options} failed: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def choose(folder: Path, options: dict[str, Any], method: str, kinds: tuple[str, ...], prefixes: Path | None) -> Any:
    """The read-out, or the learning rate and the stop, that are best on the validation split with the first seed."""
    readouts = READOUTS if method == "zero_shot" else ("last",)
    tried = []
    for readout in readouts:
        rates: list[dict[str, Any]] = [{"rate": rate} for rate in RATES.get(method, (None,))]
        rates += [{"rate": PART_OF, "parts": rate} for rate in PART_RATES.get(method, ())]
        for rate in rates:
            setting = {"method": method, "readout": readout, **rate}
            found = result_of(folder, {**options, **setting, "stops": STOPS}, prefixes)["validation"]
            for share, recall in found.items():
                until = [stop for stop in STOPS if stop <= float(share)]
                tried.append((sum(recall[kind] for kind in kinds), {**setting, "stops": until}))
    return max(tried, key=lambda pair: pair[0])[1]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--world", default="toy", choices=WORLDS)
    options.add_argument("--methods", nargs="+", choices=METHODS, help="by default all, or QUICK_METHODS")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options.add_argument("--steps", type=int, default=None)
    options.add_argument("--batch", type=int, default=None)
    options.add_argument("--output", type=Path, default=Path("output/quality"), help="folder of the finished runs")
    options.add_argument("--prefixes", type=Path, help="folder in which runs with latent queries share prefixes")
    options.add_argument("--time", type=int, metavar="N", help="the seconds of N steps of each method, in turns")
    options.add_argument("--run", help=argparse.SUPPRESS)
    args = options.parse_args()
    quiet()
    if args.run:
        run_options = json.loads(args.run)
        print(json.dumps(time_steps(run_options) if "time" in run_options else run(run_options, args.prefixes)))
        return
    methods = args.methods or (QUICK_METHODS if args.quick else METHODS)
    seeds = args.seeds[:1] if args.quick else args.seeds
    sizes = {"held_out": 200, "asked": 40} if args.quick else {}
    steps, batch, _ = (40, 32, None) if args.quick else SIZES[args.world]
    common = {"world": args.world, "sizes": sizes, "device": args.device}
    common |= {"steps": args.steps or steps, "batch": args.batch or batch}
    if args.time:
        trained = [method for method in methods if method != "zero_shot"]
        write(args.json, machine(args) | {"common": common, "seconds_a_step": take_turns(common, trained, args.time)})
        return
    folder = args.output / ("quick" if args.quick else args.world)
    kinds = WORLDS[args.world].kinds
    table: dict[str, dict[str, Any]] = {}
    for method in methods:
        setting = {"method": method, "readout": "last", "rate": QUICK.get(method), "stops": [1.0]}
        if not args.quick:
            setting = choose(folder, {**common, "seed": seeds[0]}, method, kinds, args.prefixes)
        drawn = seeds[:1] if method == "zero_shot" else seeds
        runs = [result_of(folder, {**common, **setting, "seed": seed}, args.prefixes) for seed in drawn]
        runs = [{**result, **result["test"]} for result in runs]
        middle = {
            key: statistics.median(float(result[key]) for result in runs)
            for key in runs[0]
            if key not in ("validation", "test")
        }
        spread = {key: [result[key] for result in runs] for key in kinds}
        table[method] = {**middle, "same_bits": all(result["same_bits"] for result in runs), "setting": setting}
        table[method]["seeds"] = spread
    print_table(table, kinds, WORLDS[args.world].recall_at)
    write(
        args.json,
        machine(args)
        | {
            "search_space": {"rates": RATES, "part_rates": PART_RATES, "stops": STOPS},
            "common": common,
            "seeds": seeds,
            **table,
            "runs": {path.stem: json.loads(path.read_text())["result"] for path in sorted(folder.glob("*.json"))},
        },
    )


def take_turns(common: dict[str, Any], methods: list[str], steps: int) -> dict[str, float]:
    """Median seconds of a training step of each method."""
    taken: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(2):
        for method in methods:
            taken[method] += in_its_process({**common, "method": method, "seed": 0, "time": steps})
    seconds = {method: statistics.median(values) for method, values in taken.items()}
    for method, value in seconds.items():
        print(f"{method:>16} {value:8.2f} s a step, {value / seconds[methods[0]]:5.2f} x {methods[0]}")
    return seconds


def print_table(table: dict[str, dict[str, Any]], kinds: tuple[str, ...], recall_at: int) -> None:
    """Medians over seeds; recalls with the smallest and the largest."""
    columns = " ".join(f"{f'{kind} R@{recall_at}':>20}" for kind in kinds)
    print(f"{'method':>16} {columns} answers kept  bits {'numbers':>11} seconds  peak MB  perplexity")
    for method, row in table.items():
        recall = " ".join(
            f"{row[kind]:7.1%} {min(row['seeds'][kind]):5.1%}..{max(row['seeds'][kind]):5.1%}" for kind in kinds
        )
        bits = "same" if row["same_bits"] else "other"
        print(f"{method:>16} {recall} {row['answers_kept']:12.1%} {bits:>5} ", end="")
        print(f"{int(row['trained_numbers']):11,} {row['seconds']:7.0f} {row['peak_bytes'] / 1e6:8.0f}", end="  ")
        print(f"{row['perplexity_before']:.1f} -> {row['perplexity']:.1f}" if "perplexity" in row else "")


if __name__ == "__main__":
    main()

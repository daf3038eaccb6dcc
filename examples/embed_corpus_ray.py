"""Embed a corpus of images and texts on a Ray cluster, into parquet files that a vector database reads.

    python examples/embed_corpus_ray.py --model slq-photos --input photos --output embeddings
    python examples/embed_corpus_ray.py --model slq-photos --input rows.parquet --id id --image image --text caption --keep url
    python examples/embed_corpus_ray.py --model slq-photos --input shards/*.tar --image jpg --actors 8 --dtype bfloat16

--input is a folder of images, or files: parquet, jsonl or WebDataset shards (*.tar). An image is bytes, a dict of bytes and path
as `datasets` writes it, or a path relative to the first file's folder. A text is a string, or bytes in UTF-8. CPU tasks decode and
preprocess; actors hold the model, one on each GPU, or one on CPUs. Ray starts an actor again that was killed, and gives it the
same rows.

The same command again goes on with what is missing, and one with another --input adds to it: an id that OUTPUT has is not embedded
again, so ids must differ over all inputs. Other settings need another OUTPUT, which records them in OUTPUT/model.json.
OUTPUT/embeddings has the id, the columns of --keep and `embedding`; OUTPUT/skipped.jsonl names each input that the last run
could not read, with the reason. On several machines all must see OUTPUT, the inputs and the folder of the model under the same paths.
Hardware: anything that runs Ray (`pip install "ray[data]"`). Expected output: how many inputs were embedded, and what was skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import send_to_device
from sentence_transformers.util import truncate_embeddings

from slq_embed import SLQEncoder, pretrained
from slq_embed.encoding import encoder_digest, resolve_prompt
from slq_embed.inputs.images import IMAGE_SUFFIXES

try:
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data.checkpoint import CheckpointConfig
except ImportError:  # --help works without it
    ray = None

IMAGES = [suffix[1:] for suffix in IMAGE_SUFFIXES]


@dataclass
class Preprocess:
    """Turns rows into features, in CPU tasks: the images of a batch are decoded, and a bad one is left out.

    Args:
        reader: What reads inputs, in Ray's object store; without the backbone's weights.
        columns: Names of the columns with ids, images and texts; an image or a text may be missing.
        keep: Columns that go into the result.
        root: Folder that paths of images are relative to.
        prompt: A system message.
        skipped: Folder for what cannot be read.
    """

    reader: ray.ObjectRef
    columns: tuple[str, str | None, str | None]
    keep: Sequence[str]
    root: Path
    prompt: str | None
    skipped: Path
    transformer: Any = None
    """The reader, taken out of the store once a task."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One row that holds the features of a batch, and what is kept beside them."""
        kept = rows.select([self.columns[0], *self.keep])
        found = rows.to_pylist()
        try:
            features = self.features(found)
        except (ValueError, OSError, RuntimeError):  # which of them was it?
            readable = [self.can_read(row, str(name)) for row, name in zip(found, kept[0].to_pylist(), strict=True)]
            kept = kept.filter(pa.array(readable, pa.bool_()))
            features = self.features([row for row, good in zip(found, readable, strict=True) if good])
        # Arrow has no type for features.
        return pa.table({"batch": [pickle.dumps((kept, features))] if len(kept) else pa.array([], pa.binary())})

    def input_of(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row as the encoder takes it.

        Raises:
            ValueError: If a text is bytes that are not UTF-8.
        """
        _, image, text = (row.get(column) if column else None for column in self.columns)
        if isinstance(image, str):
            image = self.root / image
        elif isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
            image = self.root / image["path"]
        if isinstance(text, bytes):  # what shards hold is bytes
            text = text.decode("utf8")
        return {"image": image, "text": text}

    def features(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Features of a batch."""
        self.transformer = self.transformer or ray.get(self.reader)
        inputs = [self.input_of(row) for row in rows]
        features: dict[str, Any] = self.transformer.preprocess(inputs, self.prompt, keyed=False)
        return features

    def can_read(self, row: dict[str, Any], name: str) -> bool:
        """Whether a row can be read. If not, a file says why: its name depends on the id, so a task may run again."""
        try:
            self.features([row])
        except (ValueError, OSError, RuntimeError) as error:
            reason = str(error).removeprefix("Input 0 of 1: ")
            path = self.skipped / f"{hashlib.sha256(name.encode()).hexdigest()}.json"
            path.write_text(json.dumps({self.columns[0]: name, "reason": reason}), "utf8")
            return False
        return True


class Embed:
    """An actor that holds the model.

    Args:
        model: Folder or hub name of the SLQ model.
        dtype: Precision of the backbone.
    """

    def __init__(self, model: str, dtype: str) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.encoder = SLQEncoder(model, device=device, model_kwargs={"dtype": getattr(torch, dtype)}).eval()

    @torch.inference_mode()
    def __call__(self, batches: pa.Table) -> pa.Table:
        """The id and the embedding of each input, ``(inputs, H)`` float32, as lists of equal length."""
        tables = []
        for batch in batches["batch"].to_pylist():
            table, features = pickle.loads(batch)
            rows = self.encoder(send_to_device(features, self.encoder.device))["sentence_embedding"]
            rows = truncate_embeddings(rows, self.encoder.truncate_dim).float().cpu()
            values = pa.FixedSizeListArray.from_arrays(pa.array(rows.flatten().numpy()), rows.shape[1])
            tables.append(table.append_column("embedding", values))
        return pa.concat_tables(tables)


def kind_of(files: list[str]) -> str:
    """What the files are: a folder of images, or files that end in .parquet, .jsonl or .tar.

    Raises:
        SystemExit: If there are no such files, or they are of other kinds.
    """
    if missing := [file for file in files if not Path(file).exists()]:
        raise SystemExit(f"There is no {missing[0]}. Give a folder of images, or parquet, jsonl or tar files.")
    kinds = {"folder" if Path(file).is_dir() else Path(file).suffix for file in files}
    if len(kinds) > 1 or not kinds <= {"folder", ".parquet", ".jsonl", ".tar"}:
        raise SystemExit(
            f"The input is {', '.join(sorted(kinds))}: one of a folder, .parquet, .jsonl and .tar is needed."
        )
    return kinds.pop()


def read(files: list[str], kind: str) -> Any:
    """A Ray data set of rows."""
    if kind == "folder":
        return ray.data.read_binary_files(files, include_paths=True, file_extensions=IMAGES)
    if kind == ".tar":
        return ray.data.read_webdataset(files, decoder=None)
    return ray.data.read_parquet(files) if kind == ".parquet" else ray.data.read_json(files)


def begin(output: Path, settings: dict[str, Any]) -> None:
    """Make the output folder, or go on in it.

    Raises:
        SystemExit: If it was made with other settings.
    """
    record = output / "model.json"
    before = json.loads(record.read_text("utf8")) if record.is_file() else settings
    if differing := [name for name in settings if before.get(name) != settings[name]]:
        changes = "; ".join(f"{name} was {before.get(name)!r}, and is {settings[name]!r}" for name in differing)
        raise SystemExit(
            f"{output} has embeddings with other settings: {changes}. Give another --output, or these settings."
        )
    shutil.rmtree(output / "skipped", ignore_errors=True)  # these are tried again
    (output / "skipped").mkdir(parents=True)
    record.write_text(json.dumps(settings, indent=2) + "\n", "utf8")


def columns_of(kind: str, args: argparse.Namespace) -> tuple[str, str | None, str | None]:
    """Names of the columns with ids, images and texts.

    Raises:
        SystemExit: If one is missing, or is named where it is none.
    """
    fixed = {"folder": ["id", "image", "text"], ".tar": ["id"]}.get(kind, [])
    if named := [f"--{option}" for option in fixed if getattr(args, option) is not None]:
        what = (
            "a folder, where the path of an image is its id" if kind == "folder" else "shards, where the key is the id"
        )
        raise SystemExit(f"{named[0]} names a column, but the input is {what}. Leave it out.")
    if kind == "folder":
        return "path", "bytes", None
    id_column = "__key__" if kind == ".tar" else args.id
    if id_column is None:
        raise SystemExit("Which column names each row? Say so with --id; its values must differ.")
    if args.image is None and args.text is None:
        raise SystemExit("Nothing to embed: name a column with --image, --text, or both.")
    return id_column, args.image, args.text


def require_columns(files: list[str], kind: str, names: Sequence[str | None]) -> None:
    """Raise a SystemExit that names a column which a file does not have. The members of a shard may differ from row to row."""
    for file in files if kind in (".parquet", ".jsonl") else []:
        if kind == ".parquet":
            present = set(pq.read_schema(file).names)
        else:
            with Path(file).open(encoding="utf8") as lines:
                present = {name for line in islice(lines, 100) if line.strip() for name in json.loads(line)}
        if missing := [name for name in names if name and name not in present]:
            raise SystemExit(f"{file} has no column {missing[0]!r}. It has {', '.join(sorted(present))}.")


def embedded(output: Path) -> int:
    """How many embeddings the output folder has."""
    return sum(pq.read_metadata(path).num_rows for path in (output / "embeddings").glob("*.parquet"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(pretrained("slq-tiny")), help="folder or hub name; by default slq-tiny, a toy model")
    add("--input", nargs="+", required=True, help="a folder of images; parquet, jsonl or tar files")
    add("--output", type=Path, default=Path("output/embeddings"), help="folder to write (default: %(default)s)")
    add("--id", help="column that names each row (parquet, jsonl)")
    add("--image", help="column with images (not for a folder)")
    add("--text", help="column with texts (not for a folder)")
    add("--keep", nargs="*", default=[], help="columns to keep beside the embeddings")
    add("--prompt", help="a system message; by default the model's prompt for documents")
    add("--batch", type=int, default=32, help="inputs a batch (default: %(default)s)")
    add("--actors", type=int, help="copies of the model; by default one a GPU, or one")
    add(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="precision of the backbone (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if ray is None:
        raise SystemExit('Ray is not installed. Run: pip install "ray[data]"')
    output, root = args.output.resolve(), Path(args.input[0]).resolve().parent
    kind = kind_of(args.input)
    columns = columns_of(kind, args)
    require_columns(args.input, kind, (*columns, *args.keep))
    # Actors of a cluster that is running have another working folder.
    name = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    model = SLQEncoder(name, device="cpu")
    prompt = resolve_prompt(model, args.prompt, task="document")
    options = dict(zip(("--id", "--image", "--text"), columns, strict=True)) | {"--keep": args.keep}
    settings = {"digest of the model": encoder_digest(model), "prompt": prompt, "--dtype": args.dtype, **options}
    begin(output, settings)
    before = embedded(output)
    ray.init(ignore_reinit_error=True, include_dashboard=False)
    # What Ray has written it will not read again. A data set keeps the configuration that it was made with.
    DataContext.get_current().checkpoint_config = CheckpointConfig(
        columns[0], f"file://{output}/done", delete_checkpoint_on_success=False
    )
    rows = read([str(Path(file).resolve()) for file in args.input], kind)
    model.backbone.to("meta")  # reading needs its configuration, and no weights
    reader = ray.put(model.transformer)
    preprocess = Preprocess(reader, columns, args.keep, root, prompt, output / "skipped")
    gpus = int(ray.cluster_resources().get("GPU", 0))
    features = rows.map_batches(preprocess, batch_size=args.batch, batch_format="pyarrow")
    embeddings = features.map_batches(
        Embed,
        fn_constructor_args=(name, args.dtype),
        batch_size=1,
        batch_format="pyarrow",
        num_gpus=1 if gpus else 0,
        num_cpus=0,  # else the actors of a small machine would take the CPUs that reading and writing wait for
        compute=ActorPoolStrategy(size=args.actors or gpus or 1),
    )
    embeddings.write_parquet(str(output / "embeddings"))
    skipped = [path.read_text("utf8") for path in sorted((output / "skipped").iterdir())]
    (output / "skipped.jsonl").write_text("".join(f"{line}\n" for line in skipped), "utf8")
    count = embedded(output)
    print(f"{count} embeddings in {args.output / 'embeddings'}, {count - before} of them new; {len(skipped)} skipped")
    for line in skipped:
        print(line)


if __name__ == "__main__":
    main()

"""Search a folder of photos by words, by a picture, or by both, and see in a browser what was found.

    python examples/search_photos.py                                   # on 200 rendered scenes, which it makes first
    python examples/search_photos.py FOLDER "a query" [--image query.png] [--model slq-tiny] [--html gallery.html]

The index is kept in the folder: a later run embeds only what is new or has changed, and drops what was removed.
`slq-tiny` knows coloured shapes; for photos, give --model an SLQ model that was trained on some. Needs FAISS:
pip install ".[faiss]". Hardware: 2 CPU cores, 9 to 20 seconds. Expected output: a line on the
index, the hits with their scores (0.72 for three yellow rings), and the path of a page that needs no network.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
from html import escape
from pathlib import Path
from urllib.parse import quote

from slq_embed import SLQEncoder, pretrained
from slq_embed.index import EmbeddingIndex, Hit, image_files
from slq_embed.inputs import read_image
from slq_embed.toy import render, sample_scenes

SCENES, QUERY = 20 if os.environ.get("SLQ_SMOKE") else 200, "three yellow rings"
STYLE = """:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif }
body { max-width: 75rem; margin: auto; padding: 1.5rem } h1 { font-size: 1.4rem } header img { height: 8rem }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(10rem, 100%), 1fr)) }
figure { margin: 0; overflow: hidden; border: 1px solid #8884; border-radius: .7rem }
figure img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover } span { overflow-wrap: anywhere }
figcaption { display: flex; gap: .5rem; justify-content: space-between; padding: .5rem .7rem; font-size: .85rem }"""


def make_photos(folder: Path) -> Path:
    if not folder.exists():
        folder.mkdir()
        for number, scene in enumerate(sample_scenes(SCENES, "test", weights=(0.2, 0.3, 0.3, 0.2))):
            render(scene, seed=number).save(folder / f"scene-{number:03}.png")
    return folder


def bring_up_to_date(index: EmbeddingIndex, files: dict[str, Path]) -> str:
    """Add what is new, delete what is gone, do both for what has changed, name what cannot be read."""
    modified = {name: file.stat().st_mtime_ns for name, file in files.items()}
    removed = index.delete(name for name in index.ids() if index.metadata(name).get("modified") != modified.get(name))
    new = [name for name in files if name not in index]
    skipped = index.add([files[name] for name in new], new, [{"modified": modified[name]} for name in new])
    report = "".join(f"Skipped: {row.reason}\n" for row in skipped)
    return f"{report}{len(index)} photos: {len(new) - len(skipped)} added, {removed} removed, {len(skipped)} skipped"


def image_tag(file: Path, alt: str) -> str:
    """A small copy of the picture inside the page: any format shows, and shows fast."""
    picture, data = read_image(file), io.BytesIO()
    picture.thumbnail((480, 480))
    picture.save(data, "JPEG", quality=90)
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'


def gallery(page: Path, text: str, image: Path | None, hits: list[Hit], files: dict[str, Path]) -> str:
    title = escape(text or "Like this picture")
    query_picture = image_tag(image, "the picture of the query") if image else ""
    html = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n<meta name="viewport"'
    html += f' content="width=device-width"><style>{STYLE}</style>\n<header>{query_picture}<h1>{title}</h1></header><main>\n'
    for hit in hits:
        link = quote(os.fsencode(Path(os.path.relpath(files[hit.id], page.parent)).as_posix()))
        html += f'<figure><a href="{link}">{image_tag(files[hit.id], hit.id)}</a><figcaption>'
        html += f"<span>{escape(hit.id)}</span><b>{hit.score:.2f}</b></figcaption></figure>\n"
    return html + "</main></html>\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of photos; by default ./scenes, which is made")
    parser.add_argument(
        "query", nargs="?", default="", help="what to look for, in words; by default three yellow rings"
    )
    parser.add_argument("--image", type=Path, help="a picture; with words, both at once (slq-tiny was not trained to)")
    parser.add_argument(
        "--model", default="slq-tiny", help="an SLQ model: a folder, a hub name, or slq-tiny (default: %(default)s)"
    )
    parser.add_argument("--index", type=Path, help="where to keep the index; by default FOLDER/.slq-index")
    parser.add_argument(
        "--html", type=Path, default=Path("gallery.html"), help="the page to write (default: %(default)s)"
    )
    parser.add_argument("-k", type=int, default=12, help="how many photos to show (default: %(default)s)")
    args = parser.parse_args(argv)
    folder, text = args.folder or make_photos(Path("scenes")), args.query or ("" if args.image else QUERY)
    if not folder.is_dir():
        parser.error(f"there is no folder {folder}")
    if args.image and not args.image.is_file():
        parser.error(f"there is no picture {args.image}")
    if args.k < 1:
        parser.error(f"-k is {args.k}, but at least 1 photo is to be shown")
    index_folder = args.index or folder / ".slq-index"
    try:
        model = SLQEncoder(pretrained(args.model) if args.model == "slq-tiny" else args.model)
    except (OSError, ValueError) as error:
        parser.error(f"--model cannot be loaded: {error}")
    index = (
        EmbeddingIndex.load(index_folder, model) if (index_folder / "index.json").exists() else EmbeddingIndex(model)
    )
    # File names need not be Unicode: what is not is escaped.
    files = {str(p.relative_to(folder)).encode(errors="backslashreplace").decode(): p for p in image_files(folder)}
    print(bring_up_to_date(index, files))
    index.save(index_folder)
    hits = index.search({"text": text or None, "image": args.image}, k=args.k)
    print("\n".join(f"{hit.score:6.2f}  {hit.id}" for hit in hits))
    args.html.write_text(gallery(args.html, text, args.image, hits, files), encoding="utf8")
    print(f"Gallery: {args.html.resolve()}")


if __name__ == "__main__":
    main()

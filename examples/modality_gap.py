"""A picture of the modality gap: images and texts of a model before and after training, projected onto a plane.

    python examples/modality_gap.py                                # new queries and slq-tiny, on rendered scenes
    python examples/modality_gap.py --data photos --before my-backbone --after my-model --png gap.png

--before is an SLQ model, or a backbone that gets new queries; --data is a folder with captions.jsonl. Hardware: 2 CPU
cores, 20 seconds. Expected output: centroid distance, alignment and uniformity of both, and the path of a PNG. After
training, alignment is smaller (pairs are closer) and both uniformities are lower (both spread out).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from slq_embed import SLQEncoder, pretrained
from slq_embed.data import from_folder
from slq_embed.evaluation import ModalityGap, measure_modality_gap, project_to_plane
from slq_embed.toy import captions, render, sample_scenes

PAIRS = 40 if os.environ.get("SLQ_SMOKE") else 400
PANEL, MARGIN, HEAD, SHARP = 460, 30, 96, 3  # pixels; drawn at three times the size, and reduced
IMAGE, TEXT, INK = (0, 114, 178), (230, 120, 0), (40, 40, 40)  # two colours that most colour-blind people tell apart


def load_model(name: str) -> SLQEncoder:
    if name in ("slq-tiny", "mllm-tiny"):
        name = pretrained(name)
    try:
        return SLQEncoder(name)
    except ValueError:  # a backbone
        return SLQEncoder.from_backbone(name, num_queries=16, seed=0)


def load_pairs(folder: Path | None) -> tuple[list[Any], list[str]]:
    """Images, each with one of its texts."""
    if folder is None:
        scenes = sample_scenes(PAIRS, "test")
        return [render(scene, seed=7) for scene in scenes], [captions(scene)[0] for scene in scenes]
    rows = from_folder(folder, limit=PAIRS).dataset
    first = {label: number for number, label in reversed(list(enumerate(rows["label"])))}
    chosen = rows.select(sorted(first.values()))
    return list(chosen["image"]), list(chosen["text"])


def draw_panel(
    draw: ImageDraw.ImageDraw, left: int, title: str, images: Tensor, texts: Tensor, gap: ModalityGap
) -> None:
    """One model: a point for each embedding, the two means, and the line between them."""
    size, top = PANEL * SHARP, HEAD * SHARP
    half = float(max(images.abs().max(), texts.abs().max())) * 1.08

    def position(point: Tensor) -> tuple[float, float]:
        x, y = (point / half).tolist()
        return left + size / 2 * (1 + x), top + size / 2 * (1 - y)

    draw.rectangle((left, top, left + size, top + size), outline=(200, 200, 200), width=SHARP)
    for points, colour in ((images, IMAGE), (texts, TEXT)):
        for x, y in map(position, points):
            draw.ellipse((x - 3 * SHARP, y - 3 * SHARP, x + 3 * SHARP, y + 3 * SHARP), fill=(*colour, 110))
    ends = [position(points.mean(dim=0)) for points in (images, texts)]
    draw.line([*ends[0], *ends[1]], fill=INK, width=2 * SHARP)
    for (x, y), colour in zip(ends, (IMAGE, TEXT), strict=True):
        draw.ellipse(
            (x - 8 * SHARP, y - 8 * SHARP, x + 8 * SHARP, y + 8 * SHARP), fill=colour, outline="white", width=6
        )
    large, small = (ImageFont.load_default(size * SHARP) for size in (20, 14))
    draw.text((left, 12 * SHARP), title, fill=INK, font=large)
    numbers = f"centroid distance {gap.centroid_distance:.2f}, alignment {gap.alignment:.2f}"
    draw.text((left, 42 * SHARP), numbers, fill=INK, font=small)
    numbers = f"uniformity of images {gap.image_uniformity:.2f}, of texts {gap.text_uniformity:.2f}"
    draw.text((left, 64 * SHARP), numbers, fill=INK, font=small)


def draw_legend(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    font = ImageFont.load_default(14 * SHARP)
    for number, (name, colour) in enumerate((("images", IMAGE), ("texts", TEXT))):
        x, y = left + number * 90 * SHARP, top
        draw.ellipse((x, y, x + 12 * SHARP, y + 12 * SHARP), fill=colour)
        draw.text((x + 20 * SHARP, y - 3 * SHARP), name, fill=INK, font=font)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with captions.jsonl; by default rendered scenes")
    parser.add_argument(
        "--before", default="mllm-tiny", help="an SLQ model, or a backbone for new queries (default: %(default)s)"
    )
    parser.add_argument("--after", default="slq-tiny", help="an SLQ model (default: %(default)s)")
    parser.add_argument(
        "--png", type=Path, default=Path("modality_gap.png"), help="picture to write (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    pictures, texts = load_pairs(args.data)
    models = {f"before ({Path(args.before).name})": args.before, f"after ({Path(args.after).name})": args.after}
    width = (PANEL + MARGIN) * len(models) + MARGIN
    sheet = Image.new("RGB", (width * SHARP, (HEAD + PANEL + 2 * MARGIN) * SHARP), "white")
    draw = ImageDraw.Draw(sheet, "RGBA")  # colours with an opacity
    for number, (title, name) in enumerate(models.items()):
        model = load_model(name)
        image_rows = model.encode_document(pictures, convert_to_tensor=True, show_progress_bar=True)
        text_rows = model.encode_query([{"text": text} for text in texts], convert_to_tensor=True)
        gap = measure_modality_gap(image_rows, text_rows)
        image_points, text_points, share = project_to_plane(image_rows, text_rows)
        left = (MARGIN + number * (PANEL + MARGIN)) * SHARP
        draw_panel(draw, left, title, image_points, text_points, gap)
        values = "  ".join(f"{name} {value:.3f}" for name, value in vars(gap).items())
        print(f"{title}: {values}; {share:.0%} of the variance lies in the plane")
    draw_legend(draw, MARGIN * SHARP, (HEAD + PANEL + MARGIN) * SHARP)
    args.png.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width // SHARP, sheet.height // SHARP), Image.Resampling.LANCZOS).save(args.png)
    print(f"{len(pictures)} pairs; picture: {args.png.resolve()}")


if __name__ == "__main__":
    main()

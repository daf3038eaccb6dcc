"""Rendered chats and media become features: a batch at once, or row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PaliGemmaProcessor

from slq_embed.backbone.families import tokenizer_of
from slq_embed.inputs.videos import Sampled
from slq_embed.prefix.features import Features, MediaFeatures, pad_left, per_token

_NOT_READ = ("labels", "num_crops", "rows", "cols")
"""What some processors add for losses and for their own use."""
_OF_SAMPLING = {"fps", "num_frames", "min_frames", "max_frames", "do_sample_frames", "video_metadata"}
"""Options of a video processor that have done their work once frames are chosen."""


@dataclass(frozen=True)
class Media:
    """What one row has beside its text.

    Args:
        images: Decoded images.
        videos: Chosen frames of its videos.
    """

    images: Sequence[Any] = ()
    videos: Sequence[Sampled] = ()


@dataclass(frozen=True)
class Options:
    """How a processor's parts are called.

    Args:
        image: The image processor.
        video: The video processor.
    """

    image: Mapping[str, Any] = field(default_factory=dict)
    video: Mapping[str, Any] = field(default_factory=dict)


def process_together(
    processor: Any, texts: Sequence[str], media: Sequence[Media], options: Options, queries: int, image_token: int
) -> Features:
    """Call a processor on a whole batch of rows without videos.

    Args:
        processor: A processor whose tokenizer pads left, or a tokenizer.
        texts: The chats as the chat template renders them, with the query tokens at their ends.
        media: The images of each row.
        options: How the image processor is called.
        queries: How many query tokens each text ends with; they are cut off.
        image_token: Id of the token that stands for a piece of an image: a row has its share of the pixels by them.

    Returns:
        Features; see :mod:`slq_embed.prefix.features`.
    """
    called = _call(processor, texts, media, options)
    features: Features = {key: value[:, :-queries] for key, value in per_token(called).items()}
    values = {name: value for name, value in called.items() if name not in features}
    images = [len(row.images) for row in media]
    tokens = (features["input_ids"] == image_token).sum(dim=1)
    pieces = {
        name: images if name.startswith("image_") else (tokens * len(value) // tokens.sum()).tolist()
        for name, value in values.items()
    }
    return _with_media(features, values, pieces)


def process_one_by_one(
    processor: Any,
    texts: Sequence[str],
    media: Sequence[Media],
    options: Options,
    query_ids: Sequence[int],
    pixels_axis: int = 0,
) -> Features:
    """Call a processor on each row that has media, and once on all others.

    Processors lay images and videos out in many ways: by image, by tile, by patch, padded to the largest. A row that is alone
    shows which pixels are its own, so batches can be cut and joined without knowing the way.

    Args:
        processor: As for :func:`process_together`, and so are the next three.
        texts: As there.
        media: The images and videos of each row.
        options: How the image and the video processor are called.
        query_ids: Ids of the query tokens. What follows the first one is cut off.
        pixels_axis: See :class:`slq_embed.backbone.families.Family`; in the result the axis is the first.

    Returns:
        Features; see :mod:`slq_embed.prefix.features`.
    """
    groups = [[row] for row, own in enumerate(media) if own.images or own.videos]
    if without := [row for row in range(len(media)) if [row] not in groups]:
        groups.append(without)
    parts: list[tuple[list[int], Features]] = []
    for group in groups:
        called = _call(processor, [texts[row] for row in group], [media[row] for row in group], options)
        is_query = torch.isin(called["input_ids"], torch.tensor(query_ids))
        start = int(is_query.any(dim=0).int().argmax())  # the same in all rows: they end alike and pad left
        if "pixel_values" in called:
            if pixels_axis == 1:  # what comes before are the images of the row
                called["pixel_values"] = called["pixel_values"].flatten(0, 1)[None]
            called["pixel_values"] = called["pixel_values"].movedim(pixels_axis, 0)
        parts.append((group, {**called, **{key: value[:, :start] for key, value in per_token(called).items()}}))
    return _join(parts, len(media), int(tokenizer_of(processor).pad_token_id or 0))


def tokens_of(processor: Any, text: str) -> list[int]:
    """Ids of the tokens that a processor makes of a chat without media, as the chat template renders it."""
    ids: list[int] = _call(processor, [text], [Media()], Options())["input_ids"][0].tolist()
    return ids


def _call(processor: Any, texts: Sequence[str], media: Sequence[Media], options: Options) -> Features:
    tokenizer = tokenizer_of(processor)
    given: dict[str, Any] = {}
    if any(row.images for row in media):
        given["images"] = [list(row.images) for row in media]
    if any(row.videos for row in media):
        given["videos"] = [[frames for frames, _ in row.videos] for row in media]
        given["videos_kwargs"] = {key: value for key, value in options.video.items() if key not in _OF_SAMPLING}
        given["videos_kwargs"]["video_metadata"] = [metadata for row in media for _, metadata in row.videos]
        given["videos_kwargs"] |= {"do_sample_frames": False, "return_metadata": True}  # some write the frames' times
    if tokenizer is processor or (not given and isinstance(processor, PaliGemmaProcessor)):
        called = tokenizer(list(texts), padding=True, return_tensors="pt", add_special_tokens=False)
        features = {key: called[key] for key in ("input_ids", "attention_mask")}
        if tokenizer is not processor:  # this one processor refuses texts alone, and its model needs types
            features["token_type_ids"] = torch.zeros_like(called["input_ids"])
        return features
    # As apply_chat_template calls the processor, but the text is rendered already.
    text_kwargs: dict[str, Any] = {"padding": True}
    if (bos := tokenizer.bos_token) is not None and texts[0].startswith(bos):
        text_kwargs["add_special_tokens"] = False
    called = processor(
        text=list(texts),
        text_kwargs=text_kwargs,
        images_kwargs=dict(options.image),
        common_kwargs={"return_tensors": "pt"},
        **given,
    )
    return {key: value for key, value in called.items() if isinstance(value, Tensor) and key not in _NOT_READ}


def _join(parts: Sequence[tuple[list[int], Features]], count: int, pad_token: int) -> Features:
    first = parts[0][1]
    if len(parts) == 1 and not _names_of_media(first):
        return first
    joined: Features = {}
    for key in dict.fromkeys(key for _, part in parts for key in per_token(part)):
        rows: list[Tensor] = [torch.empty(0)] * count
        for group, part in parts:
            for index, row in enumerate(group):
                kept = part["attention_mask"][index].bool()
                value = part.get(key, torch.zeros_like(part["input_ids"]))  # types, which some give for images only
                rows[row] = value[index][kept]
        joined[key] = pad_left(rows, pad_token if key == "input_ids" else 0)
    values: dict[str, Tensor] = {}
    pieces: dict[str, list[int]] = {}
    for name in sorted({name for _, part in parts for name in _names_of_media(part)}):
        having = {group[0]: part[name] for group, part in parts if name in part}  # in a group of one, if it has media
        if name == "pixel_values_videos" and len({value.shape[1:] for value in having.values()}) > 1:
            raise ValueError(
                "The videos of a batch differ in how many frames are read of them, and this model takes equally many only. "
                "Pass max_frames, or batch_size=1."
            )
        values[name] = _concatenate(list(having.values()))
        pieces[name] = [len(having[row]) if row in having else 0 for row in range(count)]
    return _with_media(joined, values, pieces)


def _names_of_media(features: Features) -> set[str]:
    """Names of the features that are laid out by images or their pieces, not by rows."""
    return features.keys() - per_token(features).keys()


def _with_media(features: Features, values: dict[str, Tensor], pieces: Mapping[str, Sequence[int]]) -> Features:
    if not values:
        return features
    return {**features, "media": MediaFeatures(values, pieces), "media_row": torch.arange(len(features["input_ids"]))}


def _concatenate(values: Sequence[Tensor]) -> Tensor:
    """Join along the first axis; the others are padded with zeros to the largest, as processors pad images."""
    sizes = [max(value.shape[axis] for value in values) for axis in range(1, values[0].ndim)]
    padded = []
    for value in values:
        widths = [(0, size - have) for size, have in zip(sizes, value.shape[1:], strict=True)]
        padded.append(pad(value, [width for pair in reversed(widths) for width in pair]))
    return torch.cat(padded)

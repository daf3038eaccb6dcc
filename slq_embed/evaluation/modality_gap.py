"""The modality gap: how far images and texts lie apart, as numbers and as points of a plane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

_BLOCK = 2048


@dataclass(frozen=True)
class ModalityGap:
    """How images and texts that belong together lie on the unit sphere.

    Args:
        centroid_distance: Distance between the mean image and the mean text: 0 to 2.
        alignment: Mean squared distance between an image and its text: 0 to 4, smaller is closer.
        image_uniformity: Logarithm of the mean of ``exp(-2 * squared distance)`` over all pairs of images: 0 if they are
            all equal, down to -4 or so if they are spread evenly.
        text_uniformity: The same for texts.

    Source:
        Centroid distance: Liang et al., "Mind the gap", arXiv:2203.02053. Alignment and uniformity: Wang and Isola,
        arXiv:2005.10242, with their exponents 2 and 2.
    """

    centroid_distance: float
    alignment: float
    image_uniformity: float
    text_uniformity: float


def measure_modality_gap(images: NDArray[Any] | Tensor, texts: NDArray[Any] | Tensor) -> ModalityGap:
    """Measure the gap.

    Args:
        images: ``(pairs, H)`` embeddings, an array or a tensor; they are normalised first.
        texts: ``(pairs, H)``: the text of each image.

    Raises:
        ValueError: If there are fewer than two pairs, or the shapes differ.

    Example:
        >>> gap = measure_modality_gap(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> gap.centroid_distance, round(gap.alignment, 6), round(gap.image_uniformity, 6)
        (0.0, 2.0, -4.0)
    """
    images, texts = _pairs(images, texts)
    return ModalityGap(
        float((images.mean(dim=0) - texts.mean(dim=0)).norm()),
        float((images - texts).square().sum(dim=1).mean()),
        _uniformity(images),
        _uniformity(texts),
    )


def project_to_plane(images: NDArray[Any] | Tensor, texts: NDArray[Any] | Tensor) -> tuple[Tensor, Tensor, float]:
    """Project images and texts onto the plane of their two principal components.

    Args:
        images: ``(pairs, H)`` embeddings, an array or a tensor; they are normalised first.
        texts: ``(pairs, H)``.

    Returns:
        Images ``(pairs, 2)`` and texts ``(pairs, 2)``, and the share of the variance that lies in the plane. The mean
        image is not to the right of the mean text and not above it.

    Raises:
        ValueError: If there are fewer than two pairs, or the shapes differ.
    """
    images, texts = _pairs(images, texts)
    rows = torch.cat([images, texts])
    rows = rows - rows.mean(dim=0)
    variances, axes = torch.linalg.eigh(rows.T @ rows)  # in ascending order
    points = rows @ axes[:, -2:].flip(1)
    share = float(variances[-2:].sum() / variances.sum()) if float(variances.sum()) > 0 else 1.0
    # The sign of a principal component is arbitrary: fixed, so that pictures can be compared.
    away = points[: len(images)].mean(dim=0) > points[len(images) :].mean(dim=0)
    points = torch.where(away, -points, points)
    return points[: len(images)], points[len(images) :], share


def _pairs(images: NDArray[Any] | Tensor, texts: NDArray[Any] | Tensor) -> tuple[Tensor, Tensor]:
    images, texts = torch.as_tensor(images), torch.as_tensor(texts)
    if images.shape != texts.shape or images.ndim != 2 or len(images) < 2:
        raise ValueError(
            f"images has the shape {tuple(images.shape)} and texts {tuple(texts.shape)}, but both must be (pairs, H), "
            "with two pairs or more."
        )
    return normalize(images.detach().cpu().double(), dim=1), normalize(texts.detach().cpu().double(), dim=1)


def _uniformity(rows: Tensor) -> float:
    total = 0.0
    for start in range(0, len(rows), _BLOCK):
        cosines = rows[start : start + _BLOCK] @ rows.T
        total += float((4 * cosines - 4).exp().sum())  # the squared distance is 2 - 2 * cosine
    return float(torch.tensor((total - len(rows)) / (len(rows) * (len(rows) - 1)), dtype=torch.float64).log())

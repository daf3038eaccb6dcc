from __future__ import annotations

import math

import pytest
import torch

from slq_embed.evaluation import measure_modality_gap, project_to_plane


def test_the_gap_by_hand():
    """Images at 0 and 90 degrees, texts at 180 and 90; lengths do not count."""
    images = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    texts = torch.tensor([[-2.0, 0.0], [0.0, 1.0]])
    gap = measure_modality_gap(images, texts)
    assert gap.centroid_distance == pytest.approx(1)  # (.5, .5) and (-.5, .5)
    assert gap.alignment == pytest.approx((4 + 0) / 2)
    assert gap.image_uniformity == gap.text_uniformity == pytest.approx(-2 * 2)
    assert measure_modality_gap(images.numpy(), texts.numpy()) == gap


@pytest.mark.parametrize("block", [3, 100])
def test_uniformity_equals_the_plain_formula(monkeypatch, block):
    monkeypatch.setattr("slq_embed.evaluation.modality_gap._BLOCK", block)
    rows = torch.nn.functional.normalize(torch.randn(20, 5, dtype=torch.float64), dim=1)
    gap = measure_modality_gap(rows, rows)
    assert gap.image_uniformity == pytest.approx(math.log((-2 * torch.pdist(rows) ** 2).exp().mean()))
    assert gap.centroid_distance == gap.alignment == 0
    assert measure_modality_gap(rows[:1].expand(3, 5), rows[:3]).image_uniformity == pytest.approx(0)


def test_the_plane_keeps_distances_of_points_that_lie_in_one():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 3, generator=generator, dtype=torch.float64))[0].T
    angles = torch.rand(40, generator=generator, dtype=torch.float64) * 2
    circle = torch.stack([angles.cos(), angles.sin()], dim=1) @ basis[:2]
    images, texts, share = project_to_plane(circle[:20], circle[20:])
    points = torch.cat([images, texts])
    assert share == pytest.approx(1)
    assert torch.allclose(torch.cdist(points, points), torch.cdist(circle, circle), atol=1e-6)
    assert points.mean(dim=0).abs().max() < 1e-9
    assert (images.mean(dim=0) <= texts.mean(dim=0)).all()
    swapped = project_to_plane(circle[20:], circle[:20])
    assert (swapped[0].mean(dim=0) <= swapped[1].mean(dim=0)).all()
    assert points[:, 0].var() > points[:, 1].var()
    third = torch.cat([images @ basis[:2], texts @ basis[:2] + 2 * basis[2]])
    assert project_to_plane(third[:20], third[20:])[2] < 0.99


@pytest.mark.parametrize(("images", "texts"), [((3, 4), (2, 4)), ((1, 4), (1, 4)), ((4,), (4,))])
def test_shapes_that_do_not_fit_are_refused(images, texts):
    for function in (measure_modality_gap, project_to_plane):
        with pytest.raises(ValueError, match=r"both must be \(pairs, H\), with two pairs or more"):
            function(torch.ones(images), torch.ones(texts))

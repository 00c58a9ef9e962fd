"""The draws: functions of (seed, epoch, position) alone, and distributed as torchvision draws them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from vimfast.augment import crops, draws

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def test_a_row_depends_on_its_position_alone() -> None:
    together = draws.uniforms(3, 5, np.arange(100))
    np.testing.assert_array_equal(draws.uniforms(3, 5, np.arange(37, 100, 8)), together[37::8])
    np.testing.assert_array_equal(draws.uniforms(3, 5, np.array([90, 2, 41])), together[[90, 2, 41]])
    far = draws.uniforms(3, 5, np.array([10**12]))
    np.testing.assert_array_equal(draws.uniforms(3, 5, np.array([7, 10**12]))[1:], far)


def test_rows_are_philox_of_seed_and_epoch() -> None:
    """Pins the numbers: another stream would change the images of every run that is resumed."""
    rows = draws.uniforms(3, 5, np.arange(4))
    stream = np.random.Generator(np.random.Philox(key=np.array([3, 5], np.uint64)))
    np.testing.assert_array_equal(rows.ravel(), stream.random(4 * draws.COLUMNS))


def test_seeds_epochs_and_positions_have_rows_of_their_own() -> None:
    rows = np.concatenate([draws.uniforms(seed, epoch, np.arange(50)) for seed, epoch in [(0, 0), (0, 1), (1, 0)]])
    assert len(np.unique(rows)) == rows.size
    assert rows.min() >= 0
    assert rows.max() < 1
    correlation = np.corrcoef(draws.uniforms(0, 0, np.arange(4000)), rowvar=False)
    assert np.abs(correlation - np.eye(draws.COLUMNS)).max() < 5 / np.sqrt(4000)


def test_columns_do_not_overlap() -> None:
    taken = np.zeros(draws.COLUMNS, int)
    for column in (draws.CROP_AREA, draws.CROP_ASPECT, draws.CROP_TOP, draws.CROP_LEFT, draws.FLIP):
        taken[column] += 1
    assert taken.max() == 1


def draw(sizes: np.ndarray, scale: tuple[float, float] = SCALE, ratio: tuple[float, float] = RATIO) -> np.ndarray:
    return crops.random_resized_crop(draws.uniforms(0, 0, np.arange(len(sizes))), sizes, scale, ratio)


def test_boxes_lie_inside() -> None:
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(1, 700, (4000, 2)), rng.integers(1, 4, (1000, 2)), [[1, 5000], [5000, 1]]])
    boxes = draw(sizes)
    assert boxes.dtype == np.int32
    assert boxes[:, :2].min() == 0
    assert boxes[:, 2:].min() == 1
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()
    small = boxes[4000:5000]
    at_the_far_edge = (small[:, :2] > 0) & (small[:, :2] + small[:, 2:] == sizes[4000:5000])
    assert at_the_far_edge.any(axis=0).all()


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance between two samples' cumulative distributions, in units of its 5 % critical value."""
    at = np.sort(np.concatenate([a, b]))
    distance = np.abs(
        np.searchsorted(np.sort(a), at, "right") / len(a) - np.searchsorted(np.sort(b), at, "right") / len(b)
    ).max()
    return distance / (1.358 * np.sqrt((len(a) + len(b)) / (len(a) * len(b))))


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (90, 400)])
def test_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    """Top, left, height, width, area and aspect, by the two-sample Kolmogorov-Smirnov test at a level of about 1e-5.

    90 x 400 is so flat that many draws fall through to the centred box.
    """
    count = 6000
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(count)])
    ours = draw(np.tile(size, (count, 1)))
    for name, measure in {
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
        "height": lambda box: box[:, 2],
        "width": lambda box: box[:, 3],
        "area": lambda box: box[:, 2] * box[:, 3],
        "aspect": lambda box: box[:, 3] / box[:, 2],
    }.items():
        assert kolmogorov_smirnov(measure(ours), measure(theirs)) < 1.8, name
    # The test is sharp enough: a slightly narrower range of areas does not pass.
    narrower = draw(np.tile(size, (count, 1)), scale=(0.15, 1.0))
    assert kolmogorov_smirnov(narrower[:, 2] * narrower[:, 3], theirs[:, 2] * theirs[:, 3]) > 1.8


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (64, 64), (7, 9)])
def test_centred_box_is_torchvisions(size: tuple[int, int]) -> None:
    """No try fits a scale of 2 or more, so both fall back."""
    theirs = transforms.RandomResizedCrop.get_params(torch.empty(3, *size), [2.0, 3.0], list(RATIO))
    assert tuple(draw(np.array([size]), scale=(2.0, 3.0))[0]) == theirs


def test_flips_come_with_their_probability() -> None:
    u = draws.uniforms(0, 0, np.arange(10_000))
    assert abs(draws.flips(u).mean() - 0.5) < 0.02
    assert abs(draws.flips(u, 0.1).mean() - 0.1) < 0.012
    assert draws.flips(u, 0.0).sum() == 0
    assert draws.flips(u, 1.0).all()


@pytest.mark.parametrize(("size", "crop_ratio"), [(224, 0.875), (64, 0.9), (33, 1.0), (160, 0.95)])
def test_evaluation_geometry_is_torchvisions(size: int, crop_ratio: float) -> None:
    sizes = np.random.default_rng(1).integers(1, 600, (60, 2))
    resized, corner = crops.resize_and_centre_crop(sizes, size, crop_ratio)
    resize = transforms.Resize(int(size / crop_ratio))
    for (height, width), ours, (top, left) in zip(sizes, resized.tolist(), corner.tolist(), strict=True):
        shape = resize(torch.empty(1, height, width)).shape[1:]
        assert tuple(shape) == tuple(ours)
        if max(shape) > 2000:
            continue
        # An image whose pixels say where they are shows what CenterCrop cuts out.
        rows = Image.fromarray(np.repeat(np.arange(shape[0], dtype=np.int32)[:, None], shape[1], axis=1))
        columns = Image.fromarray(np.repeat(np.arange(shape[1], dtype=np.int32)[None], shape[0], axis=0))
        cut = transforms.CenterCrop(size)
        assert (np.asarray(cut(rows))[0, 0], np.asarray(cut(columns))[0, 0]) == (top, left)


@pytest.mark.parametrize("size", [(192, 256), (224, 64), (33, 35)])
def test_evaluation_geometry_of_other_shapes_is_timms(size: tuple[int, int]) -> None:
    sizes = np.random.default_rng(1).integers(20, 600, (40, 2))
    resized, corner = crops.resize_and_centre_crop(sizes, size, 0.875)
    scale, cut, *_ = create_transform(size, crop_pct=0.875).transforms
    for (height, width), ours, (top, left) in zip(sizes, resized.tolist(), corner.tolist(), strict=True):
        rows = Image.fromarray(np.repeat(np.arange(ours[0], dtype=np.int32)[:, None], ours[1], axis=1))
        columns = Image.fromarray(np.repeat(np.arange(ours[1], dtype=np.int32)[None], ours[0], axis=0))
        assert scale(Image.new("L", (width, height))).size == (ours[1], ours[0])
        assert (np.asarray(cut(rows))[0, 0], np.asarray(cut(columns))[0, 0]) == (top, left)

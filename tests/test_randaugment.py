"""RandAugment, ThreeAugment, colour jitter and erasing: the draws and the pixels, against timm and torchvision."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from test_augment import kolmogorov_smirnov
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torchvision import transforms
from torchvision.transforms import functional as tvf

from vimfast.augment import randaugment
from vimfast.augment.colours import IMAGENET_MEAN, IMAGENET_STD
from vimfast.augment.crops import PaddedCrop, RandomResizedCrop, ShortSideCrop
from vimfast.augment.draws import uniforms
from vimfast.augment.erasing import Erasing
from vimfast.augment.pixels import carry_out
from vimfast.augment.pixels_pillow import change
from vimfast.augment.plan import OPERATION, PATCH, Op, Plan
from vimfast.augment.recipe import Recipe, described, training_crop
from vimfast.config import AugmentConfig, load_config
from vimfast.errors import UserError
from vimfast.image_size import ImageSize
from vimfast.train.plan import _augmentation

SIZE = ImageSize(48, 64)
FILL = (124, 116, 104)
DEFAULT = "rand-m9-mstd0.5-inc1"
STRINGS = (
    *(DEFAULT, "rand", "rand-m7-n3-p0.8", "rand-m15-mmax20-mstd101-inc1", "rand-m5-inc0-mstd1"),
    *("rand-m9-tweights", "rand-t3a-m8-n1", "rand-m6-t3aw-n4-mstd0.3", "rand-mmax0-m12"),
)


def timms(text: str) -> auto_augment.RandAugment:
    resample = Image.Resampling.BICUBIC
    return auto_augment.rand_augment_transform(text, {"img_mean": FILL, "interpolation": resample})


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """uint8 [*SIZE, 3]: detail at several scales, not using all levels, no channel like another."""
    rng = np.random.default_rng(0)
    detail = np.zeros((*SIZE, 3))
    for cells in (2, 8, 40):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        detail += np.asarray(noise.resize((SIZE.width, SIZE.height), Image.Resampling.BICUBIC), float)
    return (detail / 3 * (0.7, 0.9, 0.6) + (20, 5, 60)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("text", STRINGS)
def test_strings_are_read_as_timm_reads_them(text: str) -> None:
    ours, theirs = randaugment.parse(text), timms(text)
    assert [op.name for op in theirs.ops] == list(ours.names)
    assert ours.layers == theirs.num_layers
    weights = None if ours.weights is None else np.array(ours.weights) / sum(ours.weights)
    np.testing.assert_array_equal(weights, theirs.choice_weights)
    for op in theirs.ops:
        assert (op.prob, op.magnitude, op.magnitude_std) == (ours.probability, ours.magnitude, ours.deviation)
        assert (op.magnitude_max or 10) == ours.ceiling


def test_weights_of_an_older_timm() -> None:
    policy = randaugment.parse("rand-m9-w0")
    assert policy.weights is not None
    shares = dict(zip(policy.names, np.array(policy.weights) / sum(policy.weights), strict=True))
    assert shares["Rotate"] == pytest.approx(0.3)
    assert shares["Color"] == pytest.approx(0.025)
    assert not {"Posterize", "Invert"} & shares.keys()
    assert "ColorIncreasing" in randaugment.parse("rand-w0-inc1").names


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("original", "'original' and of timm's policies only RandAugment is built in; write rand-m9-mstd0.5-inc1"),
        ("v0-mstd0.5", "only RandAugment"),
        ("augmix-m5-w4-d2", "only RandAugment"),
        ("rand-m9-mst0.5", "unknown option 'mst0.5'; the known ones are m, n, p, mstd, mmax, inc, t, w"),
        ("rand-m9-inc", "cannot read 'inc'; inc is 1 for"),
        ("rand-m9.5", "cannot read 'm9.5'; m is the magnitude, an integer"),
        ("rand-p1.5", "cannot read 'p1.5'; p is the probability"),
        ("rand-n0", "cannot read 'n0'"),
        ("rand-w1", "cannot read 'w1'; w is 0"),
        ("rand-t4a", "cannot read 't4a'; t is the set of operations, one of 3a, 3aw, weights"),
        ("rand-tweights-n16", "16 of 15 operations, none twice; lower n"),
    ],
)
def test_other_strings_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Recipe(AugmentConfig(aa=text))


def drawn(name: str, magnitude: float, negative: bool, interpolation: str = "bicubic") -> np.ndarray:
    """OPERATION [slots]: what RandAugment does at this magnitude and sign."""
    policy = randaugment.RandAugment(
        (name,), None, magnitude, 1, probability=1.0, ceiling=1000, interpolation=interpolation
    )
    u = np.zeros((1, policy.columns))
    u[0, randaugment.SIGN] = 0.9 if negative else 0.1
    return policy.draw(u, SIZE)[0]


@pytest.mark.parametrize("name", sorted(auto_augment.LEVEL_TO_ARG.keys() & randaugment._BUILDERS.keys()))
def test_each_operation_gives_timms_pixels(name: str, image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    for negative in (False, True):
        monkeypatch.setattr(random, "random", lambda negative=negative: 0.9 if negative else 0.1)
        for magnitude in (0, 0.4, 3, 8.61, 9, 10):
            op = auto_augment.AugmentOp(name, 1.0, magnitude, {"img_mean": FILL, "interpolation": Image.BICUBIC})
            try:
                expected = np.asarray(op(Image.fromarray(image)))
            except ValueError:  # Pillow 13 does not posterize to 0 bits
                assert name.startswith("Posterize")
                expected = np.zeros_like(image)
            np.testing.assert_array_equal(change(image, drawn(name, magnitude, negative), FILL), expected)


def test_all_fifteen_operations_of_timm_are_there() -> None:
    for text in ("rand", "rand-inc1"):
        names = randaugment.parse(text).names
        assert len(names) == 15
        assert len({drawn(name, 9, False).tobytes() for name in names}) == 15


def test_filters_of_warps(image: np.ndarray) -> None:
    bicubic, bilinear = (change(image, drawn("Rotate", 9, False, name), FILL) for name in ("bicubic", "bilinear"))
    rotated = Image.fromarray(image).rotate(27, Image.Resampling.BILINEAR, fillcolor=FILL)
    np.testing.assert_array_equal(bilinear, np.asarray(rotated))
    assert not np.array_equal(bicubic, bilinear)
    policy = randaugment.parse(DEFAULT, "random")
    operations = policy.draw(np.random.default_rng(0).random((4000, policy.columns)), SIZE)
    assert abs(operations["cubic"].mean() - 0.5) < 0.03


Draws = list[list[tuple[str, float]]]  # of each image, the operations applied, each with its argument
COUNT = 20_000


def timms_draws(text: str) -> Draws:
    """Of timm's own objects; only the pixels are left alone."""
    transform = timms(text)
    now: list[tuple[str, float]] = []

    def recorder(name: str) -> Callable[..., None]:
        return lambda image, *arguments, **_: now.append((name, float(arguments[0]) if arguments else 0.0))

    for op in transform.ops:
        op.aug_fn = recorder(op.name)
    random.seed(1)
    np.random.seed(1)
    draws = []
    for _ in range(COUNT):
        transform(None)
        draws.append(now.copy())
        now.clear()
    return draws


NAMES = {
    Op.AUTOCONTRAST: "AutoContrast", Op.EQUALIZE: "Equalize", Op.INVERT: "Invert", Op.SOLARIZE_ADD: "SolarizeAdd",
    Op.POSTERIZE: "PosterizeIncreasing", Op.SOLARIZE: "SolarizeIncreasing", Op.COLOR: "ColorIncreasing",
    Op.CONTRAST: "ContrastIncreasing", Op.BRIGHTNESS: "BrightnessIncreasing", Op.SHARPNESS: "SharpnessIncreasing",
}  # fmt: skip


def named(operation: np.void) -> tuple[str, float]:
    """An operation as timm names it, and timm's argument."""
    code, _, (a, b, c, d, _, f) = operation.tolist()
    if code != Op.AFFINE:
        return NAMES[code], a
    if a != 1:
        return "Rotate", round(float(np.degrees(np.arctan2(-b, a))), 9)
    moves = {"ShearX": b, "ShearY": d, "TranslateXRel": c / SIZE.width, "TranslateYRel": f / SIZE.height}
    return next((name, value) for name, value in moves.items() if value)


def our_draws(policy: randaugment.RandAugment) -> Draws:
    """From what the kernels get."""
    operations = policy.draw(uniforms(0, 0, np.arange(COUNT), policy.columns, stream=1), SIZE)
    return [[named(operation) for operation in row[row["code"] != Op.NONE]] for row in operations]


def dalis_draws() -> Draws:
    """DALI's rand_augment(n=2, m=27 of 31): what its own suite of operations would be given."""
    suite = pytest.importorskip("nvidia.dali.auto_aug.rand_augment").get_rand_augment_suite()
    rng = np.random.default_rng(0)

    def argument(operation: Any) -> float:
        if operation.mag_range is None:
            return 0.0
        low, high = operation.mag_range
        return (low + (high - low) * 27 / 30) * (rng.choice((-1, 1)) if operation.randomly_negate else 1)

    renamed = {name.removesuffix("Increasing").removesuffix("Rel").lower(): name for name in INCREASING}
    names = {operation.name: renamed.get(operation.name.replace("_", ""), operation.name) for operation in suite}
    return [[(names[op.name], argument(op)) for op in rng.choice(suite, 2)] for _ in range(COUNT)]


INCREASING = randaugment.parse(DEFAULT).names


def excess(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far apart two rows of counts are: chi-square of a two-row table, in deviations above what it is by chance."""
    table = np.array([ours, theirs], float)
    table = table[:, table.sum(axis=0) > 0]
    expected = table.sum(axis=0) * table.sum(axis=1, keepdims=True) / table.sum()
    freedom = max(1, table.shape[1] - 1)
    return (((table - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def differences(ours: Draws, theirs: Draws) -> dict[str, float]:
    """Each measure scaled so that above 1 two samples are from different distributions: chance alone gives that to
    one in about 1e5.
    """

    def counts(draws: Draws, measure: Callable[[list[tuple[str, float]]], list[Any]]) -> dict[Any, int]:
        return collections.Counter(value for row in draws for value in measure(row))

    found = {}
    for title, measure in {
        "operations per image": lambda row: [len(row)],
        "operations": lambda row: [name for name, _ in row],
        "pairs": lambda row: [tuple(name for name, _ in row)] if len(row) == 2 else [],
        "signs": lambda row: [(name, value < 0) for name, value in row if name.startswith(("R", "She", "T"))],
    }.items():
        a, b = counts(ours, measure), counts(theirs, measure)
        keys = sorted(a.keys() | b.keys(), key=str)
        found[title] = excess(np.array([a[k] for k in keys]), np.array([b[k] for k in keys])) / 7
    values: list[dict[str, list[float]]] = []
    for draws in (ours, theirs):
        values.append(collections.defaultdict(list))
        for name, value in itertools.chain.from_iterable(draws):
            values[-1][name].append(value)
    for name in values[0].keys() & values[1].keys():
        found[f"argument of {name}"] = kolmogorov_smirnov(*(np.array(v[name]) for v in values)) / 1.8
    return found


@pytest.mark.parametrize("text", [DEFAULT, "rand-m7-mstd101-n3-p0.8-inc1", "rand-m9-mstd1-mmax9-tweights"])
def test_draws_are_distributed_as_timms(text: str) -> None:
    """20,000 of each: how many operations, which, which together, their signs, and their arguments."""
    policy = randaugment.parse(text)
    theirs = timms_draws(text)
    found = differences(our_draws(policy), theirs)
    assert len(found) > 4 + 12
    assert {name: value for name, value in found.items() if value > 1} == {}
    for wrong in (
        dataclasses.replace(policy, probability=policy.probability + 0.03),
        dataclasses.replace(policy, deviation=0.0),
        dataclasses.replace(policy, magnitude=policy.magnitude - 0.3),
        dataclasses.replace(policy, names=policy.names[:-1], weights=policy.weights and policy.weights[:-1]),
    ):
        assert max(differences(our_draws(wrong), theirs).values()) > 1, wrong


def test_the_statistics_distinguish_dalis_own_randaugment() -> None:
    found = differences(dalis_draws(), timms_draws(DEFAULT))
    assert found["operations per image"] > 100
    assert found["operations"] > 100
    assert found["argument of BrightnessIncreasing"] > 5


def test_posterizing_to_no_bits_leaves_black(image: np.ndarray) -> None:
    assert change(image, drawn("PosterizeIncreasing", 10, False), FILL).max() == 0


@pytest.mark.parametrize("deviation", [0.1, 0.3, 1.0, 1.37, 2.0])
def test_blur_is_pillows(deviation: float, image: np.ndarray) -> None:
    u = np.array([[0.99, (deviation - 0.1) / 1.9]])
    expected = Image.fromarray(image).filter(ImageFilter.GaussianBlur(deviation))
    np.testing.assert_array_equal(change(image, randaugment.three_augment(u)[0], FILL), np.asarray(expected))


def test_three_augment_is_each_in_a_third(image: np.ndarray) -> None:
    u = np.random.default_rng(0).random((6000, 2))
    operations = randaugment.three_augment(u)
    first = operations["code"][:, 0]
    for code in (Op.COLOR, Op.SOLARIZE, Op.BOX_X):
        assert abs((first == code).mean() - 1 / 3) < 0.025
    grey, solarized = (change(image, operations[first == code][0], FILL) for code in (Op.COLOR, Op.SOLARIZE))
    np.testing.assert_array_equal(grey, np.asarray(transforms.Grayscale(3)(Image.fromarray(image))))
    np.testing.assert_array_equal(solarized, np.asarray(ImageOps.solarize(Image.fromarray(image))))


def test_color_jitter_is_torchvisions(image: np.ndarray) -> None:
    """Pixels for drawn factors, and factors and order against torchvision's draws."""
    operations = randaugment.color_jitter(np.random.default_rng(0).random((6000, 4)), 0.3)
    adjust = {
        int(Op.BRIGHTNESS): tvf.adjust_brightness,
        int(Op.CONTRAST): tvf.adjust_contrast,
        int(Op.COLOR): tvf.adjust_saturation,
    }
    for row in operations[:20]:
        expected = Image.fromarray(image)
        for code, factor in zip(row["code"].tolist(), row["args"][:, 0].tolist(), strict=True):
            expected = adjust[code](expected, factor)
        np.testing.assert_array_equal(change(image, row, FILL), np.asarray(expected))
    torch.manual_seed(0)
    jitter = transforms.ColorJitter(0.3, 0.3, 0.3)
    theirs = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None) for _ in range(6000)]
    kinds = np.array([Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR])
    orders = np.array([kinds[order[order < 3].numpy()] for order, *_ in theirs])
    _, ours_counted = np.unique(operations["code"], axis=0, return_counts=True)
    _, theirs_counted = np.unique(orders, axis=0, return_counts=True)
    assert len(ours_counted) == 6
    assert excess(ours_counted, theirs_counted) < 7
    for i, kind in enumerate(kinds):
        factors = operations["args"][:, :, 0][operations["code"] == kind]
        assert kolmogorov_smirnov(factors, np.array([params[1 + i] for params in theirs])) < 1.8


@pytest.mark.parametrize(("probability", "most"), [(0.25, 1), (1.0, 1), (0.8, 3)])
def test_boxes_to_erase_are_distributed_as_timms(probability: float, most: int) -> None:
    """Share of images, pixels erased, and of single boxes the place and the shape."""
    count, size = 4000, ImageSize(32, 24)
    random.seed(0)
    erase = RandomErasing(probability, mode="const", max_count=most, device="cpu")
    theirs = torch.stack([erase(torch.ones(1, *size)) for _ in range(count)])[:, 0].numpy() == 0
    erasing = Erasing(probability, "const", most)
    patches = erasing.draw(uniforms(0, 0, np.arange(count), erasing.columns), size)
    plan = Plan.of(np.zeros((count, 1), OPERATION), patches)
    grey = torch.full((count, *size, 3), 255, dtype=torch.uint8)
    ours = carry_out(grey, plan, mean=(0, 0, 0), std=(1, 1, 1))[:, 0].numpy() == 0
    erased = [mask.any(axis=(1, 2)) for mask in (ours, theirs)]
    assert abs(erased[0].mean() - erased[1].mean()) < 0.04
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {"area": lambda mask: mask.sum(axis=(1, 2))}
    if most == 1:
        measures |= {
            "height": lambda mask: mask.any(axis=2).sum(axis=1),
            "width": lambda mask: mask.any(axis=1).sum(axis=1),
            "top": lambda mask: mask.any(axis=2).argmax(axis=1),
            "left": lambda mask: mask.any(axis=1).argmax(axis=1),
        }
    for name, measure in measures.items():
        a, b = (measure(mask[some]) for mask, some in zip((ours, theirs), erased, strict=True))
        assert kolmogorov_smirnov(a, b) < 1.8, name


def test_what_erased_boxes_hold() -> None:
    images = torch.full((300, 32, 32, 3), 200, dtype=torch.uint8)
    seen = {}
    for mode in ("pixel", "rand", "const"):
        erasing = Erasing(1.0, mode)
        patches = erasing.draw(uniforms(0, 0, np.arange(300), erasing.columns), ImageSize(32, 32))
        plan = Plan.of(np.zeros((300, 1), OPERATION), patches)
        kwargs = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        out = carry_out(images, plan, **kwargs)
        assert torch.equal(out, carry_out(images, plan, **kwargs))
        seen[mode] = [
            out[i, :, p["top"] : p["bottom"], p["left"] : p["right"]]
            for i, p in enumerate(patches[:, 0])
            if p["bottom"] > 0
        ]
        assert len(seen[mode]) > 290
    noise = torch.cat([box.flatten() for box in seen["pixel"]])
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert not torch.equal(seen["pixel"][0][0], seen["pixel"][0][1])
    assert all((box == box[:, :1, :1]).all() for box in seen["rand"])
    colours = torch.stack([box[:, 0, 0] for box in seen["rand"]])
    assert abs(colours.mean()) < 0.15
    assert abs(colours.std() - 1) < 0.1
    assert all((box == 0).all() for box in seen["const"])


def test_a_plan_depends_on_the_place_alone() -> None:
    recipe = Recipe(AugmentConfig(recount=2))
    together = recipe.draw(3, 5, np.arange(40), SIZE)
    for r in range(3):
        part = recipe.draw(3, 5, np.arange(r, 40, 3), SIZE)
        np.testing.assert_array_equal(part.patches, together.patches[r::3])
        slots = part.operations.shape[1]
        np.testing.assert_array_equal(part.operations, together.operations[r::3, -slots:])
    assert not np.array_equal(recipe.draw(3, 6, np.arange(40), SIZE).patches, together.patches)


def test_what_each_setting_brings() -> None:
    def codes(**settings: Any) -> set[int]:
        plan = Recipe(AugmentConfig(**settings)).draw(0, 0, np.arange(400), SIZE)
        return set(plan.operations["code"].ravel().tolist()) - {Op.NONE}

    def erased(**settings: Any) -> float:
        patches = Recipe(AugmentConfig(**settings)).draw(0, 0, np.arange(400), SIZE).patches
        return (patches["bottom"] > 0).sum() / 400

    jitter = {Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR}
    assert codes() == {Op.AFFINE, *range(Op.INVERT, Op.SHARPNESS + 1)}
    assert codes(aa="none") == codes(aa="") == jitter
    assert codes(aa="", color_jitter=0.0) == set()
    assert codes(three_augment=True) == {*jitter, Op.SOLARIZE, Op.BOX_X, Op.BOX_Y}
    assert codes(aa="rand-m9-t3a", color_jitter=0.0) == {Op.COLOR, Op.SOLARIZE, Op.BOX_X, Op.BOX_Y}
    assert Op.BRIGHTNESS in codes(aa="rand-m9-t3a")
    assert 0.15 < erased() < 0.35
    assert erased(reprob=0.0) == erased(three_augment=True) == 0
    crops = [
        training_crop(cfg, ImageSize.of(size), (0.1, 0.9), (0.8, 1.25))
        for cfg, size in (
            (None, 32), (AugmentConfig(), 32), (AugmentConfig(), 33), (AugmentConfig(src=True), 224),
            (AugmentConfig(three_augment=True), 32), (AugmentConfig(), (16, 32)), (AugmentConfig(), (32, 33)),
        )
    ]  # fmt: skip
    usual = RandomResizedCrop((0.1, 0.9), (0.8, 1.25))
    assert crops == [usual, PaddedCrop(), usual, ShortSideCrop(), usual, PaddedCrop(), usual]


def test_refused_input() -> None:
    with pytest.raises(ValueError, match=r"torch.float32 \(1, 8, 8, 3\); must be torch.uint8"):
        carry_out(torch.zeros(1, 8, 8, 3), Plan.nothing(1), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    with pytest.raises(ValueError, match="the plan is for 2 images and there are 1"):
        carry_out(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), Plan.nothing(2), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    plan = Plan(np.zeros((1, 1)), np.zeros((1, 0), PATCH))
    with pytest.raises(ValueError, match="make it with"):
        carry_out(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), plan, mean=IMAGENET_MEAN, std=IMAGENET_STD)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--color-jitter", "0.3"],
        ["--ThreeAugment"],
        ["--aa", "rand-m9"],
        ["--aa", "rand-m9-t3a", "--color-jitter", "0.3"],
        ["--reprob", "1"],
        ["--mixup", "0.8"],
        ["--cutmix-minmax", "0.2", "0.4"],
        ["--src"],
        ["--input-size", "32"],
        ["--repeated-aug"],
    ],
)
def test_the_plan_of_a_run_names_whatever_changes_its_images(flags: list[str]) -> None:
    """It said "crops and flips alone" of images whose colours are jittered, or which are not resized."""
    off = ["--aa", "none", "--no-repeated-aug"]
    off += [word for name in ("color-jitter", "reprob", "mixup", "cutmix") for word in (f"--{name}", "0")]
    cfg = load_config([*off, *flags])
    assert ("alone" in _augmentation(cfg, cfg.model.size)) == (not flags)


@pytest.mark.parametrize("jitter", ["0", "0.3"])
@pytest.mark.parametrize("flags", [["--aa", "none"], ["--aa", "rand-m9"], ["--aa", "rand-m9-t3a"], ["--ThreeAugment"]])
def test_colour_jitter_is_named_where_it_is_drawn(flags: list[str], jitter: str) -> None:
    cfg = load_config([*flags, "--reprob", "0", "--color-jitter", jitter])
    without = load_config([*flags, "--reprob", "0", "--color-jitter", "0"])
    plans = [Recipe(c.augment).draw(0, 0, np.arange(4), 48) for c in (cfg, without)]
    drawn, others = ((plan.operations["code"] != Op.NONE).sum() for plan in plans)
    assert ("colour jitter" in ", ".join(described(cfg))) == (drawn > others)

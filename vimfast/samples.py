"""A sheet of what a model gets: images as they are, beside what the loaders of a run make of them.

The loaders, the mixing and their draws are those of training, in the first steps of a run on one process.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from vimfast import dist
from vimfast.augment.colours import to_pixels
from vimfast.augment.plan import Op, Plan
from vimfast.augment.recipe import described
from vimfast.class_names import english_names
from vimfast.config import Batches, Config, plan_batches, staged
from vimfast.data.loader import Loader, LoaderSettings
from vimfast.data.views import Evaluation, RegionInputs, Work
from vimfast.dist import World
from vimfast.image_size import ImageSize
from vimfast.sheet import PALETTE, Caption, Colour, Sheet, Tile
from vimfast.train.loaders import fit_order, open_training, open_training_source, open_validation
from vimfast.train.mixing import Mixup, build_mixup
from vimfast.train.report import Reporter

_ACROSS = {2: 3, 3: 2}  # panels beside each other, by their images
_BOX = 3  # pixels, of a line around a crop
_MOST_IN_TARGET = 2
_WORDS = {
    Op.INVERT: "invert",
    Op.POSTERIZE: "posterize",
    Op.SOLARIZE: "solarize",
    Op.SOLARIZE_ADD: "solarize add",
    Op.BRIGHTNESS: "brightness",
    Op.CONTRAST: "contrast",
    Op.AUTOCONTRAST: "autocontrast",
    Op.EQUALIZE: "equalize",
    Op.COLOR: "saturation",
    Op.SHARPNESS: "sharpness",
    Op.BOX_X: "blur",
    Op.BOX_Y: "blur",
    Op.SHIFT: "shift",
}


def draw_samples(cfg: Config, split: str, count: int, recipe: str) -> Image.Image:
    """The sheet.

    Args:
        cfg: of the run, with its data.
        split: ``"train"`` or ``"val"``.
        count: of the images; fewer where the data, or an epoch, has fewer.
        recipe: that the settings start from; empty: none.

    Raises:
        UserError: the data cannot be used, or an image not be read.
    """
    with dist.processes(cfg.run.device) as world:
        draw = _draw_training if split == "train" else _draw_validation
        return draw(cfg, count, world, f"{cfg.data.data_path}, {split}", _settings(cfg, split, recipe))


def _settings(cfg: Config, split: str, recipe: str) -> str:
    stages = staged(cfg)
    if split == "train" and len(stages) > 1:
        recipe, cfg = f"{recipe}, stage 1 of {len(stages)}".removeprefix(", "), stages[0].config
    name = f"recipe {recipe}" if recipe else "no recipe"
    return f"{name} · seed {cfg.run.seed} · {cfg.model.size} pixels"


# Training


class _Copy(NamedTuple):
    """One of the images that come of an original in a step."""

    box: np.ndarray  # float [4]: top, left, height, width of its crop in the original
    done: list[str]  # to it, in words
    pixels: np.ndarray  # uint8 [H, W, 3]
    mixed: np.ndarray  # the same, as it is trained on
    target: np.ndarray  # float [K]


class _Sample(NamedTuple):
    """An image of a step, and all that comes of it."""

    original: Image.Image
    label: int
    step: int
    copies: list[_Copy]


def _draw_training(cfg: Config, count: int, world: World, title: str, settings: str) -> Image.Image:
    source = open_training_source(cfg)
    cfg = fit_order(cfg, source, Reporter(None, False))
    final_size, cfg = cfg.model.size, staged(cfg)[0].config
    batch = min(plan_batches(cfg, 1).batch_size, len(source))
    silent = Reporter(None, False)
    loader = open_training(source, cfg, Batches(batch, 1), world, silent, final_size=final_size)
    mixup = build_mixup(cfg.mix, source, cfg.run.seed, 0)
    try:
        samples = list(islice(_samples(loader, mixup, count), count))
    finally:
        loader.close()
    labels, copies = english_names(source.classes), max(len(sample.copies) for sample in samples)
    panels = [_panel(sample, source.classes, labels, copies, mixup.enabled) for sample in samples]
    legend = [
        "Outlined in the original: the crops, each in the colour of the image made of it; below that is what was done."
    ]
    if mixup.enabled:
        legend.append(
            "Mixed: as it is trained on, blended with another image of its batch (mixup) or with a box of it (cutmix). "
            "Below it: its target."
        )
    return Sheet(
        title=title,
        subtitle=[f"{settings} · first steps of epoch 0", _augmentation(cfg, final_size)],
        panels=panels,
        across=_ACROSS.get(len(panels[0]), 1),
        headings=["original", *["augmented"] * copies, *["mixed"] * (copies * mixup.enabled)],
        legend=legend,
    ).draw()


def _samples(loader: Loader, mixup: Mixup, count: int) -> Iterator[_Sample]:
    """One of each step, then the next of each, so that draws which a step has in common are seen to differ."""
    steps = min(count, loader.steps)
    drawn = [
        list(islice(_of_step(loader, mixup, step, *batch), -(-count // steps)))
        for step, batch in enumerate(islice(loader.epoch(0), steps))
    ]
    for place in range(max(map(len, drawn))):
        yield from (samples[place] for samples in drawn if place < len(samples))


def _of_step(loader: Loader, mixup: Mixup, step: int, images: Tensor, labels: Tensor) -> Iterator[_Sample]:
    order, ids, work = loader.order, loader.ids(0, step), loader.work(0, step)
    mixed, targets = mixup(images, labels, step)
    pixels, mixed_pixels = to_pixels(images), to_pixels(mixed)
    shown = order.step(0, step)[0] // order.repeats
    numbers, counts = np.unique(shown, return_counts=True)
    whole = numbers[counts == counts.max()]  # at the ends of a step, copies may be in the one before or after
    for number in whole.tolist():
        places = np.flatnonzero(shown == number)
        original = _open(loader, int(ids[places[0]]))
        boxes = _boxes(work, places, original.size)
        copies = [
            _Copy(box, _done(work, place), pixels[place], mixed_pixels[place], targets[place].cpu().numpy())
            for place, box in zip(places.tolist(), boxes, strict=True)
        ]
        yield _Sample(original, int(loader.source.labels[ids[places[0]]]), step, copies)


def _open(loader: Loader, i: int) -> Image.Image:
    encoded = loader.source.read(np.array([i])).encoded[0]
    return Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")


def _boxes(work: Work, places: np.ndarray, size: tuple[int, int]) -> np.ndarray:  # float [n, 4]
    """The crops of some images of a batch, all from an original of this (width, height)."""
    x = work.inputs
    if isinstance(x, RegionInputs):
        assert work.cuts is not None
        corner, boxes = x.corner[work.cuts.which[places]], work.cuts.boxes[places]
        return np.concatenate([corner + boxes[:, :2], boxes[:, 2:]], axis=1).astype(float)
    scale = np.array(size[::-1]) / x.resized[places]  # type: ignore[attr-defined]
    return np.concatenate([x.corner[places] * scale, np.array(work.size) * scale], axis=1)  # type: ignore[attr-defined]


def _done(work: Work, place: int) -> list[str]:
    mirror = work.inputs.mirror if work.cuts is None else work.cuts.mirror  # type: ignore[attr-defined]
    words = ["flip"] if mirror[place] else []
    assert work.plan is not None
    return words + _operations(work.plan, place)


def _operations(plan: Plan, place: int) -> list[str]:
    words = []
    for operation in plan.operations[place]:
        op = Op(int(operation["code"]))
        if op is Op.AFFINE:
            words.append(_kind_of_warp(operation["args"]))
        elif op is not Op.NONE:
            words.append(_WORDS[op])
    patches = plan.patches[place]
    if ((patches["bottom"] > patches["top"]) & (patches["right"] > patches["left"])).any():
        words.append("erase")
    return list(dict.fromkeys(words))


def _kind_of_warp(args: np.ndarray) -> str:
    a, b, _, d, _, _ = args
    if not b and not d:
        return "translate"
    return "shear" if a == 1 else "rotate"


def _panel(sample: _Sample, classes: Sequence[str], labels: Sequence[str], copies: int, with_mixed: bool) -> list[Tile]:
    colours = PALETTE[: len(sample.copies)]
    about = [*_class(sample.label, classes, labels), _size(sample.original, f", step {sample.step}")]
    first = Tile(_outlined(sample.original, [copy.box for copy in sample.copies], colours), about)
    made = [
        Tile(Image.fromarray(copy.pixels), _in_pairs(copy.done or ["only cut out"]), colour)
        for copy, colour in zip(sample.copies, colours, strict=True)
    ]
    mixed = [Tile(Image.fromarray(copy.mixed), _target(copy.target, labels)) for copy in sample.copies]
    nothing = [_EMPTY] * (copies - len(made))
    return [first, *made, *nothing, *([*mixed, *nothing] if with_mixed else [])]


def _in_pairs(words: list[str]) -> list[Caption]:
    return [Caption(", ".join(words[i : i + 2]), faint=True) for i in range(0, len(words), 2)]


_EMPTY = Tile(Image.new("RGB", (1, 1), (255, 255, 255)))


def _outlined(image: Image.Image, boxes: Iterable[np.ndarray], colours: Sequence[Colour]) -> Image.Image:
    """With lines that are as wide on every sheet, whatever the size of the image."""
    image = image.copy()
    pen = ImageDraw.Draw(image)
    wide = max(1, round(_BOX * max(image.size) / Sheet.side))
    for (top, left, height, width), colour in zip(boxes, colours, strict=True):
        right, bottom = min(left + width, image.width) - 1, min(top + height, image.height) - 1
        pen.rectangle((max(left, 0), max(top, 0), right, bottom), outline=colour, width=wide)
    return image


def _class(label: int, classes: Sequence[str], labels: Sequence[str]) -> list[Caption]:
    own = [Caption(labels[label])]
    return own if labels[label] == classes[label] else [*own, Caption(classes[label], faint=True)]


def _size(image: Image.Image, more: str = "") -> Caption:
    return Caption(f"{image.width} x {image.height}{more}", faint=True)


def _target(target: np.ndarray, labels: Sequence[str]) -> list[Caption]:
    best = np.argsort(-target, kind="stable")[:_MOST_IN_TARGET]
    floor = float(target.min()) if len(target) > 2 else 0.0  # what smoothing gives to every class
    return [
        Caption(labels[i], f"{target[i]:.2f}", float(target[i]))
        for i in best.tolist()
        if target[i] > floor or i == best[0]
    ]


def _augmentation(cfg: Config, final_size: ImageSize) -> str:
    """The settings that change images and targets, in words."""
    targets = "binary cross entropy" if cfg.mix.bce_loss else f"label smoothing {cfg.mix.smoothing:g}"
    return ", ".join([*described(cfg, final_size), targets])


# Evaluation


def _draw_validation(cfg: Config, count: int, world: World, title: str, settings: str) -> Image.Image:
    run = open_validation(cfg, 1, world, None, Reporter(None, False))
    view = run.view
    assert isinstance(view, Evaluation)
    samples, classes = len(run.source), run.source.classes
    # In the evaluation's own order, all would be of one class.
    order = replace(view.order, batch_size=min(count, samples), shuffle=True, limit=1)
    loader = Loader(run.source, replace(view, order=order), LoaderSettings(on_bad_image=cfg.data.on_bad_image))
    try:
        images, numbers = next(loader.epoch(0))
        ids, work = loader.ids(0, 0), loader.work(0, 0)
    finally:
        loader.close()
    labels, panels = english_names(classes), []
    for place, (i, pixels, number) in enumerate(zip(ids.tolist(), to_pixels(images), numbers.tolist(), strict=True)):
        original = _open(loader, i)
        outlined = _outlined(original, _boxes(work, np.array([place]), original.size), PALETTE[:1])
        captions = [*_class(number, classes, labels), _size(original)]
        panels.append([Tile(outlined, captions), Tile(Image.fromarray(pixels), frame=PALETTE[0])])
    return Sheet(
        title=title,
        subtitle=[settings, "picked at random; as they are, and as the evaluation sees them"],
        panels=panels,
        across=_ACROSS[2],
        headings=["original", "evaluated"],
        legend=["Outlined: what is cut out."],
    ).draw()

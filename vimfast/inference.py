"""What a trained model sees in images that lie anywhere.

    from vimfast.inference import predict

    for image in predict("runs/tiny", ["cat.jpg", "photos/"]).images:
        print(image.path, image.guesses[0].label, image.guesses[0].probability)

An image is decoded, resized and cut as the trainer's evaluation does it, by the same code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from vimfast.augment.colours import IMAGENET_MEAN, IMAGENET_STD, Normalization
from vimfast.augment.recipe import evaluation_crop
from vimfast.checkpoint import (
    Description,
    described,
    load_found,
    load_weights,
)
from vimfast.class_names import english_names, imagenet_classes
from vimfast.data.files import FilesSource
from vimfast.data.loader import Loader, LoaderSettings
from vimfast.data.order import Order
from vimfast.data.views import Evaluation
from vimfast.errors import UserError, counted
from vimfast.image_size import ImageSize, SizeLike
from vimfast.models import create_model
from vimfast.models.grey import GREY_MEAN, GREY_STD, Grey
from vimfast.models.registry import MODELS
from vimfast.shards.tree import is_image_name
from vimfast.train.compiling import is_capturable
from vimfast.train.forward import Forward

Weights = Literal["raw", "ema"]
Report = Callable[[int], None]

_IMAGENET = 1000  # classes
_PATCH, _BLOCKS = 16, 24  # of the named models
OTHER_MODEL = "give the --model it is of; if that had other options, its run folder or an exported one, which tell them"
_WORTH_A_GRAPH = 10  # batches: capturing one takes as long as launching a few
_YOUNG = 0.1  # of an average, that is still its initial weights


class Guess(NamedTuple):
    """One of the classes that a model knows."""

    label: str  # in English, where the class is one of ImageNet's
    name: str  # of the class
    number: int  # of the class
    probability: float


class Seen(NamedTuple):
    """An image, and the classes that it may be of, the most probable first."""

    path: Path
    guesses: list[Guess]


class Unreadable(NamedTuple):
    """What could not be looked at; the sentence names it."""

    path: Path
    why: str


class Predictions(NamedTuple):
    """All that was asked for, in that order."""

    images: list[Seen]
    unreadable: list[Unreadable]


class Embeddings(NamedTuple):
    """What a model makes of images, in the order in which they were asked for."""

    images: list[Path]  # N
    features: np.ndarray  # float32 [N, C]
    unreadable: list[Unreadable]


@dataclass(frozen=True)
class Classifier:
    """A trained model and all that it takes to ask it.

    Attributes:
        model: in evaluation mode, on the device that it runs on.
        view: makes batches of images; it is for no images yet.
        classes: their names, as many as the model has outputs.
        labels: the same in English, where they are ImageNet's.
        origin: which checkpoint it is of.
        weights: which of the checkpoint's.
        notes: what a user should know about it, a sentence each.
        grey: makes batches grey, for a model that sees one channel.
    """

    model: nn.Module
    view: Evaluation
    classes: Sequence[str]
    labels: Sequence[str]
    origin: Path
    weights: Weights
    notes: Sequence[str] = ()
    grey: Grey | None = None

    def loader(self, paths: Sequence[Path], batch_size: int = 64) -> Loader:
        """Hands out what the model sees of these files, in their order, without those that cannot be read."""
        order = Order(len(paths), max(1, min(batch_size, len(paths))), shuffle=False, drop_last=False)
        settings = LoaderSettings(on_bad_image="skip", report=lambda sentence: None)
        return Loader(FilesSource(paths), replace(self.view, order=order), settings)


def predict(
    checkpoint: Classifier | str | Path,
    paths: str | Path | Iterable[str | Path],
    *,
    top: int = 5,
    batch_size: int = 64,
    report: Report | None = None,
) -> Predictions:
    """The most probable classes of images.

    Args:
        checkpoint: as :func:`load_classifier` takes it, or what it returns.
        paths: of images, and of folders whose images are meant, also those in folders in them; or one such path.
        top: so many classes for each image; fewer if the model knows fewer.
        batch_size: images at once.
        report: is told, after each batch, how many images have been looked at.

    Returns:
        also what could not be read, which stops nothing.

    Raises:
        UserError: the checkpoint cannot be used, or what is to be looked at is no path.
    """
    own = checkpoint if isinstance(checkpoint, Classifier) else load_classifier(checkpoint)
    images, missing = find_images(paths)
    seen = predict_files(own, images, top=top, batch_size=batch_size, report=report)
    return seen._replace(unreadable=missing + seen.unreadable)


def predict_files(
    own: Classifier, images: Sequence[Path], *, top: int = 5, batch_size: int = 64, report: Report | None = None
) -> Predictions:
    """:func:`predict`, of files that :func:`find_images` has found."""
    if not images:
        return Predictions([], [])
    top = min(top, len(own.classes))
    device = own.view.device
    captures = device.type == "cuda" and is_capturable(own.model) and len(images) >= _WORTH_A_GRAPH * batch_size
    forward = Forward([own.model], nullcontext(), device, batch=batch_size if captures else None)

    def best(batch: Tensor) -> Tensor:  # [B, 2, top]
        found = forward(batch)[0].softmax(1).topk(top)
        return torch.stack([found.values, found.indices.float()], 1)

    read, answers, bad = _ask(own, images, best, batch_size, report)
    guesses = [
        [Guess(own.labels[i], own.classes[i], i, p) for p, i in zip(values, map(int, indices), strict=True)]
        for values, indices in answers.tolist()
    ]
    seen = [Seen(path, own_guesses) for path, own_guesses in zip(read, guesses, strict=True)]
    return Predictions(seen, bad)


def embed(
    checkpoint: Classifier | str | Path,
    paths: str | Path | Iterable[str | Path],
    *,
    batch_size: int = 64,
    report: Report | None = None,
) -> Embeddings:
    """What the head of a model would read, of images.

    Args:
        checkpoint, paths, batch_size, report: as for :func:`predict`.

    Raises:
        UserError: the checkpoint cannot be used, or its model's head reads more than one vector.
    """
    own = checkpoint if isinstance(checkpoint, Classifier) else load_classifier(checkpoint)
    images, missing = find_images(paths)
    embedded = embed_files(own, images, batch_size=batch_size, report=report)
    return embedded._replace(unreadable=missing + embedded.unreadable)


def embed_files(
    own: Classifier, images: Sequence[Path], *, batch_size: int = 64, report: Report | None = None
) -> Embeddings:
    """:func:`embed`, of files that :func:`find_images` has found."""
    model: Any = own.model

    def features(batch: Tensor) -> Tensor:  # [B, C]
        pooled: Tensor = model.forward_head(model.forward_features(batch), pre_logits=True)
        if pooled.ndim != 2:
            shape = " x ".join(map(str, pooled.shape[1:]))
            raise UserError(f"the model of {own.origin} makes {shape} features of an image", "use one that pools them")
        return pooled.float()

    read, answers, bad = _ask(own, images, features, batch_size, report) if images else ([], torch.empty(0), [])
    vectors = answers.numpy() if read else np.zeros((0, model.num_features), np.float32)
    return Embeddings(read, vectors, bad)


def _ask(
    own: Classifier, images: Sequence[Path], ask: Callable[[Tensor], Tensor], batch_size: int, report: Report | None
) -> tuple[list[Path], Tensor, list[Unreadable]]:
    """(images that could be read, answers to each batch [B, ...] one after the other on the CPU, the others)."""
    loader = own.loader(images, batch_size)
    answers: list[Tensor] = []
    for batch in loader.epoch(0):
        with torch.no_grad():
            answers.append(ask(batch.images if own.grey is None else own.grey(batch.images)).cpu())
        if report is not None:
            report(sum(map(len, answers)))
    # Only now is it known which images were left out.
    ids = np.concatenate([loader.ids(0, step) for step in range(loader.steps)])
    unreadable = [Unreadable(images[i], why) for i, why in sorted(loader.bad.items())]
    return [images[i] for i in ids.tolist()], torch.cat(answers) if answers else torch.empty(0), unreadable


def find_images(paths: str | Path | Iterable[str | Path]) -> tuple[list[Path], list[Unreadable]]:
    """The files that are meant, and what is not there. In a folder those count whose names are those of images.

    Raises:
        UserError: something else than a path is among them.
    """
    found: list[Path] = []
    missing: list[Unreadable] = []
    for given in [paths] if isinstance(paths, str | Path) else paths:
        if not isinstance(given, str | os.PathLike):
            raise UserError(
                f"a {type(given).__name__} is no path of an image",
                "give files or folders; for images in memory, docs/export.md shows the model and its transform",
            )
        path = Path(given)
        if path.is_dir():
            inside = _walk(path)
            found += inside
            if not inside:
                missing.append(Unreadable(path, f"{path} holds no images"))
        elif path.exists():
            found.append(path)
        else:
            missing.append(Unreadable(path, f"{path} does not exist"))
    return found, missing


def _walk(folder: Path) -> list[Path]:
    """By name. Links are followed, but not in circles."""
    found, visited = [], set()
    for inside, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(inside)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(inside, name) for name in sorted(names) if is_image_name(name)]
    return found


# The checkpoint


def load_classifier(
    checkpoint: str | Path,
    *,
    weights: Weights | None = None,
    model: str = "",
    input_size: SizeLike | None = None,
    device: torch.device | str | None = None,
) -> Classifier:
    """A model ready to be asked.

    Args:
        checkpoint: a run folder, whose best checkpoint is taken, or else its last; a checkpoint of ours or of
            hustvl/Vim; a folder in the hub's layout, as ``vimfast export`` writes it; or a file of weights alone.
        weights: which of them; None: their average where there is one, unless more than a tenth of it is still the
            initial weights.
        model: its name, where the checkpoint does not say.
        input_size: side of the images, pixels, or (height, width), where it is not to be the checkpoint's.
        device: None: a GPU if there is one.

    Raises:
        UserError: there is no checkpoint, it is of an unknown model, or does not hold these weights.
    """
    origin, state, notes = load_found(Path(checkpoint), best=True)
    held: dict[Weights, dict[str, Tensor] | None] = {"raw": state["model"], "ema": state.get("model_ema")}
    share = 0.0 if held["ema"] is None or weights is not None else _youth(state)
    chosen = weights or ("raw" if held["ema"] is None or share > _YOUNG else "ema")
    values = held[chosen]
    if values is None:
        raise UserError(f"{origin} holds no averaged weights", "drop --weights ema")
    if share > _YOUNG:
        notes.append(
            f"the averaged weights in {origin} are still {share:.0%} initial weights, so the trained ones are taken; "
            "--weights ema takes the average"
        )
    told = described(state)
    built = rebuild(told, values, str(origin), model=model, input_size=input_size)
    notes += load_weights(built, values, str(origin), resample="patches", img_size=told.img_size, fix=OTHER_MODEL)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    view = _view(told, ImageSize.of(input_size or told.input_size), where)
    classes = _class_names(told, _outputs(built), str(origin))
    labels, grey = english_names(classes), _grey(told)
    return Classifier(built.to(where).eval(), view, classes, labels, origin, chosen, notes, grey)


def rebuild(
    told: Description,
    weights: Mapping[str, Tensor],
    origin: str,
    *,
    model: str = "",
    input_size: SizeLike | None = None,
) -> nn.Module:
    """The model that weights are of, with initial weights.

    Args:
        told: what their checkpoint says of it.
        origin: their checkpoint, for errors.
        model, input_size: what it is instead.

    Raises:
        UserError: nothing says which model it is, or it cannot be built.
    """
    name = model or told.model or _recognized(weights)
    if not name:
        raise UserError(f"{origin} does not say which model it is of", "give its --model")
    options = dict(told.options)
    known = get_pretrained_cfg(name)
    heads = (known.classifier if known is not None else None) or "head"
    head = weights.get(f"{heads if isinstance(heads, str) else heads[0]}.weight")
    if head is not None:
        options["num_classes"] = len(head)
    return create_model(name, img_size=ImageSize.of(input_size or told.input_size).plain, **options)


def _recognized(weights: Mapping[str, Tensor]) -> str:
    """The named Vision Mamba whose weights have these shapes; empty: none has. Published files are weights alone."""
    positions, patches = weights.get("pos_embed"), weights.get("patch_embed.proj.weight")
    if positions is None or patches is None or patches.shape[-1] != _PATCH or "layers.0.mixer.A_b_log" not in weights:
        return ""
    shape = (len({name.split(".")[1] for name in weights if name.startswith("layers.")}), *positions.shape[1:])
    for name, (width, size, stride) in MODELS.items():
        tokens = ((size - _PATCH) // stride + 1) ** 2 + 1
        if shape == (_BLOCKS, tokens, width):
            return name
    return ""


def _outputs(model: nn.Module) -> int:
    count: Any = model.num_classes
    return int(count)


def _class_names(told: Description, outputs: int, origin: str) -> list[str]:
    """The checkpoint's, or those that a model of so many outputs usually has."""
    if told.classes and len(told.classes) != outputs:
        raise UserError(
            f"{origin} names {counted(len(told.classes), 'class')} for a model of {counted(outputs, 'output')}",
            "use another checkpoint",
        )
    if told.classes:
        return list(told.classes)
    return imagenet_classes() if outputs == _IMAGENET else [f"class {i}" for i in range(outputs)]


def _grey(told: Description) -> Grey | None:
    if told.options.get("in_chans") != 1:
        return None
    return Grey(*(told.preprocessing.get(name, own) for name, own in (("mean", GREY_MEAN), ("std", GREY_STD))))


def _view(told: Description, size: ImageSize, device: torch.device) -> Evaluation:
    own = told.preprocessing if _grey(told) is None else {}
    mean, std = (tuple(own.get(name, default)) for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    interpolation = told.preprocessing.get("interpolation", Evaluation.interpolation)
    crop = evaluation_crop(size, told.crop_ratio)
    return Evaluation(Order(0, 1), device, size, crop, interpolation, Normalization(mean, std))


def _youth(state: Mapping[str, Any]) -> float:
    """How much of the average is what it began with; 0 where the checkpoint does not say."""
    decay = (state.get("config") or {}).get("ema", {}).get("model_ema_decay")
    if decay is None or "steps" not in state:
        return 0.0
    updates = int(state["epoch"]) * int(state["steps"]) + int(state["step"])
    return float(decay) ** updates

"""What a loader makes of the images of a step. A view owns all of it: the draws, DALI's graph, and what comes after.

:class:`CutRegions` trains on boxes (:class:`~vimfast.augment.crops.BoxCrop`), which are cut from what DALI decodes.
:class:`CutOut` trains on squares cut out of resized images (:class:`~vimfast.augment.crops.SquareCrop`), and
:class:`Evaluation` looks at the middle. :func:`training_view` and :func:`crop_view` choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vimfast.augment import draws, resize, resize_cpu
from vimfast.augment.colours import IMAGENET, Normalization
from vimfast.augment.crops import BoxCrop, CentreCrop, SquareCrop
from vimfast.augment.pixels import carry_out
from vimfast.augment.plan import Plan
from vimfast.augment.recipe import Recipe, training_crop
from vimfast.augment.threads import Threads
from vimfast.config import AugmentConfig
from vimfast.config.choices import Interpolation
from vimfast.data import decoding
from vimfast.data.decoding import Encoded, Flag, GraphSettings, Pair, Size
from vimfast.data.exchange import Exchange
from vimfast.data.order import Order
from vimfast.data.source import Images
from vimfast.errors import UserError, did_you_mean
from vimfast.image_size import ImageSize, SizeLike

INTERPOLATIONS = get_args(Interpolation)

Read = Callable[[np.ndarray], tuple[np.ndarray, Images]]  # ids wanted -> ids that come, and their images


class Batch(NamedTuple):
    """Normalized images and their labels, on the loader's device."""

    images: Tensor  # [B, 3, H, W], float32 unless asked otherwise
    labels: Tensor  # int64 [B]


class Stage(NamedTuple):
    """All that varies in the course of a run."""

    size: SizeLike  # of the images, pixels
    recipe: Recipe


Stages = Callable[[int], Stage]  # of an epoch; asked for each step, also of epochs that are only read ahead


class Cuts(NamedTuple):
    """How :func:`vimfast.augment.resize.crop_resize` makes the crops of a batch from decoded regions."""

    which: np.ndarray  # int64 [b], the region
    boxes: np.ndarray  # int32 [b, 4]: top, left, height, width in it
    mirror: np.ndarray  # int32 [b]
    cubic: np.ndarray  # int32 [b]


class Work(NamedTuple):
    """A step on its way: what is decoded for it, and what is then made of that."""

    place: tuple[int, int]  # epoch, step
    ids: np.ndarray  # int64 [n], of what is decoded
    inputs: tuple[Any, ...]  # the view's, of n images; the encoded images first
    labels: np.ndarray  # int64 [b]
    size: ImageSize  # of the images that come out, pixels
    plan: Plan | None = None  # what is done to the crops; None in evaluation
    cuts: Cuts | None = None  # how crops are made of decoded regions; None: what is decoded are the crops


class View(Protocol):
    """What a loader makes of the images of a step; a dataclass."""

    training: ClassVar[bool]
    inputs: ClassVar[type[tuple[Any, ...]]]  # of the graph, by name: see vimfast.data.decoding

    @property
    def order(self) -> Order:
        """Which images come when."""

    @property
    def device(self) -> torch.device:
        """Where batches come out."""

    @property
    def most(self) -> int:
        """The most images that are decoded for a step."""

    def size_in(self, epoch: int) -> ImageSize:
        """Of the images that come out."""

    def draw(self, epoch: int, step: int, read: Read) -> Work:
        """Read the images of a step and draw what is done to them. A function of its arguments and the data alone."""

    def graph(self, x: Any, settings: GraphSettings) -> Sequence[Any]:
        """Outputs of DALI's graph; `x` is `inputs` of nodes."""

    def split(self, outputs: tuple[Any, ...], works: list[Work]) -> Sequence[Any]:
        """What DALI made, for each of the works that it got together."""

    def finish(self, decoded: Any, work: Work, threads: Threads) -> Batch:
        """The batch; on a GPU, in the order of the current stream, and in memory that DALI does not own.

        Args:
            threads: what is left to do on a CPU is shared out among them.
        """


@dataclass(frozen=True)
class Training:
    """What all training views have in common.

    Args:
        order: which images come when.
        device: where batches come out.
        stage: of an epoch.
        flip: probability of mirroring.
        interpolation: ``"bicubic"``, ``"bilinear"``, or ``"random"``, each image's own.
        normalization: of the crops.

    Raises:
        UserError: the interpolation is not known.
    """

    order: Order
    device: torch.device
    stage: Stages
    flip: float = 0.5
    interpolation: Interpolation = "bicubic"
    normalization: Normalization = IMAGENET

    training: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            hint = did_you_mean(self.interpolation, INTERPOLATIONS)
            raise UserError(
                f"interpolation is {self.interpolation!r}{hint}; it must be one of {', '.join(INTERPOLATIONS)}"
            )

    def size_in(self, epoch: int) -> ImageSize:
        return ImageSize.of(self.stage(epoch).size)

    def _draw(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Uniform numbers, where to mirror and which filter, for the images at these positions."""
        u = draws.uniforms(self.order.seed, epoch, positions)
        return u, draws.flips(u, self.flip), draws.filters(u, self.interpolation)

    def _batch(self, crops: Tensor, labels: Tensor, plan: Plan | None, threads: Threads) -> Batch:
        assert plan is not None
        return _normalized(crops, labels, plan, self.normalization, threads)


def _normalized(squares: Tensor, labels: Tensor, plan: Plan, by: Normalization, threads: Threads) -> Batch:
    return Batch(carry_out(squares, plan, mean=by.mean, std=by.std, dtype=by.dtype, threads=threads), labels)


def _split(outputs: tuple[Any, ...], works: list[Work], device: torch.device) -> Sequence[Any]:
    """The first output of a graph: on a GPU finished squares, on a CPU whole images, for each of the works."""
    counts = [len(work.ids) for work in works]
    if device.type != "cuda":
        return decoding.Regions.of(outputs[0]).split(counts)
    parts: tuple[Tensor, ...] = decoding.tensor(*outputs).split(counts)
    return parts


class RegionInputs(NamedTuple):
    encoded: Encoded
    corner: Pair
    extent: Pair


@dataclass(frozen=True)
class CutRegions(Training):
    """Random boxes of images. DALI only decodes; the crops are cut and resized here (:mod:`vimfast.augment.resize`).

    Where the copies of repeated augmentation come to one rank (``order.neighbours``, or a single process), an image is
    read and decoded once and then cropped, mirrored and augmented as often as it is repeated. So it is where the ranks
    of a host decode for each other (``order.node``): each decodes its share with all copies, and they exchange the
    crops before they are augmented. Every rank of the host must then take the same batches.

    Args:
        crop: where the boxes are.
        exchange: of the crops between the ranks of ``order.node``; None: this rank decodes for itself.
    """

    crop: BoxCrop = field(kw_only=True)
    exchange: Exchange | None = field(kw_only=True, default=None)

    inputs: ClassVar[type[tuple[Any, ...]]] = RegionInputs

    @property
    def copies(self) -> int:
        """Crops of an image that are made from one decode."""
        order = self.order
        together = order.world == 1 or order.neighbours or self.exchange is not None
        return order.repeats if together else 1

    @property
    def most(self) -> int:
        # Each run of neighbouring positions may begin with the last copy of an image.
        order = self.order
        run = order.batch_size if order.node in (1, order.world) else order.node
        runs = 1 if run == order.batch_size else 1 + -(-order.batch_size // run)
        return min(order.batch_size, runs * (1 + -(-(run - 1) // self.copies)))

    def draw(self, epoch: int, step: int, read: Read) -> Work:
        """Each image is read once, and what its boxes cover together is decoded.

        All its copies are drawn, also those in the batches before and after this one.
        """
        copies, size = self.copies, self.size_in(epoch)
        positions, ids = self.order.decoded(epoch, step) if self.exchange else self.order.step(epoch, step)
        shown, first, which = np.unique(positions // copies, return_index=True, return_inverse=True)
        ids, images = read(ids[first])
        u, mirror, cubic = self._draw(epoch, (shown[:, None] * copies + np.arange(copies)).ravel())
        drawn = self.crop.boxes(u, np.repeat(images.sizes, copies, axis=0))
        low, extent = (part.reshape(len(ids), copies, 2) for part in drawn)
        corner = low.min(axis=1)
        inputs = RegionInputs(images.encoded, corner, (low + extent).max(axis=1) - corner)
        boxes = np.concatenate([low - corner[:, None], extent], axis=2).reshape(-1, 4)
        at = which * copies + positions % copies  # of each position, its box
        if self.exchange is not None:
            at = at[self.exchange.sending_order]
        cuts = Cuts(at // copies, boxes[at], mirror[at], cubic[at])
        own, _ = self.order.step(epoch, step)
        plan = self.stage(epoch).recipe.draw(self.order.seed, epoch, own, size)
        return Work((epoch, step), ids, inputs, images.labels[cuts.which], size, plan, cuts)

    def graph(self, x: RegionInputs, settings: GraphSettings) -> Sequence[Any]:
        return [decoding.decode_boxes(x.encoded, x.corner, x.extent, settings)]

    def split(self, outputs: tuple[Any, ...], works: list[Work]) -> Sequence[decoding.Regions]:
        return decoding.Regions.of(*outputs).split([len(work.ids) for work in works])

    def finish(self, decoded: decoding.Regions, work: Work, threads: Threads) -> Batch:
        assert work.cuts is not None
        if self.device.type == "cuda":
            crops = resize.crop_resize_at(decoded.addresses, decoded.sizes, *work.cuts, work.size, self.device)
        else:
            crops = resize.crop_resize(decoded.images(), *work.cuts, work.size, threads)
        labels = torch.from_numpy(work.labels).to(self.device, non_blocking=True)
        if self.exchange is not None:
            crops, labels = self.exchange(crops), self.exchange(labels)
        return self._batch(crops, labels, work.plan, threads)


class CutOutInputs(NamedTuple):
    encoded: Encoded
    resized: Size
    corner: Pair
    extent: Pair
    mirror: Flag
    cubic: Flag


@dataclass(frozen=True)
class CutOut(Training):
    """Squares cut out of resized images; each copy of an image is decoded by itself.

    On a GPU DALI makes them; on a CPU it decodes, and the rest is done here (:mod:`vimfast.augment.resize_cpu`).

    Args:
        crop: where the squares are.
    """

    crop: SquareCrop = field(kw_only=True)

    inputs: ClassVar[type[tuple[Any, ...]]] = CutOutInputs

    @property
    def most(self) -> int:
        return self.order.batch_size

    def draw(self, epoch: int, step: int, read: Read) -> Work:
        size = self.size_in(epoch)
        positions, ids = self.order.step(epoch, step)
        ids, images = read(ids)
        u, mirror, cubic = self._draw(epoch, positions)
        resized, corner, shift = self.crop.squares(u, images.sizes, size)
        if shift is not None:
            shift = shift * np.stack([np.ones_like(mirror), 1 - 2 * mirror], axis=1)
        plan = self.stage(epoch).recipe.draw(self.order.seed, epoch, positions, size, shift)
        extent = np.tile(np.array(size, np.int32), (len(ids), 1))
        inputs = CutOutInputs(images.encoded, resized.astype(np.float32), corner, extent, mirror, cubic)
        return Work((epoch, step), ids, inputs, images.labels, size, plan)

    def graph(self, x: CutOutInputs, settings: GraphSettings) -> Sequence[Any]:
        whole = decoding.decode(x.encoded, settings)
        if self.device.type != "cuda":
            return [whole, *x[1:]]  # the latter because DALI warns of inputs that it has no use for
        whole = decoding.resize(whole, x.resized, x.cubic)
        return [decoding.mirror(decoding.cut(whole, x.corner, x.extent), x.mirror)]

    def split(self, outputs: tuple[Any, ...], works: list[Work]) -> Sequence[Any]:
        return _split(outputs, works, self.device)

    def finish(self, decoded: Any, work: Work, threads: Threads) -> Batch:
        labels = torch.from_numpy(work.labels).to(self.device, non_blocking=True)
        if self.device.type != "cuda":
            _, resized, corner, _, mirror, cubic = work.inputs
            decoded = resize_cpu.resize_cut(decoded.images(), resized, corner, mirror, cubic, work.size, threads)
        return self._batch(decoded, labels, work.plan, threads)


class EvaluationInputs(NamedTuple):
    encoded: Encoded
    resized: Size
    corner: Pair


@dataclass(frozen=True)
class Evaluation:
    """The middle of each image, resized as Pillow does it.

    Args:
        order: which images come when.
        device: where batches come out.
        size: of the images that come out, pixels.
        crop: where the squares are; draws nothing.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
    """

    order: Order
    device: torch.device
    size: SizeLike = 224
    crop: SquareCrop = field(default_factory=CentreCrop)
    interpolation: Interpolation = "bicubic"
    normalization: Normalization = IMAGENET

    training: ClassVar[bool] = False
    inputs: ClassVar[type[tuple[Any, ...]]] = EvaluationInputs

    @property
    def most(self) -> int:
        return self.order.batch_size

    def size_in(self, epoch: int) -> ImageSize:
        return ImageSize.of(self.size)

    def draw(self, epoch: int, step: int, read: Read) -> Work:
        ids, images = read(self.order.step(epoch, step)[1])
        size = self.size_in(epoch)
        squares = self.crop.squares(np.empty((len(ids), draws.COLUMNS)), images.sizes, size)
        inputs = EvaluationInputs(images.encoded, squares.resized.astype(np.float32), squares.corner)
        return Work((epoch, step), ids, inputs, images.labels, size)

    def graph(self, x: EvaluationInputs, settings: GraphSettings) -> Sequence[Any]:
        whole = decoding.decode(x.encoded, settings, fancy=True)
        if self.device.type != "cuda":
            return [whole, x.resized, x.corner]  # the latter two because DALI warns of inputs that it has no use for
        whole = decoding.resize_as_pillow(whole, x.resized, self.interpolation)
        squares = decoding.cut(whole, x.corner, [*self.size_in(0)])
        return [decoding.normalize(squares, self.normalization)]

    def split(self, outputs: tuple[Any, ...], works: list[Work]) -> Sequence[Any]:
        return _split(outputs, works, self.device)

    def finish(self, decoded: Any, work: Work, threads: Threads) -> Batch:
        labels = torch.from_numpy(work.labels).to(self.device, non_blocking=True)
        if self.device.type == "cuda":
            # DALI takes its memory back in the order of this stream, and knows nothing of the one that evaluates.
            return Batch(decoded.clone(), labels)
        _, resized, corner = work.inputs
        mirror, cubic = np.zeros(len(corner)), np.full(len(corner), self.interpolation == "bicubic")
        squares = resize_cpu.resize_cut(decoded.images(), resized, corner, mirror, cubic, work.size, threads)
        return _normalized(squares, labels, Plan.nothing(len(squares)), self.normalization, threads)


def training_view(
    order: Order,
    device: torch.device,
    augmentation: AugmentConfig | None = None,
    *,
    size: SizeLike = 224,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    interpolation: Interpolation = "bicubic",
    normalization: Normalization = IMAGENET,
    group: ProcessGroup | None = None,
    stage: Stages | None = None,
) -> View:
    """The view that a section of settings asks for.

    Args:
        augmentation: what is done after crop and flip, and the kind of crop; None: random resized crop and flip only.
        size: of the images that come out, pixels.
        scale, ratio: of :class:`~vimfast.augment.crops.RandomResizedCrop`.
        group: the processes that ``order.node`` counts; None: all.
        stage: size and augmentation of each epoch; None: those given, in the whole run.

    Raises:
        UserError: a setting out of its range.
    """
    crop = training_crop(augmentation, ImageSize.of(size), scale, ratio)
    whole = Stage(size, Recipe(augmentation, interpolation))
    return crop_view(
        order,
        device,
        crop,
        stage or (lambda epoch: whole),
        flip=flip,
        interpolation=interpolation,
        normalization=normalization,
        group=group,
    )


def crop_view(
    order: Order,
    device: torch.device,
    crop: BoxCrop | SquareCrop,
    stage: Stages,
    *,
    flip: float = 0.5,
    interpolation: Interpolation = "bicubic",
    normalization: Normalization = IMAGENET,
    group: ProcessGroup | None = None,
) -> View:
    """The view for this crop on this device, with the size and the augmentation that an epoch's stage has."""
    common = (order, device, stage, flip, interpolation, normalization)
    if isinstance(crop, SquareCrop):
        return CutOut(*common, crop=crop)
    exchange = Exchange(order, group) if order.node > 1 else None
    return CutRegions(*common, crop=crop, exchange=exchange)

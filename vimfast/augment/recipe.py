"""The augmentation that a section of settings asks for: the crop, and the plan that is drawn after it."""

from __future__ import annotations

import numpy as np

from vimfast.augment import randaugment
from vimfast.augment.crops import BoxCrop, CentreCrop, PaddedCrop, RandomResizedCrop, ShortSideCrop, SquareCrop
from vimfast.augment.draws import uniforms
from vimfast.augment.erasing import Erasing
from vimfast.augment.plan import OPERATION, PATCH, Op, Plan
from vimfast.config import AugmentConfig, Config
from vimfast.config.choices import Interpolation
from vimfast.image_size import ImageSize, SizeLike

LARGEST_PADDED = 32  # inputs up to this side are cut out of the padded image as it is, as in hustvl/Vim

_STREAM = 1  # of uniform numbers; those of crops, flips and filters are stream 0


def training_crop(
    cfg: AugmentConfig | None,
    size: ImageSize,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    final_size: ImageSize | None = None,
) -> BoxCrop | SquareCrop:
    """The crop that a section of settings asks for (None: random resized crop), for inputs of `size` pixels.

    Args:
        scale, ratio: of :class:`RandomResizedCrop`.
        final_size: of a run whose inputs have `size` for a while, and are to be cropped as at the end; None: `size`.
    """
    final_size = final_size or size
    usual = RandomResizedCrop(scale, ratio)
    if cfg is None:
        return usual
    if cfg.src:
        return ShortSideCrop()
    if max(final_size) > LARGEST_PADDED or cfg.three_augment:
        return usual
    return PaddedCrop(of=None if size == final_size else final_size)


def evaluation_crop(size: ImageSize, ratio: float) -> CentreCrop:
    """The crop of evaluation, for inputs of `size` pixels: small images are evaluated as they are.

    Args:
        ratio: ``--eval-crop-ratio``, of larger ones.
    """
    return CentreCrop(1.0 if max(size) <= LARGEST_PADDED else ratio)


def jitter_strength(cfg: AugmentConfig) -> float:
    """How far colours are jittered; as in timm, not beside ``--aa``, except beside ThreeAugment's sets, in ``3a``."""
    policy = not cfg.three_augment and cfg.aa not in ("", "none")
    return 0.0 if policy and "3a" not in cfg.aa else cfg.color_jitter


def described(cfg: Config, final_size: ImageSize | None = None) -> list[str]:
    """What is done to training images beyond random resized crops and flips, a few words for each part.

    Args:
        final_size: as :func:`training_crop` has it.
    """
    augment, mix = cfg.augment, cfg.mix
    policy = "" if augment.aa == "none" else augment.aa
    crop = training_crop(augment, cfg.model.size, cfg.data.scale, cfg.data.ratio, final_size)
    padded = "padded crops of unresized images" if isinstance(crop, PaddedCrop) and crop.of is None else "padded crops"
    jitter = jitter_strength(augment)
    parts = [
        "three copies of each image" if cfg.data.repeated_aug else "",
        "simple random crops" if isinstance(crop, ShortSideCrop) else "",
        padded if isinstance(crop, PaddedCrop) else "",
        "ThreeAugment" if augment.three_augment else policy,
        f"colour jitter {jitter:g}" if jitter else "",
        f"erasing {augment.reprob:g}" if augment.reprob and not augment.three_augment else "",
        f"mixup {mix.mixup:g}" if mix.mixup else "",
        f"cutmix {mix.cutmix_minmax or f'{mix.cutmix:g}'}" if mix.cutmix or mix.cutmix_minmax else "",
    ]
    return [part for part in parts if part]


class Recipe:
    """The augmentation that a section of settings asks for, drawn from (seed, epoch, position) alone.

    With ``--ThreeAugment``, as in DeiT III and hustvl/Vim, ``--aa`` and erasing are ignored.

    Args:
        cfg: of the run; None: nothing but crops and flips.
        interpolation: of the training crops; warps use it too.

    Raises:
        UserError: a policy or a word of ``--aa`` that is not known.
    """

    def __init__(self, cfg: AugmentConfig | None, interpolation: Interpolation = "bicubic") -> None:
        self._policy: randaugment.RandAugment | None = None
        self._three, self._jitter, self._erasing = False, 0.0, Erasing(0.0)
        if cfg is None:
            return
        self._jitter = jitter_strength(cfg)
        if cfg.three_augment:
            self._three = True
            return
        self._policy = randaugment.policy(cfg.aa, interpolation)
        self._erasing = Erasing(cfg.reprob, cfg.remode, cfg.recount)

    def draw(
        self,
        seed: int,
        epoch: int,
        positions: np.ndarray,  # int64 [n]
        size: SizeLike,
        shift: np.ndarray | None = None,  # int32 [n, 2]: down, right
    ) -> Plan:
        """What is done to the images at these positions of an epoch after crop and flip.

        Args:
            size: of the images, pixels.
            shift: what a :class:`~vimfast.augment.crops.SquareCrop` leaves to do; mirrored where the image is.
        """
        size = ImageSize.of(size)
        wanted = [self._policy.columns if self._policy else 2 * self._three, 4 * (self._jitter > 0), 0]
        wanted[2] = self._erasing.columns if self._erasing.probability > 0 else 0
        u = uniforms(seed, epoch, positions, sum(wanted), _STREAM)
        main, jitter, erasing = np.split(u, np.cumsum(wanted[:2]), axis=1)
        operations, patches = [np.zeros((len(u), 0), OPERATION)], np.zeros((len(u), 0), PATCH)
        if shift is not None:
            operations.append(_shifts(shift))
        if self._policy:
            operations.append(self._policy.draw(main, size))
        if self._three:
            operations.append(randaugment.three_augment(main))
        if self._jitter > 0:
            operations.append(randaugment.color_jitter(jitter, self._jitter))
        if self._erasing.probability > 0:
            patches = self._erasing.draw(erasing, size)
        return Plan.of(np.concatenate(operations, axis=1), patches)


def _shifts(shift: np.ndarray) -> np.ndarray:  # OPERATION [n, 1]
    operations = np.zeros((len(shift), 1), OPERATION)
    operations["code"][:, 0] = np.where(shift.any(axis=1), Op.SHIFT, Op.NONE)
    operations["args"][:, 0, :2] = shift[:, ::-1]
    return operations

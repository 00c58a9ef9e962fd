"""Which augmentation a training picture gets: the kind of crop, and what is drawn to be done behind it."""

from __future__ import annotations

import numpy as np

from vimfast.config import AugmentConfig
from vimfast.data import augment, randaugment
from vimfast.data.erasing import Erasing
from vimfast_kernels.augment import OPERATION, PATCH, Op, Plan

LARGEST_PADDED = 32  # inputs up to this side are cut out of the padded picture as it is, as the original does

_STREAM = 1  # of uniform numbers; those of crops, flips and filters are stream 0


class Recipe:
    """The augmentation that a section of settings asks for, drawn from (seed, epoch, position) alone.

    ``--ThreeAugment`` stands for itself: as in DeiT III and the original code, neither ``--aa`` nor erasing applies.

    Args:
        cfg: of the run; None: crops and flips only.
        size: side of the pictures, pixels.
        interpolation: of the training crops; warps use it too.

    Attributes:
        crop: ``"resized"`` (:func:`~vimfast.data.augment.random_resized_crop`), ``"simple"`` or ``"padded"``.

    Raises:
        UserError: a policy or a word of ``--aa`` that is not known.
    """

    def __init__(self, cfg: AugmentConfig | None, size: int, interpolation: str = "bicubic") -> None:
        self.size, self.crop = size, "resized"
        self._policy: randaugment.RandAugment | None = None
        self._three, self._jitter, self._erasing = False, 0.0, Erasing(0.0)
        if cfg is None:
            return
        if cfg.src:
            self.crop = "simple"
        elif size <= LARGEST_PADDED and not cfg.three_augment:
            self.crop = "padded"
        aa = "" if cfg.aa == "none" else cfg.aa
        self._jitter = cfg.color_jitter
        if cfg.three_augment:
            self._three = True
            return
        if aa:
            self._policy = randaugment.parse(aa, interpolation)
            if "3a" not in aa:  # timm jitters colours behind the sets that are made after ThreeAugment, and only those
                self._jitter = 0.0
        self._erasing = Erasing(cfg.reprob, cfg.remode, cfg.recount)

    def draw(
        self,
        seed: int,
        epoch: int,
        positions: np.ndarray,  # int64 [n]
        shift: np.ndarray | None = None,  # int32 [n, 2]: down, right
    ) -> Plan:
        """What is done to the pictures at these positions of an epoch, behind crop and flip.

        Args:
            shift: what :func:`~vimfast.data.augment.simple_crop` leaves to do; mirrored where the picture is.
        """
        wanted = [self._policy.columns if self._policy else 2 * self._three, 4 * (self._jitter > 0), 0]
        wanted[2] = self._erasing.columns if self._erasing.probability > 0 else 0
        u = augment.uniforms(seed, epoch, positions, sum(wanted), _STREAM)
        main, jitter, erasing = np.split(u, np.cumsum(wanted[:2]), axis=1)
        operations, patches = [np.zeros((len(u), 0), OPERATION)], np.zeros((len(u), 0), PATCH)
        if shift is not None:
            operations.append(_shifts(shift))
        if self._policy:
            operations.append(self._policy.draw(main, self.size))
        if self._three:
            operations.append(randaugment.three_augment(main))
        if self._jitter > 0:
            operations.append(randaugment.color_jitter(jitter, self._jitter))
        if self._erasing.probability > 0:
            patches = self._erasing.draw(erasing, self.size)
        return Plan.of(np.concatenate(operations, axis=1), patches)


def _shifts(shift: np.ndarray) -> np.ndarray:  # OPERATION [n, 1]
    operations = np.zeros((len(shift), 1), OPERATION)
    operations["code"][:, 0] = np.where(shift.any(axis=1), Op.SHIFT, Op.NONE)
    operations["args"][:, 0, :2] = shift[:, ::-1]
    return operations

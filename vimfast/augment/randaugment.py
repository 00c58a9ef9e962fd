"""RandAugment from timm's strings, ThreeAugment and colour jitter: drawn here, carried out by vimfast.augment.pixels.

A drawn change is an array of OPERATION (see :mod:`vimfast.augment.plan`), one row per image, NONE where nothing is
done. Ranges, probabilities and roundings are those of timm 1.0.31 (``timm/data/auto_augment.py``).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vimfast.augment.plan import OPERATION, Op
from vimfast.config.choices import Interpolation
from vimfast.errors import UserError
from vimfast.image_size import ImageSize

_FULL_LEVEL = 10  # magnitudes are in tenths of an operation's range
_PLAIN = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
_HAS_INCREASING = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
_INCREASING = tuple(f"{name}Increasing" if name in _HAS_INCREASING else name for name in _PLAIN)
_THREE = ("SolarizeIncreasing", "Desaturate", "GaussianBlur")
_THREE_WEIGHTED = {
    **dict.fromkeys(_THREE, 6.0),
    "Rotate": 3.0, "ShearX": 2.0, "ShearY": 2.0, "PosterizeIncreasing": 1.0, "AutoContrast": 1.0,
    "ColorIncreasing": 1.0, "SharpnessIncreasing": 1.0, "ContrastIncreasing": 1.0, "BrightnessIncreasing": 1.0,
    "Equalize": 1.0, "Invert": 1.0,
}  # fmt: skip
_WEIGHTED = {
    "Rotate": 3.0, "ShearX": 2.0, "ShearY": 2.0, "TranslateXRel": 1.0, "TranslateYRel": 1.0, "ColorIncreasing": 0.25,
    "SharpnessIncreasing": 0.25, "AutoContrast": 0.25, "SolarizeIncreasing": 0.05, "SolarizeAdd": 0.05,
    "ContrastIncreasing": 0.05, "BrightnessIncreasing": 0.05, "Equalize": 0.05, "PosterizeIncreasing": 0.05,
    "Invert": 0.05,
}  # fmt: skip
_SETS: dict[str, tuple[str, ...] | dict[str, float]] = {"3a": _THREE, "3aw": _THREE_WEIGHTED, "weights": _WEIGHTED}
_NO_WEIGHT_IN_W0 = ("PosterizeIncreasing", "Invert")

# Of a layer: which operation, whether, two for the normal magnitude, sign, filter.
CHOICE, APPLY, NOISE, ANGLE, SIGN, FILTER = range(6)
COLUMNS_PER_LAYER = 6

BLUR_SLOTS = 6  # three running means in either direction are Pillow's GaussianBlur


@dataclass(frozen=True)
class RandAugment:
    """`layers` operations of a set, one after the other, each applied with `probability`.

    Args:
        names: of the set.
        weights: how likely each is drawn, without replacement; None: uniformly, with replacement.
        magnitude: in tenths of an operation's range.
        deviation: of the normal noise on the magnitude; infinite: uniform in [0, magnitude].
        ceiling: magnitudes are clipped to [0, ceiling].
        interpolation: of warps.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    magnitude: float = _FULL_LEVEL
    layers: int = 2
    probability: float = 0.5
    deviation: float = 0.0
    ceiling: float = _FULL_LEVEL
    interpolation: Interpolation = "bicubic"

    @property
    def columns(self) -> int:
        """Uniform numbers that an image needs."""
        return self.layers * COLUMNS_PER_LAYER

    def draw(
        self,
        u: np.ndarray,  # float64 [n, columns]
        size: ImageSize,
    ) -> np.ndarray:  # OPERATION [n, any]
        """What is done to images of this size."""
        u = u.reshape(len(u), self.layers, COLUMNS_PER_LAYER)
        chosen = self.choose(u[:, :, CHOICE])
        level = self.magnitudes(u) / _FULL_LEVEL
        sign = np.where(u[:, :, SIGN] > 0.5, -1.0, 1.0)
        slots = BLUR_SLOTS if "GaussianBlur" in self.names else 1
        operations = np.zeros((len(u), self.layers, slots), OPERATION)
        operations["cubic"] = {"bicubic": 1, "bilinear": 0}.get(self.interpolation, u[:, :, FILTER, None] >= 0.5)
        applied = u[:, :, APPLY] <= self.probability
        for i in np.unique(chosen[applied]):
            where = applied & (chosen == i)
            part = operations[where]
            _BUILDERS[self.names[i]](part, level[where], sign[where], size)
            operations[where] = part
        return operations.reshape(len(u), -1)

    def choose(self, u: np.ndarray) -> np.ndarray:  # [n, layers] in [0, 1) -> int [n, layers], positions in `names`
        """The operations drawn."""
        if self.weights is None:
            return (u * len(self.names)).astype(np.int64)
        weights = np.tile(self.weights, (len(u), 1))
        chosen = np.empty(u.shape, np.int64)
        for layer in range(self.layers):
            reach = weights.cumsum(axis=1)
            below = (reach <= u[:, [layer]] * reach[:, -1:]).sum(axis=1)
            chosen[:, layer] = np.minimum(below, len(self.names) - 1)
            np.put_along_axis(weights, chosen[:, [layer]], 0.0, axis=1)
        return chosen

    def magnitudes(self, u: np.ndarray) -> np.ndarray:  # [n, layers, COLUMNS_PER_LAYER] -> [n, layers]
        """The magnitude of each."""
        if self.deviation == np.inf:
            magnitude = u[:, :, NOISE] * self.magnitude
        else:
            magnitude = self.magnitude + self.deviation * normal(u[:, :, NOISE], u[:, :, ANGLE])
        return magnitude.clip(0, self.ceiling)


def normal(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Normal numbers from two independent uniform ones each, by the transform of Box and Muller."""
    drawn: np.ndarray = np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)
    return drawn


def policy(words: str, interpolation: Interpolation = "bicubic") -> RandAugment | None:
    """What ``--aa`` asks for; ``none`` and nothing ask for none.

    Raises:
        UserError: as :func:`parse`.
    """
    return None if words in ("", "none") else parse(words, interpolation)


def parse(text: str, interpolation: Interpolation = "bicubic") -> RandAugment:
    """``"rand-m9-mstd0.5-inc1"`` as timm parses it; the words are explained at :data:`_WORDS`.

    Raises:
        UserError: another policy, an unknown word, or a value out of its range.
    """
    kind, *words = text.split("-")
    if kind != "rand":
        raise UserError(
            f"--aa is {text!r} and of timm's policies only RandAugment is built in; "
            "write rand-m9-mstd0.5-inc1, or none for no such augmentation"
        )
    given: dict[str, Any] = {}
    for word in words:
        key = "t" if word.startswith("t") else re.split(r"[\d.]", word)[0]
        if key not in _WORDS:
            raise UserError(f"--aa {text}: unknown option {word!r}; the known ones are {', '.join(_WORDS)}")
        read, meaning = _WORDS[key]
        try:
            given[key] = read(word.removeprefix(key))
        except ValueError:
            raise UserError(f"--aa {text}: cannot read {word!r}; {key} is {meaning}") from None
    increasing = given.get("inc", False)
    drawn: tuple[str, ...] | dict[str, float] = given.get("t", _INCREASING if increasing else _PLAIN)
    if "w" in given:
        drawn = {
            name if increasing else name.removesuffix("Increasing"): weight
            for name, weight in _WEIGHTED.items()
            if name not in _NO_WEIGHT_IN_W0
        }
    layers = given.get("n", 2)
    if isinstance(drawn, dict) and layers > len(drawn):
        raise UserError(f"--aa {text}: {layers} of {len(drawn)} operations, none twice; lower n")
    return RandAugment(
        names=tuple(drawn),
        weights=tuple(drawn.values()) if isinstance(drawn, dict) else None,
        magnitude=given.get("m", _FULL_LEVEL),
        layers=layers,
        probability=given.get("p", 0.5),
        deviation=given.get("mstd", 0.0),
        ceiling=given.get("mmax", _FULL_LEVEL) or _FULL_LEVEL,
        interpolation=interpolation,
    )


def _whole(least: int, most: float = np.inf) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise ValueError
        return value

    return read


def _probability(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise ValueError
    return value


def _deviation(text: str) -> float:
    value = float(text)
    return np.inf if value > 100 else value


def _operation_set(text: str) -> tuple[str, ...] | dict[str, float]:
    if text not in _SETS:
        raise ValueError
    return _SETS[text]


_WORDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "m": (_whole(0), "the magnitude, an integer, by default 10"),
    "n": (_whole(1), "the number of operations per image, >= 1, by default 2"),
    "p": (_probability, "the probability of applying each, 0 to 1, by default 0.5"),
    "mstd": (_deviation, "the standard deviation of the magnitude, by default 0; above 100: uniform from 0 to m"),
    "mmax": (_whole(0), "the largest magnitude, an integer, by default 10"),
    "inc": (_whole(0, 1), "1 for operations that change more at a higher magnitude, by default 0"),
    "t": (_operation_set, f"the set of operations, one of {', '.join(_SETS)}"),
    "w": (_whole(0, 0), "0, for the weights of timm 0.4 (now tweights, which adds Posterize and Invert)"),
}


def three_augment(u: np.ndarray) -> np.ndarray:  # float64 [n, 2] -> OPERATION [n, BLUR_SLOTS]
    """Grey, solarized from 128 on, or blurred by a Gaussian of deviation 0.1 to 2 pixels: each in a third of all.

    As in DeiT III (Touvron et al., 2022).
    """
    operations = np.zeros((len(u), BLUR_SLOTS), OPERATION)
    chosen = (u[:, 0] * 3).astype(np.int64)
    operations["code"][chosen == 0, 0] = Op.COLOR
    operations["code"][chosen == 1, 0] = Op.SOLARIZE
    operations["args"][chosen == 1, 0, 0] = 128
    blurred = operations[chosen == 2]
    _blur(blurred, 0.1 + 1.9 * u[chosen == 2, 1])
    operations[chosen == 2] = blurred
    return operations


def color_jitter(u: np.ndarray, strength: float) -> np.ndarray:  # float64 [n, 4] -> OPERATION [n, 3]
    """Brightness, contrast and saturation times a factor in 1 +- `strength` (>= 0), in random order.

    As torchvision's ``ColorJitter``.
    """
    kinds = np.array(list(itertools.permutations((Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR))))
    low = max(0.0, 1 - strength)
    operations = np.zeros((len(u), 3), OPERATION)
    operations["code"] = kinds[(u[:, 0] * len(kinds)).astype(np.int64)]
    operations["args"][:, :, 0] = low + (1 + strength - low) * u[:, 1:4]
    return operations


Builder = Callable[[np.ndarray, np.ndarray, np.ndarray, ImageSize], None]


def _simple(op: Op, argument: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None) -> Builder:
    """Writes `op` with the argument that follows from the level (magnitude / 10) and the sign."""

    def build(operations: np.ndarray, level: np.ndarray, sign: np.ndarray, size: ImageSize) -> None:
        operations["code"][:, 0] = op
        if argument is not None:
            operations["args"][:, 0, 0] = argument(level, sign)

    return build


def _warp(place: int, reach: float, of: Callable[[ImageSize], int] = lambda size: 1) -> Builder:
    """Writes the unit matrix with a signed level times `reach` (of a side, or of 1) at `place`."""

    def build(operations: np.ndarray, level: np.ndarray, sign: np.ndarray, size: ImageSize) -> None:
        operations["code"][:, 0] = Op.AFFINE
        operations["args"][:, 0] = (1, 0, 0, 0, 1, 0)
        operations["args"][:, 0, place] = sign * (level * reach) * of(size)

    return build


def _rotate(operations: np.ndarray, level: np.ndarray, sign: np.ndarray, size: ImageSize) -> None:
    """About the image's centre, as Pillow's ``rotate`` has it."""
    angle = -np.radians(sign * (level * 30) % 360)
    cos, sin = np.cos(angle).round(15), np.sin(angle).round(15)
    x, y = size.width / 2, size.height / 2
    operations["code"][:, 0] = Op.AFFINE
    right, down = cos * -x + sin * -y + x, -sin * -x + cos * -y + y
    operations["args"][:, 0] = np.stack([cos, sin, right, -sin, cos, down], axis=1)


def _blur(operations: np.ndarray, deviation: np.ndarray) -> None:
    """Three running means either way, of the radius whose variance is the Gaussian's.

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering", 2011; in float32, as
    Pillow computes it.
    """
    variance = deviation.astype(np.float32) ** 2 / np.float32(3)
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    operations["code"][:, :3], operations["code"][:, 3:] = Op.BOX_X, Op.BOX_Y
    operations["args"][:, :, 0] = (whole + part)[:, None]


def _gaussian_blur(operations: np.ndarray, level: np.ndarray, sign: np.ndarray, size: ImageSize) -> None:
    _blur(operations, (0.1 + 1.9 * level).clip(0.1, 2.0))


def _mildly(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return level * 1.8 + 0.1


def _increasingly(level: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return np.maximum(0.1, 1 + sign * (level * 0.9))


_BUILDERS: dict[str, Builder] = {
    "AutoContrast": _simple(Op.AUTOCONTRAST),
    "Equalize": _simple(Op.EQUALIZE),
    "Invert": _simple(Op.INVERT),
    "Rotate": _rotate,
    "Posterize": _simple(Op.POSTERIZE, lambda level, sign: np.trunc(level * 4).clip(0, 8)),
    "PosterizeIncreasing": _simple(Op.POSTERIZE, lambda level, sign: (4 - np.trunc(level * 4)).clip(0, 8)),
    "Solarize": _simple(Op.SOLARIZE, lambda level, sign: np.trunc(level * 256).clip(0, 256)),
    "SolarizeIncreasing": _simple(Op.SOLARIZE, lambda level, sign: 256 - np.trunc(level * 256).clip(0, 256)),
    "SolarizeAdd": _simple(Op.SOLARIZE_ADD, lambda level, sign: np.trunc(level * 110).clip(0, 128)),
    **{
        f"{name}{suffix}": _simple(op, factor)
        for name, op in {
            "Color": Op.COLOR,
            "Contrast": Op.CONTRAST,
            "Brightness": Op.BRIGHTNESS,
            "Sharpness": Op.SHARPNESS,
        }.items()
        for suffix, factor in {"": _mildly, "Increasing": _increasingly}.items()
    },
    "ShearX": _warp(1, 0.3),
    "ShearY": _warp(3, 0.3),
    "TranslateXRel": _warp(2, 0.45, of=lambda size: size.width),
    "TranslateYRel": _warp(5, 0.45, of=lambda size: size.height),
    "Desaturate": _simple(Op.COLOR, lambda level, sign: (0.5 - 0.5 * level).clip(0, 0.5)),
    "GaussianBlur": _gaussian_blur,
}

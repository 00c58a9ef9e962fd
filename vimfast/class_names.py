"""Names of classes that a person can read."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WNID = re.compile(r"n\d{8}")


def english_names(classes: Sequence[str]) -> list[str]:
    """``"tench"`` for ``"n01440764"``, a name of WordNet's that ImageNet uses; any other class is called what it is."""
    wanted = {name for name in classes if _WNID.fullmatch(name)}
    if not wanted:
        return list(classes)
    from timm.data.imagenet_info import ImageNetInfo  # here, for importing timm takes seconds

    known = ImageNetInfo()
    wnids = set(known.label_names())
    if not wanted <= wnids:
        known = ImageNetInfo("imagenet-22k")
        wnids = set(known.label_names())
    return [known.label_name_to_description(name).split(",")[0] if name in wnids else name for name in classes]


def are_imagenets(classes: Sequence[str]) -> bool:
    """Whether all are named as ImageNet names its classes, by WordNet's numbers."""
    return all(_WNID.fullmatch(name) for name in classes)


def imagenet_classes() -> list[str]:
    """The 1,000 of ImageNet-1k in the order of their numbers."""
    from timm.data.imagenet_info import ImageNetInfo

    return list(ImageNetInfo().label_names())

"""Whether a run continues what its checkpoint began: the same classes, and inside an epoch the same order of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vimfast.config import Config, stage_of
from vimfast.errors import UserError

State = Mapping[str, Any]

_ORDER_VERSION = 2


def check_classes(classes: Sequence[str], wanted: int | None, state: State | None, origin: str, data: str) -> None:
    """Whether data, flags and checkpoint are of the same classes.

    Raises:
        UserError: there is only one, their numbers differ, or the names in the checkpoint, if it has any.
    """
    count = len(classes)
    if count < 2:
        raise UserError(f"{data} has one class, {classes[0]!r}", "give a --data-path with two or more")
    if wanted is not None and wanted != count:
        raise UserError(f"--num-classes is {wanted} and the data has {count} classes", "drop the flag")
    head = state["model"].get("head.weight") if state is not None else None
    fix = "point --data-path at the data it belongs to"
    if head is not None and len(head) != count:
        raise UserError(f"{origin} was trained on {len(head)} classes and {data} has {count}", fix)
    names = state.get("classes") if state is not None else None
    for number, (there, here) in enumerate(zip(names or (), classes, strict=False)):
        if there != here:
            raise UserError(
                f"{origin} was trained on other classes: class {number} is {there!r} there and {here!r} in {data}", fix
            )


def check_every_class(classes: Sequence[str], counts: np.ndarray, data: str) -> None:
    """Whether each class has training images: one without is never learned, and mostly a download that failed.

    Args:
        counts: int64 [classes], of the training images.

    Raises:
        UserError: one has none.
    """
    if empty := np.flatnonzero(counts == 0).tolist():
        others = f" ({len(empty)} of {len(classes)} classes have none)" if len(empty) > 1 else ""
        raise UserError(
            f"class {classes[empty[0]]!r} of {data} has no training images{others}",
            "add them, or delete its folders in train/ and val/ (and convert again, if these are shards)",
        )


def order_version(computed: bool | None) -> int:
    """What a checkpoint says of a run's order (``Order.computed``): 1 where permutations are drawn whatever their size,
    as all were before there were others."""
    return 1 if computed is False else _ORDER_VERSION


def computed_as_in(state: State | None) -> bool | None:
    """``Order.computed`` of a run that continues this checkpoint, so that its images come in the order that it began
    with."""
    begun = state is not None and "optimizer" in state
    return False if begun and (state or {}).get("order_version", 1) < _ORDER_VERSION else None


def order_changes(state: State, cfg: Config, images: str) -> list[str]:
    """What makes the images of this run come in another order than the checkpoint's, in its epoch; a phrase each.

    Args:
        images: :attr:`~vimfast.data.source.Source.identity` of those that this run trains on.
    """
    changes = []
    if state.get("images", images) != images:
        changes.append(f"{cfg.data.data_path} holds other images, or in another order")
    before = state.get("config") or {}
    epoch = int(state.get("epoch", 0))
    then, now = (
        {**d.get("data", {}), **d.get("run", {}), **stage_of(d.get("schedule", {}), epoch)}
        for d in (before, cfg.to_dict())
    )
    for name in ("seed", "repeated_aug", "order", "order_window"):
        if name not in then or then[name] == now[name]:
            continue
        if name != "order_window" or "permutation" not in (then["order"], now["order"]):
            changes.append(f"{_flag(name, now[name])} was {_flag(name, then[name])}")
    return changes


def check_order(changes: Sequence[str], place: str, epoch: int) -> None:
    """In mid-epoch, the order must be the checkpoint's.

    Raises:
        UserError: it is not.
    """
    if changes:
        raise UserError(
            f"the checkpoint stands at {place}, and {' and '.join(changes)}: images would be repeated or missed",
            f"keep that as it was, or repeat the epoch with --start-epoch {epoch}",
        )


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"

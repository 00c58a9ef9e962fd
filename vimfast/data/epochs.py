"""What a training loop expects of a loader: a length, one epoch for each iteration, and a place that can be saved."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from vimfast.data.order import Order
from vimfast.data.source import Source
from vimfast.data.views import Batch
from vimfast.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self


_OPEN_THERE = "open one in the process that uses it (it reads ahead by itself, without torch's DataLoader)"


class EpochStep(NamedTuple):
    """A batch, by its numbers."""

    epoch: int
    step: int


class Epochs(ABC):
    """The part of a loader that loops of other people call; what it is made of is :class:`~vimfast.data.loader.Loader`.

    ``for images, labels in loader`` is one epoch, and the next such loop is the next epoch, with crops and an order of
    its own. :meth:`state_dict` is the place of the next batch, the same on every rank: two numbers, since the images
    and all that is drawn for them are functions of it. After :meth:`load_state_dict` the first loop is the rest of the
    epoch that was left.
    """

    source: Source
    order: Order
    _begins = EpochStep(0, 0)  # the next loop
    _place = EpochStep(0, 0)

    def __init__(self) -> None:
        self._process = os.getpid()

    @abstractmethod
    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on."""

    @abstractmethod
    def close(self) -> None:
        """Let go of threads and memory."""

    def __len__(self) -> int:
        """Steps in an epoch, the same on every rank."""
        return self.order.steps

    @property
    def place(self) -> EpochStep:
        """The next batch, of loops over the loader; at the end of an epoch it is the first one of the next."""
        return self._place

    def __iter__(self) -> Iterator[Batch]:
        """The next epoch, or what is left of one whose place was loaded."""
        epoch, start = self._begins
        self._begins = EpochStep(epoch + 1, 0)
        for done, batch in enumerate(self.epoch(epoch, start), start + 1):
            self._place = EpochStep(epoch, done) if done < len(self) else self._begins
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place of the next batch, and what the order of images depends on; numbers and strings alone."""
        return {**self._place._asdict(), **self._ordered_by()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the place of a :meth:`state_dict`.

        Raises:
            UserError: it is not one, or stands in mid-epoch and this loader has other images or another order, so that
                some would be repeated and some missed.
        """
        epoch, step = state.get("epoch"), state.get("step")
        if not isinstance(epoch, int) or not isinstance(step, int) or min(epoch, step) < 0:
            raise UserError(f"{dict(state)} is not the state of a loader", "take what its state_dict() returned")
        own = self._ordered_by().items()
        changes = [f"{name} was {state.get(name)!r} and is {now!r}" for name, now in own if state.get(name) != now]
        if step and changes:
            raise UserError(
                f"the loader's state is of epoch {epoch}, step {step}, and {', '.join(changes)}: images would be "
                "repeated or missed",
                "keep that as it was, or begin at the end of an epoch",
            )
        self._begins = self._place = EpochStep(epoch, step)

    def _ordered_by(self) -> dict[str, Any]:
        order = self.order
        return {
            "images": self.source.identity,
            "seed": order.seed,
            "global_batch": order.global_batch,
            "repeats": order.repeats,
            "window": None if order.bounds is None else order.window,
        }

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise UserError(
                "this loader was opened in another process, whose threads a fork does not take along", _OPEN_THERE
            )

    def __getstate__(self) -> Any:
        """What pickle and copy ask for."""
        raise UserError("a loader has threads and memory of its own and is neither copied nor sent", _OPEN_THERE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

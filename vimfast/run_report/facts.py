"""``report.json``: what a page about a run shows and no other file of its folder says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from vimfast.errors import UserError
from vimfast.files import atomic_write, read_file

FACTS = "report.json"

Count = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class Pace(Struct, frozen=True):
    """How fast an epoch was: images a second of all processes, and the share of the time spent waiting for data."""

    epoch: Count
    images_per_second: Annotated[float, Meta(ge=0)]
    data_share: Share


class Hard(Struct, frozen=True):
    """A validation image, and what the model saw in it.

    `file` is where it lies, `label` its class, `label_probability` what the model gave that class, `guess` the most
    probable one, `thumbnail` a JPEG, None where the image could not be read again.
    """

    file: str
    label: str
    label_probability: Share
    guess: str
    guess_probability: Share
    thumbnail: bytes | None


class Confused(Struct, frozen=True):
    """Of the `of` validation images of class `label`, `images` were taken for `guess`."""

    label: str
    guess: str
    images: Count
    of: Count


class Mistakes(Struct, frozen=True):
    """The mistakes of an evaluation of the trained weights, after `epoch`, on `images`, of which `wrong` were taken for
    another class. `hardest` are the images whose class got the least probability."""

    epoch: Count
    images: Count
    wrong: Count
    hardest: list[Hard]
    confused: list[Confused]


class Facts(Struct, frozen=True):
    """All of them. Those that a later vimfast adds are ignored.

    Attributes:
        processes: of the run.
        plan: the lines that the run began with: what, and how.
        software: what it ran on: what, and which.
        classes: of its images; None: an earlier vimfast did not say.
        stopped: where the run was told to stop; None: it was not, or was resumed.
        pace: of each epoch since the run began in this folder.
        mistakes: of the last evaluation.
    """

    processes: Annotated[int, Meta(ge=1)]
    plan: list[tuple[str, str]]
    software: list[tuple[str, str]]
    classes: Annotated[int, Meta(ge=1)] | None = None
    stopped: str | None = None
    pace: list[Pace] = []
    mistakes: Mistakes | None = None


def read_facts(folder: Path) -> Facts | None:
    """The facts of a run folder; None: it has none.

    Raises:
        UserError: they cannot be read, or are damaged.
    """
    path = folder / FACTS
    try:
        return msgspec.json.decode(read_file(path), type=Facts)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "fix its permissions, or the disk") from None
    except ValueError as error:  # msgspec's among them
        raise UserError(f"{path} is damaged ({error})", "delete it; the next epoch writes it again") from None


def write_facts(folder: Path, facts: Facts) -> None:
    """Write them, atomically.

    Raises:
        OSError: they cannot be written.
    """
    with atomic_write(folder / FACTS, durable=False) as file:
        file.write(msgspec.json.encode(facts))

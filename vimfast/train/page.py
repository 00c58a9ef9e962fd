"""``report.html``, which a run writes beside its records."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import numpy as np
import torch
from msgspec.structs import replace

from vimfast.class_names import english_names
from vimfast.data.source import Source
from vimfast.dist import World
from vimfast.errors import UserError, printable
from vimfast.pages import thumbnail
from vimfast.run_report import (
    PAGE,
    Confused,
    Facts,
    Hard,
    Mistakes,
    Pace,
    read_facts,
    render_page,
    write_facts,
    write_page,
)
from vimfast.run_report.environment import software
from vimfast.run_report.mistakes import confused, hardest
from vimfast.train.answers import Answered, Answers
from vimfast.train.folder import RunFolder
from vimfast.train.loop import EpochEnd, Hook, Place, TrainingRun
from vimfast.train.pace import Spent

_HARDEST, _CONFUSED = 24, 12
_PATIENCE = 10.0  # seconds that a run which fails waits for its page


class RunPage(Hook):
    """Writes the page of a run after each epoch, and where the run is told to stop.

    A thread of rank 0 does it while training continues; nothing that goes wrong there ends the run. Facts of the epochs
    before a resumed run are taken from its folder.

    Args:
        folder: of the run, whose records are written before this hook's turn.
        data_path: where the images are; files are named relative to it.
    """

    def __init__(self, run: TrainingRun, folder: RunFolder, data_path: str) -> None:
        self._run, self._held, self._folder, self._data_path = run, folder, folder.path, data_path
        self._answers = run.evaluated.answers = Answers()
        self._facts: Facts | None = None  # of the thread alone
        self._thread = ThreadPoolExecutor(1, "page")
        self._work: Future[None] | None = None
        self._submitted, self._warned = 0, False

    def epoch_begin(self, place: Place) -> None:
        if self._submitted == 0:
            self._submit(partial(self._begin, place.epoch))

    def epoch_end(self, place: Place, end: EpochEnd) -> None:
        self._submit(partial(self._epoch, end.epoch, self._run.pace.spent, self._answers.last if end.scores else None))
        if place.epoch + 1 == self._run.epochs:
            self._run.report.say(f"curves, hardest images and settings are in {self._folder / PAGE}")

    def stopped(self, place: Place) -> None:
        self._submit(partial(self._stop, str(place)))

    def close(self, failing: bool) -> None:
        if self._work is not None:
            wait([self._work], _PATIENCE if failing else None)
        self._thread.shutdown(wait=False)

    def _submit(self, change: Callable[[], None]) -> None:
        if self._run.world.is_main:
            self._submitted += 1
            self._work = self._thread.submit(self._update, change, self._submitted)

    # In the thread

    def _update(self, change: Callable[[], None], number: int) -> None:
        try:
            change()
            facts = self._facts
            # If another change follows, its page will do.
            if facts is not None and facts.mistakes is not None and number == self._submitted and self._held.is_ours():
                write_facts(self._folder, facts)
                page = render_page(self._folder)
                if self._held.is_ours():  # rendering takes long enough for the folder to become another run's
                    write_page(self._folder, page)
        except Exception as error:  # whatever it is, training matters more
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            why = (
                error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
            )
            self._run.report.warn(f"report.html in {self._folder} cannot be written ({why}); the run continues")

    def _begin(self, epoch: int) -> None:
        world = self._run.world
        classes = len(self._run.evaluated.loader.source.classes)
        facts = Facts(world.size, list(self._run.plan), [*software(), ("device", _device(world))], classes)
        try:
            before = read_facts(self._folder)
        except UserError as error:
            before = None
            self._run.report.warn(f"{error.problem}; the report has no speed of the epochs before {epoch}")
        if before is not None:
            pace = [pace for pace in before.pace if pace.epoch < epoch]
            found = before.mistakes if before.mistakes is not None and before.mistakes.epoch < epoch else None
            facts = replace(facts, pace=pace, mistakes=found)
        self._facts = facts

    def _epoch(self, epoch: int, spent: Spent, answered: Answered | None) -> None:
        if self._facts is None:  # a run that resumes in an evaluation begins with it
            self._begin(epoch)
        assert self._facts is not None
        pace = [pace for pace in self._facts.pace if pace.epoch < epoch]  # those behind were rolled back
        if spent.seconds > 0:
            pace.append(Pace(epoch, spent.images / spent.seconds, min(spent.waited / spent.seconds, 1.0)))
        found = self._facts.mistakes if answered is None else self._mistakes(epoch, answered)
        self._facts = replace(self._facts, pace=pace, mistakes=found, stopped=None)

    def _stop(self, place: str) -> None:
        if self._facts is not None:
            self._facts = replace(self._facts, stopped=place)

    def _mistakes(self, epoch: int, answered: Answered) -> Mistakes:
        source = self._run.evaluated.loader.source
        labels, names = source.labels[answered.ids], [printable(name) for name in english_names(source.classes)]
        return Mistakes(
            epoch,
            len(labels),
            int((labels != answered.guesses).sum()),
            [self._hard(source, names, answered, place) for place in hardest(answered.own, answered.ids, _HARDEST)],
            [
                Confused(names[pair.label], names[pair.guess], pair.images, pair.of)
                for pair in confused(labels, answered.guesses, _CONFUSED)
            ],
        )

    def _hard(self, source: Source, names: list[str], answered: Answered, place: int) -> Hard:
        i = int(answered.ids[place])
        try:
            shown = thumbnail(source.read(np.array([i])).encoded[0].tobytes())
        except UserError:
            shown = None
        return Hard(
            printable(source.name(i).removeprefix(self._data_path).lstrip("/")),
            names[source.labels[i]],
            _share(answered.own[place]),
            names[answered.guesses[place]],
            _share(answered.probabilities[place]),
            shown,
        )


def _share(value: np.floating) -> float:
    return min(float(value), 1.0)  # a softmax may exceed it by a rounding


def _device(world: World) -> str:
    if world.device.type != "cuda":
        return f"{world.size} x CPU"
    return f"{world.size} x {torch.cuda.get_device_name(world.device)}"

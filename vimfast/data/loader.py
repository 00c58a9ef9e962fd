"""Source + view -> batches: what the trainer and the evaluation iterate over.

A background thread reads the batches to come and draws what is done to them, DALI's threads (and the GPU) decode them,
and the caller's thread only takes finished ones.
"""

from __future__ import annotations

import gc
import itertools
import os
import queue
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from vimfast.augment.threads import Threads
from vimfast.config.choices import Decoder, OnBadImage
from vimfast.data import decoding
from vimfast.data.decoding import DecodeError, Graph, GraphSettings
from vimfast.data.dropping import closer
from vimfast.data.epochs import Epochs
from vimfast.data.hardware import Decoding, Demand, choose_decoding, next_decoder
from vimfast.data.order import Order
from vimfast.data.reader import Reader
from vimfast.data.source import Source
from vimfast.data.views import Batch, View, Work
from vimfast.errors import UserError, counted, lacks_memory


@dataclass(frozen=True)
class LoaderSettings:
    """How a loader works; none of it changes the batches.

    Args:
        decoder: ``"auto"`` (:func:`choose_decoding`), ``"hardware"`` (the GPU's JPEG engine, and its ordinary cores for
            the rest), ``"cuda"`` or ``"cpu"``.
        threads: decoding threads; default: as many as help, of the cores this process may use.
        prefetch: batches decoded ahead.
        readahead: batches read ahead of those.
        steps_at_once: batches that DALI decodes together; default: what fits the decoder.
        engine_share: of the images, for the JPEG engine; default: what fits the GPU and the threads.
        on_bad_image: ``"stop"`` at an image that does not decode, or ``"skip"`` it (:class:`Reader`).
        stop: for ``"stop"``: called with the error, in whatever thread, instead of raising it. Until the caller has
            stopped, other images stand in for those that cannot be used.
        report: called for each image skipped; default: a warning on stderr.
    """

    decoder: Decoder = "auto"
    threads: int | None = None
    prefetch: int = 3
    readahead: int = 4
    steps_at_once: int | None = None
    engine_share: float | None = None
    on_bad_image: OnBadImage = "stop"
    stop: Callable[[UserError], None] | None = None
    report: Callable[[str], None] | None = None


class Loader(Epochs):
    """Batches of one rank, in the order of `view.order`.

    A training loader reads on over epoch ends: asking for the next epoch continues without a pause, asking for any
    other place (a resumed run) starts the stream there. An evaluation loader pauses at the end of the epoch; its last
    batch may be short, and a rank for which nothing is left has fewer batches than ``steps``.

    Batches stay valid for as long as they are held.

    Args:
        source: the images.
        view: which of them come when, and what is made of them.
        settings: how it works.

    Raises:
        UserError: training images that do not fill one step, or a setting out of its range.
    """

    def __init__(self, source: Source, view: View, settings: LoaderSettings | None = None) -> None:
        super().__init__()
        _check_fills_a_step(view)
        self.source, self.view, self.order = source, view, view.order
        self.device = view.device
        if self.device == torch.device("cuda"):
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._wanted = wanted = settings or LoaderSettings()
        self._demand = Demand(view.most, view.order.batch_size, None, source.mean_bytes) if view.training else None
        self._decode_by(choose_decoding(wanted.decoder, wanted.threads, self.device, self._demand))
        skip = wanted.on_bad_image == "skip"
        self._reader = Reader(source, skip=skip, stand_in=view.training, stop=wanted.stop, report=wanted.report)
        self._graph: Graph | None = None  # built with the first epoch
        self._threads = Threads(self._settings.threads)
        self._ahead: _ReadAhead | None = None
        self._in_work: deque[list[Work]] = deque()  # oldest first: what DALI holds, batches that it decodes together
        self._decoded: deque[tuple[Work, Any]] = deque()  # oldest first: batches, and what is decoded for them
        self._next_place: tuple[int, int] | None = None  # (epoch, step) to be handed out next
        self._owner = object()  # the iterator that may take batches
        # What is done to a batch here runs beside the step that the GPU is still busy with, not after it.
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # When the last batch was asked for and was ready, on a GPU; with timing.
        self.asked: torch.cuda.Event | None = None
        self.ready: torch.cuda.Event | None = None
        self._beginning: threading.Thread | None = None
        self.read_waits = 0.0  # seconds in which decoding had no bytes to begin on
        self._closer = closer(self._process)  # last: whoever has it has all that is to be closed

    # Decoder

    def _decode_by(self, chosen: Decoding) -> None:
        wanted = self._wanted
        self._steps_at_once = wanted.steps_at_once or chosen.steps_at_once
        self._settings = GraphSettings(
            batch_size=self._steps_at_once * self.view.most,
            device=self.device,
            threads=chosen.threads,
            prefetch=wanted.prefetch,
            decoder=chosen.decoder,
            engine_share=chosen.engine_share if wanted.engine_share is None else wanted.engine_share,
        )

    def expect(self, step_seconds: float) -> None:
        """Choose the decoder for training whose steps keep the GPU busy for so long.

        Batches that were begun early are kept if their decoder is the one chosen, and begun again if not.
        """
        if self._demand is None:
            return
        self._demand = self._demand._replace(seconds=step_seconds)
        chosen = choose_decoding(self._wanted.decoder, self._wanted.threads, self.device, self._demand)
        if chosen.decoder == self._settings.decoder:
            return
        if (place := self._switch_to(chosen)) is not None:
            self.begin(*place)

    def reconsider(self, decoder: str | None = None) -> str | None:
        """Decode differently from the next batch on, because training waits; the batches stay what they are.

        Args:
            decoder: by this one; default: by the one to try next.

        Returns:
            The decoder now, or None where nothing changes: one was requested, or there is no other to try.
        """
        decoder = decoder or next_decoder(self._settings.decoder, self.device)
        if self._wanted.decoder != "auto" or decoder is None:
            return None
        chosen = choose_decoding(decoder, self._wanted.threads, self.device, self._demand)
        if (place := self._switch_to(chosen)) is not None:
            self._restart(*place)
        return decoder

    def _switch_to(self, chosen: Decoding) -> tuple[int, int] | None:
        """Let go of the graph, to build another; the place to continue from, if there is one."""
        self._join()
        place = self._next_place
        self.close()
        self._decode_by(chosen)
        return place

    def reorder(self, order: Order) -> None:
        """Follow another order from the next epoch that is asked for; it must be of the same images and ranks."""
        self._join()
        self.view, self.order = replace(cast(Any, self.view), order=order), order
        self._next_place = None  # so that what was read ahead is not used

    # Properties

    @property
    def steps(self) -> int:
        """Steps in an epoch, the same on every rank."""
        return self.order.steps

    @property
    def settings(self) -> GraphSettings:
        """What was chosen for this machine: decoder, threads, and the rest."""
        return self._settings

    @property
    def skipped(self) -> list[str]:
        """The images left out so far by this process, a sentence each; `bad` has them by their ids."""
        return sorted(self.bad.values())

    @property
    def bad(self) -> Mapping[int, str]:
        return self._reader.bad

    def ids(self, epoch: int, step: int) -> np.ndarray:
        """Of the images in a batch that was handed out; where one was left out, of the one that took its place."""
        return self._reader.without_bad(self.order.step(epoch, step)[1])

    def work(self, epoch: int, step: int) -> Work:
        """What is done for a batch that was handed out."""
        return self.view.draw(epoch, step, self._reader.read)

    # Batches

    def begin(self, epoch: int, start: int = 0) -> None:
        """Build what decodes and begin on these batches in the background, while the caller does something else.

        An error on the way is raised when the batches are asked for.
        """
        self._join()

        def work() -> None:
            with suppress(Exception), torch.cuda.stream(self._stream) if self._stream else nullcontext():
                self._restart(epoch, start)
                self._decode()

        self._beginning = threading.Thread(target=work, name="begin", daemon=True)
        self._beginning.start()

    def _join(self) -> None:
        if self._beginning is not threading.current_thread() and self._beginning is not None:
            self._beginning.join()
            self._beginning = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on. An iterator asked for earlier can no longer be used.

        Raises:
            UserError: in a forked process; while iterating, when an image cannot be read or decoded, which is named.
        """
        self._check_process()
        self._join()
        if self._graph is None or self._next_place != (epoch, start):
            self._restart(epoch, start)
        self._owner = owner = object()
        return self._batches(epoch, start, owner)

    def _batches(self, epoch: int, start: int, owner: object) -> Iterator[Batch]:
        for step in range(start, self.steps):
            if owner is not self._owner:
                raise RuntimeError("this loader has been asked for another epoch since")
            batch = self._take_beside()
            if batch is None:
                break
            self._next_place = (epoch, step + 1) if step + 1 < self.steps else (epoch + 1, 0)
            yield batch
        if not self.view.training and owner is self._owner:
            self.pause()

    def _take_beside(self) -> Batch | None:
        """:meth:`_take` on the loader's stream; what the current stream is given from here on waits for it."""
        self._join()  # a decoder chosen since the iterator was asked for begins on the same batches
        if self._stream is None:
            return self._take()
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            self.asked, self.ready = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.asked.record()
            batch = self._take()
            self.ready.record()
        current.wait_stream(self._stream)
        for tensor in batch or ():
            tensor.record_stream(current)
        return batch

    def _take(self) -> Batch | None:
        """The oldest batch in work; None at the end of an evaluation."""
        if not self._decoded and not self._decode():
            return None
        work, decoded = self._decoded.popleft()
        return self.view.finish(decoded, work, self._threads)

    def _decode(self) -> bool:
        """Take what DALI has had in work for longest; False at the end of an evaluation."""
        while True:
            assert self._graph is not None
            try:
                outputs = self._graph.next()
                break
            except StopIteration:
                return False
            except UserError:
                self.close()  # should the caller fix it and ask again, everything starts from the beginning
                raise
            except DecodeError as error:
                failed = list(itertools.chain.from_iterable(self._in_work))
                self.close()
                self._explain(error, failed)
            self._restart(*failed[0].place)
        works = self._in_work.popleft()
        self._decoded += zip(works, self.view.split(outputs, works), strict=True)
        return True

    def _feed(self) -> tuple[Any, ...]:
        """Hands DALI the next batches to work on. DALI calls this inside ``Graph.next``."""
        if self._ahead is None:
            raise StopIteration
        begin = time.perf_counter()
        works = next(self._ahead)
        self.read_waits += time.perf_counter() - begin
        self._in_work.append(works)
        return _joined([work.inputs for work in works])

    def _restart(self, epoch: int, start: int) -> None:
        self._stop_reading()
        self._drain()
        if self._graph is None:
            feed = weakref.WeakMethod(self._feed)  # DALI and the thread below must not keep a loader that nobody has
            self._graph = Graph(self.view.inputs, self.view.graph, self._settings, lambda: cast(Any, feed())())
        works = _works(self.source, self.view, self._reader, epoch, start)
        together = _together(works, self._steps_at_once)
        self._ahead = _ReadAhead(together, -(-self._wanted.readahead // self._steps_at_once))
        self._next_place = (epoch, start)

    def _stop_reading(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = self._next_place = None
        self._in_work.clear()
        self._decoded.clear()

    def _drain(self) -> None:
        """Let go of what DALI has in work: cheaper than building the graph, and its memory, again."""
        if self._graph is not None and not self._graph.drain():
            self._graph = None

    def _explain(self, error: DecodeError, failed: list[Work]) -> None:
        """Find the images that DALI failed on, to continue without them; what that cannot help is raised."""
        if lacks_memory(error):
            why = f"{self.device} has too little memory to decode {counted(self.order.batch_size, 'image')} at once"
            raise UserError(f"{why}; lower --batch-size (or --eval-batch-size, or --prefetch)") from error
        batches = [(work.ids, work.inputs[0]) for work in failed]
        refused = partial(decoding.undecodable, settings=self._settings)
        if not batches or not self._reader.blame(batches, refused):
            raise error

    def pause(self) -> None:
        """Stop reading and give the memory of batches back. What decodes stays, and begins sooner than it is built."""
        self._join()
        self._stop_reading()
        self._drain()
        if self._settings.on_gpu:
            decoding.release_memory()

    def close(self) -> None:
        """Stop reading and let DALI go. Batches already handed out stay valid; the loader can be used again."""
        self._join()
        self._stop_reading()
        built, self._graph = self._graph is not None, None
        self._threads.close()
        if built:
            # DALI's pipelines hold themselves in a circle: without this, their threads and memory live until a full
            # collection happens to come, graph upon graph (31 evaluations: 188 threads).
            gc.collect()
        if built and self._settings.on_gpu:
            decoding.release_memory()

    def __del__(self) -> None:
        """Of a loader that was dropped and not closed, as a notebook's cell does when it is run again."""
        with suppress(AttributeError):  # it was refused before it had anything
            if os.getpid() != self._process:
                _KEPT.append(self._graph)
            elif not sys.is_finalizing():
                self._closer.put(self)


_KEPT: list[Graph | None] = []  # in a fork, whose threads they lack: ending them there would crash it


class _ReadAhead:
    """An iterator whose items are made by a background thread, up to `depth` of them ahead."""

    def __init__(self, items: Iterator[list[Work]], depth: int) -> None:
        self._done: queue.SimpleQueue[list[Work] | BaseException] = queue.SimpleQueue()
        self._free = threading.Semaphore(depth)
        self._closed = False
        threading.Thread(target=self._make, args=(items,), name="read-ahead", daemon=True).start()

    def _make(self, items: Iterator[list[Work]]) -> None:
        try:
            for item in items:
                self._free.acquire()
                if self._closed:
                    return
                self._done.put(item)
            self._done.put(StopIteration())
        except BaseException as error:  # raised where the item is asked for
            self._done.put(error)

    def __next__(self) -> list[Work]:
        item = self._done.get()
        if isinstance(item, BaseException):
            self._done.put(item)  # for whoever asks again
            raise item
        self._free.release()
        return item

    def close(self) -> None:
        """End the thread after the item it is making."""
        self._closed = True
        self._free.release()


def _works(source: Source, view: View, reader: Reader, epoch: int, start: int) -> Iterator[Work]:
    """What comes from a place on: without end in training, else to the end of the epoch."""
    order = view.order
    places = itertools.chain([None], _places(order.steps, epoch, start, endless=view.training), [None])
    for place, following in itertools.pairwise(places):
        if here := place or following:
            source.follow(order, *here)
        if following is not None:  # so that the disk has the next batch to fetch while this one is read
            source.will_need(order.decoded(*following)[1])
        if place is not None and len((work := view.draw(*place, reader.read)).ids):
            yield work


def _places(steps: int, epoch: int, start: int, *, endless: bool) -> Iterator[tuple[int, int]]:
    """Epoch and step of each batch from there on."""
    yield from ((epoch, step) for step in range(start, steps))
    while endless:
        epoch += 1
        yield from ((epoch, step) for step in range(steps))


def _together(works: Iterator[Work], most: int) -> Iterator[list[Work]]:
    """Up to `most` at a time, of one size."""
    for _, same in itertools.groupby(works, key=lambda work: work.size):
        while together := list(itertools.islice(same, most)):
            yield together


def _joined(inputs: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The inputs of several batches as those of one."""
    if len(inputs) == 1:
        return inputs[0]
    return tuple(
        list(itertools.chain.from_iterable(parts)) if isinstance(parts[0], list) else np.concatenate(parts)
        for parts in zip(*inputs, strict=True)
    )


def _check_fills_a_step(view: View) -> None:
    order = view.order
    if order.steps or not view.training:
        return
    per_rank, processes = order.samples // order.world, order.samples // order.batch_size
    fix = f"lower --batch-size to at most {per_rank}"
    if not per_rank:
        count = processes or order.samples
        fix = f"use at most {counted(count, 'process')}{'' if processes else ' and --batch-size 1'}"
    raise UserError(
        f"{order.samples} training images do not fill one step of {order.world} x {order.batch_size}; {fix}"
    )

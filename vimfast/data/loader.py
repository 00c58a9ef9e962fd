"""Source + order + graph -> batches: what the trainer and the evaluation iterate over.

A background thread reads the batches to come and draws their boxes and flips, DALI's threads (and the GPU) decode
them, and the caller's thread only takes finished ones.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vimfast.config import AugmentConfig
from vimfast.data import augment, pipeline
from vimfast.data.exchange import Exchange
from vimfast.data.hardware import Decoding, Demand, choose_decoding, next_decoder
from vimfast.data.pipeline import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DecodeError,
    Graph,
    GraphSettings,
    Regions,
    copies_graph,
    cut_graph,
    evaluation_graph,
    regions_graph,
    training_graph,
)
from vimfast.data.reader import Reader
from vimfast.data.recipe import Recipe
from vimfast.data.sampler import Order
from vimfast.data.source import Source
from vimfast.errors import UserError
from vimfast_kernels.augment import Plan
from vimfast_kernels.augment import augment as carry_out
from vimfast_kernels.resize import crop_resize, crop_resize_at


class Batch(NamedTuple):
    """Normalized pictures and their labels, on the loader's device."""

    images: Tensor  # [B, 3, S, S], float32 unless asked otherwise
    labels: Tensor  # int64 [B]


class _Cuts(NamedTuple):
    """How :func:`crop_resize` makes the crops of a batch from decoded regions."""

    which: np.ndarray  # int64 [b], the region
    boxes: np.ndarray  # int32 [b, 4]: top, left, height, width in it
    mirror: np.ndarray  # int32 [b]
    cubic: np.ndarray  # int32 [b]


class _Work(NamedTuple):
    """A batch on its way: what DALI gets, and who is in it, should DALI fail."""

    place: tuple[int, int]  # epoch, step
    ids: np.ndarray  # int64 [n]
    inputs: tuple[Any, ...]  # as the graph's docstring lists them
    labels: np.ndarray  # int64 [b], of the batch, or of what is exchanged for it
    plan: Plan | None = None  # what is done to the images that come out; None in evaluation
    places: np.ndarray | None = None  # int64 [b], the batch among what comes out; None: all of it
    cuts: _Cuts | None = None  # the batch, where DALI only decodes


class Loader:
    """Batches of one rank, in the order of `order`.

    A training loader reads on over epoch ends: asking for the next epoch goes on without a pause, asking for any other
    place (a resumed run) starts the stream there. An evaluation loader stops at the end of the epoch and gives its
    memory back; its last batch may be short, and a rank for which nothing is left has fewer batches than ``steps``.

    Where the copies of repeated augmentation come to one rank (``order.neighbours``, or a single process), a picture is
    read and decoded once and then cropped, mirrored and augmented as often as it is repeated. So it is where the ranks
    of a host decode for each other (``order.node``): each decodes its share with all copies, and they exchange the
    crops before they are augmented. Every rank of the host must then take the same batches.

    Batches stay valid for as long as they are held.

    Args:
        source, order: the pictures and their order; `order.batch_size` is this rank's.
        device: where batches come out: ``"cpu"``, ``"cuda"`` (the current one) or ``"cuda:N"``.
        training: random crops, flips and `augmentation`, drawn from (order.seed, epoch, position); else resize and
            centre crop.
        augmentation: what is done behind crop and flip in training, and the kind of crop; None: random resized crop
            and flip only.
        size: side of the pictures, pixels.
        scale, ratio: of the random crop's area (share of the picture) and aspect (width over height).
        hflip: probability of mirroring in training.
        crop_ratio: evaluation resizes the short side to ``int(size / crop_ratio)``; in (0, 1].
        interpolation: ``"bicubic"`` or ``"bilinear"``; in training also ``"random"``.
        mean, std: of the normalization, for values in [0, 1].
        dtype: of the images: float32 or float16.
        threads: decoding threads; default: as many as help, of the cores this process may use.
        prefetch: batches decoded ahead.
        readahead: batches read (of shards: asked of the disk) ahead of those.
        decoder: ``"auto"`` (:func:`choose_decoding`), ``"hardware"`` (the GPU's JPEG engine, and its ordinary cores for
            the rest), ``"cuda"`` or ``"cpu"``.
        hw_decoder_load: share of the pictures for the JPEG engine; default: what fits the GPU and the threads.
        on_bad_image: ``"stop"`` at a picture that does not decode, or ``"skip"`` it (:class:`Reader`).
        report: is told of each picture skipped; default: a warning on stderr.
        steps_at_once: batches that DALI decodes together; default: what fits the decoder.
        group: the processes that ``order.node`` counts; None: all.

    Raises:
        UserError: training pictures that do not fill one step, or a setting out of its range.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        *,
        device: torch.device | str,
        training: bool,
        augmentation: AugmentConfig | None = None,
        size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        crop_ratio: float = 0.875,
        interpolation: str = "bicubic",
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        prefetch: int = 3,
        readahead: int = 4,
        decoder: str = "auto",
        hw_decoder_load: float | None = None,
        on_bad_image: str = "stop",
        report: Callable[[str], None] | None = None,
        steps_at_once: int | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        if training and order.steps == 0:
            _refuse_small_split(order)
        if not 0 < crop_ratio <= 1:
            raise UserError(f"the evaluation crop ratio is {crop_ratio}, want more than 0 and at most 1")
        if not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1]):
            raise UserError(f"crops of scale {scale} and ratio {ratio}: want MIN <= MAX, above 0, a scale of at most 1")
        self.source, self.order, self.training = source, order, training
        self.device = torch.device(device)
        if self.device == torch.device("cuda"):
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._scale, self._ratio, self._hflip, self._crop_ratio = scale, ratio, hflip, crop_ratio
        self._recipe = Recipe(augmentation, size, interpolation)
        alone = order.world == 1 or order.neighbours
        together = training and (alone or order.node > 1) and self._recipe.crop == "resized"
        self._copies = order.repeats if together else 1
        self._exchange = Exchange(order, group) if self._copies > 1 and order.node > 1 else None
        self._asked = (decoder, threads, hw_decoder_load, steps_at_once)
        # On a GPU, crops are cut and resized by our own kernel, in a third of the time of DALI's three.
        self._cuts_itself = training and self._recipe.crop == "resized" and self.device.type == "cuda"
        self._most = _most_pictures(order, self._copies)  # to decode for a step
        self._demand = Demand(self._most, order.batch_size, None, source.mean_bytes) if training else None
        decoding = choose_decoding(decoder, threads, self.device, self._demand)
        self._settings = GraphSettings(
            batch_size=self._most,
            size=size,
            device=self.device,
            interpolation=interpolation,
            mean=mean,
            std=std,
            dtype=dtype,
            prefetch=prefetch,
        )
        self._decode_by(decoding)
        self._reader = Reader(source, skip=on_bad_image == "skip", stand_in=training, report=report)
        self._readahead = readahead
        self._graph: Graph | None = None  # built with the first epoch
        self._ahead: _ReadAhead | None = None
        self._in_work: deque[list[_Work]] = deque()  # oldest first: what DALI holds, batches that it decodes together
        self._decoded: deque[tuple[_Work, Tensor | Regions]] = deque()  # oldest first: batches, what they are made of
        self._next_place: tuple[int, int] | None = None  # (epoch, step) to be handed out next
        self._owner = object()  # the iterator that may take batches
        # What is done to a batch here runs beside the step that the GPU is still busy with, not after it.
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.ready: torch.cuda.Event | None = None  # the last batch, on a GPU; with timing
        self._beginning: threading.Thread | None = None

    def _decode_by(self, decoding: Decoding) -> None:
        _, _, engine_share, steps_at_once = self._asked
        self._steps_at_once = steps_at_once or decoding.steps_at_once
        self._settings = replace(
            self._settings,
            batch_size=self._steps_at_once * self._most,
            threads=decoding.threads,
            decoder=decoding.decoder,
            hw_decoder_load=decoding.engine_share if engine_share is None else engine_share,
        )

    def expect(self, step_seconds: float) -> None:
        """Choose the decoder for training whose steps keep the GPU busy for so long.

        Batches that were begun early are kept if their decoder is the one chosen, and begun again if not.
        """
        if self._demand is None:
            return
        self._demand = self._demand._replace(seconds=step_seconds)
        decoder, threads, _, _ = self._asked
        decoding = choose_decoding(decoder, threads, self.device, self._demand)
        if decoding.decoder == self._settings.decoder:
            return
        place = self._switch_to(decoding)
        if place is not None:
            self.begin(*place)

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

    def reconsider(self) -> str | None:
        """Decode otherwise from the next batch on, because training waits; the batches stay what they are.

        Returns:
            The decoder now, or None where nothing changes: one was asked for, or there is no other to try.
        """
        decoder = next_decoder(self._settings.decoder, self.device)
        if self._asked[0] != "auto" or decoder is None:
            return None
        place = self._switch_to(choose_decoding(decoder, self._asked[1], self.device, self._demand))
        if place is not None:
            self._restart(*place)
        return decoder

    def _switch_to(self, decoding: Decoding) -> tuple[int, int] | None:
        """Let go of the graph, to build another; the place to continue from, if there is one."""
        self._join()
        place = self._next_place
        self.close()
        self._decode_by(decoding)
        return place

    @property
    def steps(self) -> int:
        """Steps in an epoch, the same on every rank."""
        return self.order.steps

    @property
    def pictures(self) -> int:
        """Pictures in the split."""
        return len(self.source)

    @property
    def settings(self) -> GraphSettings:
        """What was chosen for this machine: decoder, threads, and the rest."""
        return self._settings

    @property
    def skipped(self) -> list[str]:
        """The pictures left out so far by this process, a sentence each."""
        return sorted(self._reader.bad.values())

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on. An iterator asked for earlier ends with this call.

        Raises:
            UserError: while iterating, when a picture cannot be read or decoded; the sentence names it.
        """
        self._join()
        if not self.training or self._graph is None or self._next_place != (epoch, start):
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
        if not self.training and owner is self._owner:
            self.close()

    def _take_beside(self) -> Batch | None:
        """:meth:`_take` on the loader's stream; what the current stream is given from here on waits for it."""
        if self._stream is None:
            return self._take()
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            batch = self._take()
            self.ready = torch.cuda.Event(enable_timing=True)
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
        images = self._crops(work, decoded)
        labels = torch.from_numpy(work.labels).to(self.device, non_blocking=True)
        if self._exchange is not None:
            images, labels = self._exchange(images), self._exchange(labels)
        if work.plan is not None:
            settings = self._settings
            images = carry_out(images, work.plan, mean=settings.mean, std=settings.std, dtype=settings.dtype)
        elif self._stream is not None:
            # DALI takes its memory back in the order of this stream, and knows nothing of the one that evaluates.
            images = images.clone()
        return Batch(images, labels)

    def _crops(self, work: _Work, decoded: Tensor | Regions) -> Tensor:
        """The images of the batch, uint8 [b, S, S, 3] in training; in sending order where ranks exchange them."""
        if isinstance(decoded, Regions):
            assert work.cuts is not None
            if self._stream is None:
                return crop_resize(decoded.images(), *work.cuts, self._settings.size)
            return crop_resize_at(decoded.addresses, decoded.sizes, *work.cuts, self._settings.size, self.device)
        if work.places is None:
            return decoded
        if self._exchange is None:  # neighbours
            return decoded[int(work.places[0]) : int(work.places[-1]) + 1]
        return decoded[torch.from_numpy(work.places)]

    def _decode(self) -> bool:
        """Take what DALI has had in work for longest; False at the end of an evaluation."""
        while True:
            assert self._graph is not None
            try:
                decoded = self._graph.next_regions() if self._cuts_itself else self._graph.next()
                break
            except StopIteration:
                return False
            except UserError:
                self.close()  # should the caller mend it and ask again, everything starts afresh
                raise
            except DecodeError as error:
                failed = list(itertools.chain.from_iterable(self._in_work))
                self.close()
                self._explain(error, failed)
            self._restart(*failed[0].place)
        works = self._in_work.popleft()
        counts = [len(work.ids) * (1 if self._cuts_itself else self._copies) for work in works]
        self._decoded += zip(works, decoded.split(counts), strict=True)
        return True

    def _feed(self) -> tuple[Any, ...]:
        """Hands DALI the next batches to work on. DALI calls this inside ``Graph.next``."""
        if self._ahead is None:
            raise StopIteration
        works = next(self._ahead)
        self._in_work.append(works)
        return _joined([work.inputs for work in works])

    def _restart(self, epoch: int, start: int) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        if self._graph is not None:
            self._drain(self._graph)
        self._in_work.clear()
        self._decoded.clear()
        if self._graph is None:
            self._graph = Graph(self._definition(), self._settings, self._feed)
        works = self._works(epoch, start)
        together = iter(lambda: list(itertools.islice(works, self._steps_at_once)), [])
        self._ahead = _ReadAhead(together, -(-self._readahead // self._steps_at_once))
        self._next_place = (epoch, start)

    def _definition(self) -> Callable[..., tuple[Any, ...]]:
        if not self.training:
            return evaluation_graph
        if self._cuts_itself:
            return regions_graph
        if self._copies > 1:
            return copies_graph(self._copies)
        return training_graph if self._recipe.crop == "resized" else cut_graph

    def _drain(self, graph: Graph) -> None:
        """Let go of what DALI has in work: cheaper than building the graph, and its memory, anew."""
        try:
            while graph.skip():
                pass
            graph.rewind()
        except DecodeError:  # in a batch that nobody asked for
            self._graph = None

    def _works(self, epoch: int, start: int) -> Iterator[_Work]:
        """What comes from a place on: without end in training, else to the end of the epoch."""
        make = self._work if self._copies == 1 else self._work_of_copies
        while True:
            for step in range(start, self.steps):
                work = make((epoch, step))
                if len(work.ids):
                    yield work
            if not self.training:
                return
            epoch, start = epoch + 1, 0

    def _work(self, place: tuple[int, int]) -> _Work:
        positions, ids = self.order.step(*place)
        ids, (encoded, sizes, labels) = self._reader.read(ids)
        if self.training:
            epoch = place[0]
            u = augment.uniforms(self.order.seed, epoch, positions)
            flip = augment.flips(u, self._hflip)
            cubic = augment.filters(u, self._settings.interpolation)
            if self._cuts_itself:
                boxes = augment.random_resized_crop(u, sizes, self._scale, self._ratio)
                whole = np.concatenate([np.zeros_like(boxes[:, 2:]), boxes[:, 2:]], axis=1)
                cuts = _Cuts(np.arange(len(ids)), whole, flip, cubic)
                inputs = (encoded, np.ascontiguousarray(boxes[:, :2]), np.ascontiguousarray(boxes[:, 2:]))
                plan = self._recipe.draw(self.order.seed, epoch, positions)
                return _Work(place, ids, inputs, labels, plan, cuts=cuts)
            box, shift = self._boxes(u, sizes)
            if shift is not None:
                shift[:, 1] *= 1 - 2 * flip
            plan = self._recipe.draw(self.order.seed, epoch, positions, shift)
            return _Work(place, ids, (encoded, *box, flip, cubic), labels, plan)
        resized, corner = augment.resize_and_centre_crop(sizes, self._settings.size, self._crop_ratio)
        return _Work(place, ids, (encoded, resized.astype(np.float32), corner), labels)

    def _work_of_copies(self, place: tuple[int, int]) -> _Work:
        """Each picture once. All its copies are drawn, also those in the batches before and behind this one."""
        epoch, copies = place[0], self._copies
        positions, ids = self.order.decoded(*place)
        shown, first, which = np.unique(positions // copies, return_index=True, return_inverse=True)
        drawn = (shown[:, None] * copies + np.arange(copies)).ravel()
        ids, (encoded, sizes, labels) = self._reader.read(ids[first])
        u = augment.uniforms(self.order.seed, epoch, drawn)
        boxes = augment.random_resized_crop(u, np.repeat(sizes, copies, axis=0), self._scale, self._ratio)
        boxes = boxes.reshape(len(ids), copies, 4)
        low, extents = boxes[..., :2], boxes[..., 2:]
        corner = low.min(axis=1)
        covered = (low + extents).max(axis=1) - corner
        boxes = np.concatenate([low - corner[:, None], extents], axis=2)
        flip = augment.flips(u, self._hflip).reshape(-1, copies)
        cubic = augment.filters(u, self._settings.interpolation).reshape(-1, copies)
        own, _ = self.order.step(*place)
        plan = self._recipe.draw(self.order.seed, epoch, own)
        copy = positions % copies
        if self._exchange is not None:
            which, copy = which[self._exchange.sending_order], copy[self._exchange.sending_order]
        if self._cuts_itself:
            cuts = _Cuts(which, boxes[which, copy], flip[which, copy], cubic[which, copy])
            return _Work(place, ids, (encoded, corner, covered), labels[which], plan, cuts=cuts)
        inputs = [encoded, corner, covered]
        for i in range(copies):
            parts = (boxes[:, i, :2], boxes[:, i, 2:], flip[:, i], cubic[:, i])
            inputs += map(np.ascontiguousarray, parts)
        return _Work(place, ids, tuple(inputs), labels[which], plan, which * copies + copy)

    def _boxes(self, u: np.ndarray, sizes: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray | None]:
        """Where to cut, as the graph of this kind of crop takes it, and what the recipe is to shift behind that."""
        size = self._settings.size
        if self._recipe.crop == "simple":
            resized, corner, shift = augment.simple_crop(u, sizes, size)
            return (resized.astype(np.float32), corner), shift
        if self._recipe.crop == "padded":
            return (sizes.astype(np.float32), augment.padded_crop(u, sizes, size)), None
        boxes = augment.random_resized_crop(u, sizes, self._scale, self._ratio)
        return (np.ascontiguousarray(boxes[:, :2]), np.ascontiguousarray(boxes[:, 2:])), None

    def _explain(self, error: DecodeError, failed: list[_Work]) -> None:
        """Find the pictures that DALI failed on, to go on without them; what cannot be gone on from is raised."""
        if any(sign in str(error) for sign in ("out of memory", "cudaErrorMemoryAllocation", "bad_alloc")):
            raise UserError(
                f"{self.device} has too little memory to decode {self.order.batch_size} pictures at once; "
                "lower --batch-size (or --eval-batch-size, or --prefetch)"
            ) from error
        batches = [(work.ids, work.inputs[0]) for work in failed]
        refused = partial(pipeline.undecodable, settings=self._settings)
        if not batches or not self._reader.blame(batches, refused):
            raise error

    def close(self) -> None:
        """Stop reading and let DALI go. Batches already handed out stay valid; the loader can be used again."""
        self._join()
        if self._ahead is not None:
            self._ahead.close()
        built = self._graph is not None
        self._ahead = self._graph = self._next_place = None
        self._in_work.clear()
        self._decoded.clear()
        if built and self._settings.on_gpu:
            pipeline.release_memory()


class _ReadAhead:
    """An iterator whose items are made by a background thread, up to `depth` of them ahead."""

    def __init__(self, items: Iterator[list[_Work]], depth: int) -> None:
        self._done: queue.SimpleQueue[list[_Work] | BaseException] = queue.SimpleQueue()
        self._free = threading.Semaphore(depth)
        self._closed = False
        threading.Thread(target=self._make, args=(items,), name="read-ahead", daemon=True).start()

    def _make(self, items: Iterator[list[_Work]]) -> None:
        try:
            for item in items:
                self._free.acquire()
                if self._closed:
                    return
                self._done.put(item)
            self._done.put(StopIteration())
        except BaseException as error:  # raised where the item is asked for
            self._done.put(error)

    def __next__(self) -> list[_Work]:
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


def _joined(inputs: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The inputs of several batches as those of one."""
    if len(inputs) == 1:
        return inputs[0]
    return tuple(
        list(itertools.chain.from_iterable(parts)) if isinstance(parts[0], list) else np.concatenate(parts)
        for parts in zip(*inputs, strict=True)
    )


def _most_pictures(order: Order, copies: int) -> int:
    """How many pictures the positions of a step can show that a rank decodes. Each run of neighbouring positions may
    begin with the last copy of one."""
    run = order.batch_size if order.node in (1, order.world) else order.node
    runs = 1 if run == order.batch_size else 1 + -(-order.batch_size // run)
    return min(order.batch_size, runs * (1 + -(-(run - 1) // copies)))


def _refuse_small_split(order: Order) -> None:
    per_rank = order.samples // order.world
    cure = f"lower --batch-size to at most {per_rank}" if per_rank else f"use at most {order.samples} processes"
    raise UserError(
        f"{order.samples} training pictures do not fill one step of {order.world} x {order.batch_size}; {cure}"
    )

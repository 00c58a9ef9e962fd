"""Source + order + graph -> batches: what the trainer and the evaluation iterate over.

A background thread reads the batches to come and draws their boxes and flips, DALI's threads (and the GPU) decode
them, and the caller's thread only takes finished ones.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vimfast.data import augment, jpeg
from vimfast.data.pipeline import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DecodeError,
    Graph,
    GraphSettings,
    evaluation_graph,
    training_graph,
)
from vimfast.data.sampler import Order
from vimfast.data.source import Source
from vimfast.errors import UserError


class Batch(NamedTuple):
    """Normalized pictures and their labels, on the loader's device."""

    images: Tensor  # [B, 3, S, S], float32 unless asked otherwise
    labels: Tensor  # int64 [B]


class _Work(NamedTuple):
    """A batch on its way: what DALI gets, and who is in it, should DALI fail."""

    ids: np.ndarray  # int64 [b]
    inputs: tuple[Any, ...]  # as the graph's docstring lists them


class Loader:
    """Batches of one rank, in the order of `order`.

    A training loader reads on over epoch ends: asking for the next epoch goes on without a pause, asking for any other
    place (a resumed run) starts the stream there. An evaluation loader stops at the end of the epoch; its last batch
    may be short, and a rank for which nothing is left has fewer batches than ``steps``.

    Batches stay valid for as long as they are held.

    Args:
        source, order: the pictures and their order; `order.batch_size` is this rank's.
        device: where batches come out: ``"cpu"``, ``"cuda"`` (the current one) or ``"cuda:N"``.
        training: random resized crops and flips, drawn from (order.seed, epoch, position); else resize and centre crop.
        size: side of the pictures, pixels.
        scale, ratio: of the random crop's area (share of the picture) and aspect (width over height).
        hflip: probability of mirroring in training.
        crop_ratio: evaluation resizes the short side to ``int(size / crop_ratio)``; in (0, 1].
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        mean, std: of the normalization, for values in [0, 1].
        dtype: of the images: float32 or float16.
        threads: decoding threads; default: the cores this process may use, shared with the others of this host.
        prefetch: batches decoded ahead, and as many again read ahead.
        hw_decoder_load: share of the pictures that go to the GPU's JPEG engine, where it has one.

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
        prefetch: int = 2,
        hw_decoder_load: float = 0.65,
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
        self._settings = GraphSettings(
            batch_size=order.batch_size,
            size=size,
            device=self.device,
            interpolation=interpolation,
            mean=mean,
            std=std,
            dtype=dtype,
            threads=threads or default_threads(),
            prefetch=prefetch,
            hw_decoder_load=hw_decoder_load,
        )
        self._graph: Graph | None = None  # built with the first epoch
        self._ahead: _ReadAhead | None = None
        self._in_work: deque[_Work] = deque()  # oldest first: the batches that DALI holds
        self._next_place: tuple[int, int] | None = None  # (epoch, step) that comes next out of DALI
        self._owner = object()  # the iterator that may take batches

    @property
    def steps(self) -> int:
        """Steps in an epoch, the same on every rank."""
        return self.order.steps

    @property
    def pictures(self) -> int:
        """Pictures in the split."""
        return len(self.source)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on. An iterator asked for earlier ends with this call.

        Raises:
            UserError: while iterating, when a picture cannot be read or decoded; the sentence names it.
        """
        if not self.training or self._graph is None or self._next_place != (epoch, start):
            self._restart(epoch, start)
        self._owner = owner = object()
        return self._batches(epoch, start, owner)

    def _batches(self, epoch: int, start: int, owner: object) -> Iterator[Batch]:
        for step in range(start, self.steps):
            if owner is not self._owner:
                raise RuntimeError("this loader has been asked for another epoch since")
            batch = self._take()
            if batch is None:
                return
            self._next_place = (epoch, step + 1) if step + 1 < self.steps else (epoch + 1, 0)
            yield batch

    def _take(self) -> Batch | None:
        """The oldest batch in work; None at the end of an evaluation."""
        assert self._graph is not None
        try:
            images, labels = self._graph.next()
        except StopIteration:
            return None
        except UserError:
            self.close()  # should the caller mend it and ask again, everything starts afresh
            raise
        except DecodeError as error:
            told = self._explain(error)
            self.close()
            raise told from error
        self._in_work.popleft()
        return Batch(images, labels)

    def _feed(self) -> tuple[Any, ...]:
        """Hands DALI the next batch to work on. DALI calls this inside ``Graph.next``."""
        if self._ahead is None:
            raise StopIteration
        work = next(self._ahead)
        self._in_work.append(work)
        return work.inputs

    def _restart(self, epoch: int, start: int) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        if self._graph is not None:
            self._drain(self._graph)
        self._in_work.clear()
        if self._graph is None:
            self._graph = Graph(training_graph if self.training else evaluation_graph, self._settings, self._feed)
        self._ahead = _ReadAhead(self._works(epoch, start), self._settings.prefetch)
        self._next_place = (epoch, start)

    def _drain(self, graph: Graph) -> None:
        """Let go of what DALI has in work: cheaper than building the graph, and its memory, anew."""
        try:
            while True:
                graph.next()
        except StopIteration:
            graph.rewind()
        except DecodeError:  # in a batch that nobody asked for
            self._graph = None

    def _works(self, epoch: int, start: int) -> Iterator[_Work]:
        """What comes from a place on: without end in training, else to the end of the epoch."""
        while True:
            for step in range(start, self.steps):
                positions, ids = self.order.step(epoch, step)
                if len(ids):
                    yield self._work(epoch, positions, ids)
            if not self.training:
                return
            epoch, start = epoch + 1, 0

    def _work(self, epoch: int, positions: np.ndarray, ids: np.ndarray) -> _Work:
        encoded, sizes, labels = self.source.read(ids)
        if self.training:
            u = augment.uniforms(self.order.seed, epoch, positions)
            boxes = augment.random_resized_crop(u, sizes, self._scale, self._ratio)
            corner, extent = np.ascontiguousarray(boxes[:, :2]), np.ascontiguousarray(boxes[:, 2:])
            return _Work(ids, (encoded, labels, corner, extent, augment.flips(u, self._hflip)))
        resized, corner = augment.resize_and_centre_crop(sizes, self._settings.size, self._crop_ratio)
        return _Work(ids, (encoded, labels, resized.astype(np.float32), corner))

    def _explain(self, error: DecodeError) -> Exception:
        """The error for a person: which pictures in work do not decode, going by Pillow, oldest batch first."""
        if any(sign in str(error) for sign in ("out of memory", "cudaErrorMemoryAllocation", "bad_alloc")):
            return UserError(
                f"{self.device} has too little memory to decode {self.order.batch_size} pictures at once; "
                "lower --batch-size (or --eval-batch-size, or --prefetch)"
            )
        for work in self._in_work:
            found = zip(work.ids.tolist(), map(_why_unreadable, work.inputs[0]), strict=True)
            if bad := {f"{self.source.name(i)} ({why})" for i, why in found if why}:
                return UserError(
                    f"cannot decode {', '.join(sorted(bad))}; find all such pictures with python -m "
                    "vimfast.check_data DATA --decode and remove them, or convert with vimfast-prepare --skip-bad"
                )
        # Pillow reads them all, so what DALI refuses is told by its numbers within the batch that failed: the oldest.
        oldest = self._in_work[0].ids.tolist() if self._in_work else []
        if refused := {
            self.source.name(oldest[int(n)]) for n in re.findall(r"#(\d+)", str(error)) if int(n) < len(oldest)
        }:
            return UserError(
                f"DALI cannot decode {', '.join(sorted(refused))}, but Pillow can; save it again as a JPEG"
            )
        return error

    def close(self) -> None:
        """Stop reading and let DALI go. Batches already handed out stay valid; the loader can be used again."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = self._graph = self._next_place = None
        self._in_work.clear()


class _ReadAhead:
    """An iterator whose items are made by a background thread, up to `depth` of them ahead."""

    def __init__(self, items: Iterator[_Work], depth: int) -> None:
        self._done: queue.SimpleQueue[_Work | BaseException] = queue.SimpleQueue()
        self._free = threading.Semaphore(depth)
        self._closed = False
        threading.Thread(target=self._make, args=(items,), name="read-ahead", daemon=True).start()

    def _make(self, items: Iterator[_Work]) -> None:
        try:
            for item in items:
                self._free.acquire()
                if self._closed:
                    return
                self._done.put(item)
            self._done.put(StopIteration())
        except BaseException as error:  # raised where the item is asked for
            self._done.put(error)

    def __next__(self) -> _Work:
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


def default_threads() -> int:
    """The cores this process may use, shared among the processes that torchrun started on this host."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _why_unreadable(data: np.ndarray) -> str | None:
    try:
        jpeg.to_rgb_jpeg(data)
    except ValueError as error:
        return str(error)
    return None


def _refuse_small_split(order: Order) -> None:
    per_rank = order.samples // order.world
    cure = f"lower --batch-size to at most {per_rank}" if per_rank else f"use at most {order.samples} processes"
    raise UserError(
        f"{order.samples} training pictures do not fill one step of {order.world} x {order.batch_size}; {cure}"
    )

"""One training step: forward, loss, backward, update, average; on a GPU replayed as a CUDA graph."""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from vimfast.train.gradients import GradientSum
from vimfast.train.graphs import Lead, Pool, aside, record
from vimfast.train.update import Buffers, Health, Update

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]  # (images, logits, targets) -> scalar

WARM_UP = 2  # launched steps before capture: libraries make their handles, gradients find their buckets
TIMED = 5  # replays after capture, to know how fast data has to come


class _Captured(NamedTuple):
    """Forward and backward for batches of one shape."""

    inputs: tuple[Tensor, Tensor]  # images and targets, as the graphs read them
    graphs: dict[bool, torch.cuda.CUDAGraph]  # by whether the batch is the last of its step
    gradients: list[Tensor | None]  # of each parameter, where the graphs leave them


def _shape(images: Tensor, targets: Tensor) -> tuple[object, ...]:
    return images.shape, images.dtype, targets.shape, targets.dtype


class TrainStep:
    """Trains `model` on batches; the host waits for nothing in a step but the GPU's lead.

    With :meth:`capture`, forward and backward are recorded once for each shape of batches as a CUDA graph and replayed
    from then on, with the all-reduces in it: hundreds of launches become one. The update stays outside, so that any
    optimizer and any learning rate will do; it is queued while the GPU still works on the graph. What has no graph is
    launched.

    A step whose gradients hold an infinity or a NaN, which after the all-reduce is so on all processes or on none,
    leaves weights, buffers (running statistics, say) and optimizer state as they are, and is counted.

    Args:
        model: images [B, 3, S, S] to logits [B, K]; compiled or not.
        optimizer: over its parameters.
        criterion: images, logits (fp32) and targets to a scalar.
        amp: the autocast context of the forward pass; without a weight cache (``cache_enabled=False``).
        average: of `model`'s weights, updated after each step.
        gradients: sums them over processes that all run this step; None: this one is alone.
        clip_grad: largest norm of all gradients together; None for no clipping.
        accum_steps: batches whose mean gradient makes one update.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Criterion,
        *,
        amp: torch.autocast,
        average: ModelEmaV3 | None = None,
        gradients: GradientSum | None = None,
        clip_grad: float | None = None,
        accum_steps: int = 1,
    ) -> None:
        self.model, self.optimizer, self.criterion, self.amp = model, optimizer, criterion, amp
        self.average, self.clip_grad, self.accum_steps = average, clip_grad, accum_steps
        self._gradients = gradients
        self._parts = accum_steps * (1 if gradients is None else gradients.processes)  # batches that make an update
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._buffers = Buffers(model)  # replays change them too
        self._update = Update(
            model, optimizer, average, self._buffers, clip_grad=clip_grad, several=gradients is not None
        )
        device = self._parameters[0].device
        self._on_gpu = device.type == "cuda"
        self._captured: dict[tuple[object, ...], _Captured] = {}
        self._in_place: _Captured | None = None  # whose gradients the parameters have
        self.seconds: float | None = None  # of a captured forward and backward pass on the GPU, once it was timed
        self._loss = torch.zeros((), device=device)
        self.end: torch.cuda.Event | None = None  # of the last step, on a GPU; with timing
        self._lead = Lead(device)

    # Capturing

    def capture(self, images: Tensor, targets: Tensor) -> None:
        """Record the graph of batches of this shape, between two steps. Weights, buffers, optimizer, average and random
        state are what they were before.

        Call it with any batch of the size, dtype and memory layout to come; other threads may use the GPU meanwhile.
        Captured is what the model does for it: nothing in it may depend on draws or branches of the host.

        Raises:
            RuntimeError: something in the step cannot be captured; for this shape it then stays eager.
        """
        inputs = images.clone(), targets.clone()
        self._update.prepare()
        random_state = torch.cuda.get_rng_state(images.device)
        self._buffers.keep()
        try:
            with aside(images.device):
                for _ in range(WARM_UP):
                    self._clear_gradients()
                    self._forward_backward(*inputs, True)
            torch.cuda.synchronize(images.device)
            self._clear_gradients()
            torch.cuda.empty_cache()  # what warming up took is free for the graph's own pool
            graphs = self._record(inputs)
        except BaseException:
            torch.cuda.synchronize(images.device)
            self._drop_gradients()
            raise
        finally:
            torch.cuda.set_rng_state(random_state, images.device)
            self._buffers.restore()
        self._in_place = _Captured(inputs, graphs, [p.grad for p in self._parameters])
        self._captured[_shape(*inputs)] = self._in_place

    def _record(self, inputs: tuple[Tensor, Tensor]) -> dict[bool, torch.cuda.CUDAGraph]:
        """The graphs share their memory with all others: they run one after another, and what one leaves, its
        gradients, is used before the next runs."""

        def compute(last: bool) -> Tensor:
            return self._loss.copy_(self._forward_backward(*inputs, last))

        graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        pool = self.pool
        for last in [True] if self.accum_steps == 1 else [False, True]:
            graphs[last], _ = record(functools.partial(compute, last), self._loss.device, pool=pool)
            pool = graphs[last].pool()
        return graphs

    @property
    def pool(self) -> Pool | None:
        """The memory of the graphs; None: there are none. A graph that is captured on the same stream and never runs
        beside them may share it, as long as what it leaves is used before the next step."""
        graphs = (graph for captured in self._captured.values() for graph in captured.graphs.values())
        return next((graph.pool() for graph in graphs), None)

    @property
    def captured(self) -> bool:
        """Whether there is any graph."""
        return bool(self._captured)

    def has_captured(self, images: Tensor, targets: Tensor) -> bool:
        """Whether there is a graph for batches of this shape."""
        return _shape(images, targets) in self._captured

    def forget(self) -> None:
        """Drop the graphs; the step is launched from then on. NCCL's communicator neither ends nor aborts before: it
        waits for every graph that captured one of its collectives."""
        self._captured, self._in_place = {}, None
        gc.collect()

    def restart(self, accum_steps: int) -> None:
        """Train on batches of other shapes from the next step on, so many of them to a step.

        What was captured and timed is forgotten, and its memory is free, that of its gradients too.
        """
        if self._on_gpu:
            torch.cuda.synchronize()  # a graph may still be running
        self.forget()
        self._drop_gradients()
        self._parts = self._parts // self.accum_steps * accum_steps
        self.accum_steps, self.seconds = accum_steps, None

    def time_replays(self) -> None:
        """Measure `seconds` of the first graph; every process must have captured, as they replay together.

        Buffers and random state are what they were before, or a resumed run would not draw what the first one drew.
        """
        device, times = self._loss.device, []
        (captured,) = self._captured.values()
        random_state = torch.cuda.get_rng_state(device)
        self._buffers.keep()
        for _ in range(TIMED):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            captured.graphs[True].replay()
            end.record()
            torch.cuda.synchronize(device)
            times.append(float(begin.elapsed_time(end)) / 1000)
        torch.cuda.set_rng_state(random_state, device)
        self._buffers.restore()
        self.seconds = statistics.median(times)

    # Running

    def __call__(
        self, images: Tensor, targets: Tensor, *, first: bool = True, last: bool = True
    ) -> tuple[Tensor, Tensor]:
        """One batch; with accumulation the weights change after the `last` of the batches that the `first` began.

        Args:
            images: [B, 3, S, S] on the device.
            targets: whatever the criterion takes.

        Returns:
            the batch's loss, and 1.0 where its step counts, 0.0 where it was skipped (before the `last` of several
            batches: where its loss is finite); fp32 scalars on the device that the next call overwrites.
        """
        if first:
            self._buffers.keep()
        captured = self._captured.get(_shape(images, targets))
        if captured is not None:
            loss = self._replay(captured, images, targets, first, last)
        else:
            if first:
                self._drop_gradients()
            loss = self._forward_backward(images, targets, last)
        sound = self._update() if last else torch.isfinite(loss).float()
        self.end = self._lead.mark()
        return loss, sound

    def _replay(self, captured: _Captured, images: Tensor, targets: Tensor, first: bool, last: bool) -> Tensor:
        for own, given in zip(captured.inputs, (images, targets), strict=True):
            own.copy_(given)
        if captured is not self._in_place:
            for parameter, gradient in zip(self._parameters, captured.gradients, strict=True):
                parameter.grad = gradient
            self._in_place = captured
        if first and self.accum_steps > 1:
            self._zero_gradients()
        captured.graphs[last].replay()
        return self._loss

    def _forward_backward(self, images: Tensor, targets: Tensor, last: bool) -> Tensor:
        with self.amp:
            logits = self.model(images)
        loss = self.criterion(images, logits.float(), targets)
        with self._reducing(last):
            (loss if self._parts == 1 else loss / self._parts).backward()
        return loss.detach()

    def _reducing(self, last: bool) -> AbstractContextManager[None]:
        """Only the last batch's backward pass all-reduces."""
        return self._gradients.reducing() if last and self._gradients is not None else nullcontext()

    def _clear_gradients(self) -> None:
        """For a capture. Backward makes new gradients, in the graph's memory; those of several batches are added up in
        memory that is the same for all graphs, where batches of one step may then have any shapes."""
        if self.accum_steps == 1:
            self._drop_gradients()
        else:
            self._zero_gradients()

    def _drop_gradients(self) -> None:
        self._in_place = None
        self.optimizer.zero_grad(set_to_none=True)

    def _zero_gradients(self) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)

    def undo(self) -> None:
        """Give up a step before its `last` batch: buffers are what they were before its `first`, and nothing else has
        changed."""
        self._buffers.restore()

    # Health

    def forget_skips(self) -> None:
        """Count from 0 again."""
        self._update.forget_skips()

    @property
    def counts(self) -> Tensor:
        """As :attr:`Update.counts`."""
        return self._update.counts

    def health(self) -> Health:
        """As :meth:`Update.health`."""
        return self._update.health()

"""The end of a training step in three launches, however many parameters there are: norm, verdict, AdamW and average."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from vimfast_kernels.update.device import (
    AVERAGE,
    COLUMNS,
    ELEMENTS,
    GRADIENT,
    GROUP,
    MEAN,
    PLACE,
    SQUARE,
    STEP,
    WEIGHT,
    adamw,
    judge,
    sum_squares,
)
from vimfast_kernels.update.tensors import Counts, Judged, Moved, Options, Verdict

BLOCK = 2048  # elements of a program
WARPS = 8
WIDTH = 4096  # sums that the one program of `judge` takes at once
JUDGE_WARPS = 16
_VECTOR = 16  # bytes that a thread loads at once, where addresses are multiples of it
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
_OWN = WEIGHT, MEAN, SQUARE, AVERAGE  # addresses of tensors as large as the gradient


class _Run(NamedTuple):
    """Chunks of one launch."""

    first: int
    chunks: int
    dtype: torch.dtype
    bytes: int  # that every address is a multiple of


class FusedAdamW:
    """AdamW and what goes with it in a training step, in place and on the current stream; the host waits for nothing.

    Tensors are found by tables on the device. They are uploaded when an address has changed: never, as long as
    gradients lie where a CUDA graph leaves them.

    Squares are summed in a fixed order, so equal gradients give equal bits.

    Args:
        device: of all tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: np.ndarray | None = None  # rows of `_tensors`, before they were sorted
        self._sizes: list[int] = []
        self._rows: list[tuple[float, ...]] = []  # of `_options`
        self._count, self._averaged = 0, False
        self._verdict = torch.zeros(2, device=device)

    def locate(self, moved: Moved, judged: Judged) -> str | None:
        """Take these tensors from the next call on, where they are now.

        Returns:
            why the kernels cannot (another dtype, device or memory layout), or None.
        """
        if any(gradient.layout != torch.strided for gradient in (*moved.gradients, *judged.gradients)):
            return "a gradient is sparse"
        table = _table(moved, judged)
        if self._known is not None and np.array_equal(table, self._known):
            return None
        self._known = None
        if (why := misfit(moved, judged, self._device)) is not None:
            return why
        self._upload_tables(table, [t.dtype for t in (*moved.gradients, *judged.gradients)], len(moved.weights))
        self._averaged, self._known = bool(moved.averages), table
        return None

    def __call__(
        self,
        options: Sequence[Options],
        counts: Counts,
        *,
        average_weight: float = 0.0,
        largest: float | None = None,
    ) -> Verdict:
        """Judge all gradients that were located, clip their norm to `largest` if it is given, and move the weights.

        If a gradient is non-finite, weights, means and step counts stay as they are; averages move all the same.
        Gradients are only read: whoever moves the `judged` multiplies them by the factor.

        Args:
            options: of the groups.
            counts: updated.
            average_weight: of the new weights in their average, 1 - decay.
        """
        rows: list[tuple[float, ...]] = [
            (o.lr, o.weight_decay, *_with_log(o.beta1), *_with_log(o.beta2), o.eps) for o in options
        ]
        if rows != self._rows:
            self._options, self._rows = self._upload(np.array(rows, np.float32)), rows
        for run in self._norms:
            sum_squares[(run.chunks,)](self._tensors, self._chunks, self._sums, run.first, **_program(run))
        judge[(1,)](
            self._tensors, self._chunks, self._options, self._sums, counts.skipped, counts.first_bad.view(torch.int8),
            self._verdict, self._corrections, len(self._sums), self._count,
            math.inf if largest is None else largest, WIDTH=WIDTH, num_warps=JUDGE_WARPS,
        )  # fmt: skip
        for run in self._moves:
            adamw[(run.chunks,)](
                self._tensors, self._chunks, self._options, self._corrections, self._verdict, run.first,
                average_weight, AVERAGED=self._averaged, **_program(run),
            )  # fmt: skip
        return Verdict(*self._verdict.unbind())

    def _upload_tables(self, table: np.ndarray, dtypes: Sequence[torch.dtype], count: int) -> None:
        """Sorted: the `count` that AdamW moves come first, and what is launched together lies together."""
        number = np.array([[*_DTYPES].index(dtype) for dtype in dtypes])
        bytes_ = np.array([dtype.itemsize for dtype in dtypes])
        aligned = (table[:, [column.value for column in (GRADIENT, *_OWN)]] % _VECTOR == 0).all(axis=1)
        kinds = np.stack([np.arange(len(table)) >= count, number, np.where(aligned, _VECTOR, bytes_)], axis=1)
        order = np.lexsort(kinds.T[::-1])
        table, kinds = table[order], kinds[order, 1:]
        self._tensors, self._count = self._upload(table), count
        sizes = table[:, ELEMENTS.value].tolist()
        counts = [-(-size // BLOCK) for size in sizes]
        if sizes != self._sizes:
            tensors = np.repeat(np.arange(len(counts)), counts)
            first = np.cumsum([0, *counts[:-1]])
            chunks = np.stack([tensors, np.arange(len(tensors)) - first[tensors]], axis=1)
            self._chunks, self._sizes = self._upload(chunks.astype(np.int32)), sizes
            self._sums = torch.empty(len(tensors), device=self._device)
            self._corrections = torch.empty(len(sizes), 2, device=self._device)
        self._norms = [*_runs(kinds, counts)]
        self._moves = [*_runs(kinds[:count], counts)]

    def _upload(self, table: np.ndarray) -> Tensor:
        """To the device; pinned memory, as the host would wait for the device with any other."""
        host = torch.from_numpy(table)
        if self._device.type != "cuda":
            return host
        return host.pin_memory().to(self._device, non_blocking=True)


def _table(moved: Moved, judged: Judged) -> np.ndarray:
    """int64 [tensors, columns]: those that AdamW moves, then the others, in the given order."""
    gradients, count = [*moved.gradients, *judged.gradients], len(moved.gradients)
    table = np.zeros((len(gradients), COLUMNS.value), np.int64)
    table[:, ELEMENTS.value] = [*map(Tensor.numel, gradients)]
    table[:, PLACE.value] = [*moved.places, *judged.places]
    table[:count, GROUP.value] = moved.groups
    table[:, GRADIENT.value] = [*map(Tensor.data_ptr, gradients)]
    for column, tensors in zip((*_OWN, STEP), (*moved[1:4], moved.averages, moved.steps), strict=True):
        if tensors:
            table[:count, column.value] = [*map(Tensor.data_ptr, tensors)]
    return table


def misfit(moved: Moved, judged: Judged, device: torch.device) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    for step in moved.steps:
        if (step.dtype, step.numel(), step.device) != (torch.float32, 1, device):
            return f"a step count is {_describe(step)}; it must be an fp32 scalar on {device}"
    own = {"weights": moved.weights, "means": moved.means, "squares": moved.squares, "averages": moved.averages}
    for name, tensors in {"gradients": [*moved.gradients, *judged.gradients], **own}.items():
        if not _fit(tensors, device):
            wrong = next(tensor for tensor in tensors if not _fit([tensor], device))
            return f"one of the {name} is {_describe(wrong)}; it must be contiguous fp32 or bf16 on {device}"
    kinds = [(gradient.dtype, gradient.numel()) for gradient in moved.gradients]
    for name, tensors in own.items():
        found = [(tensor.dtype, tensor.numel()) for tensor in tensors]
        if found != kinds and (tensors or name != "averages"):
            wrong, gradient = next(pair for pair in zip(tensors, moved.gradients, strict=True) if not _alike(*pair))
            return f"one of the {name} is {_describe(wrong)}, beside a gradient that is {_describe(gradient)}"
    return None


def _fit(tensors: Sequence[Tensor], device: torch.device) -> bool:
    return (
        {tensor.dtype for tensor in tensors} <= _DTYPES.keys()
        and {tensor.device for tensor in tensors} <= {device}
        and {tensor.layout for tensor in tensors} <= {torch.strided}
        and all(map(Tensor.is_contiguous, tensors))
        and max(map(Tensor.numel, tensors), default=0) <= 2**30
    )


def _alike(one: Tensor, two: Tensor) -> bool:
    return (one.dtype, one.numel()) == (two.dtype, two.numel())


def _describe(tensor: Tensor) -> str:
    strides = tensor.stride() if tensor.layout == torch.strided else tensor.layout
    return f"{tensor.dtype} {tuple(tensor.shape)} of strides {strides} on {tensor.device}"


def _runs(kinds: np.ndarray, chunks: Sequence[int]) -> Iterator[_Run]:
    """From the kind of each tensor (number of the dtype, bytes) and the number of its chunks."""
    first = 0
    for (number, bytes_), together in itertools.groupby(
        zip(map(tuple, kinds.tolist()), chunks, strict=False), lambda entry: entry[0]
    ):
        count = sum(own for _, own in together)
        if count:
            yield _Run(first, count, [*_DTYPES][number], bytes_)
        first += count


def _program(run: _Run) -> dict[str, Any]:
    return {"DTYPE": _DTYPES[run.dtype], "BYTES": run.bytes, "BLOCK": BLOCK, "num_warps": WARPS}


def _with_log(beta: float) -> tuple[float, float]:
    """A beta as fp32 has it, and the logarithm of just that: a mean is then divided by the sum of its weights."""
    rounded = float(np.float32(beta))
    return rounded, math.log(rounded) if rounded > 0 else -math.inf


def trial(device: torch.device, averaged: bool) -> bool:
    """Whether a first step of two small parameters, which compiles the kernels, gives what it must."""

    def twice(value: float) -> list[Tensor]:
        return [torch.full((n,), value, device=device) for n in (1, BLOCK + 1)]

    weights, averages, steps = twice(1.0), twice(0.0), [torch.zeros((), device=device) for _ in range(2)]
    moved = Moved(twice(-2.0), weights, twice(0.0), twice(0.0), steps, averages if averaged else [], range(2), range(2))
    counts = Counts(torch.zeros(3, device=device), torch.zeros(2, dtype=torch.bool, device=device))
    options = [Options(0.5, 0.0, 0.9, 0.999, 0.0)] * 2
    fused = FusedAdamW(device)
    if (why := fused.locate(moved, Judged([], []))) is not None:
        raise ValueError(why)
    fused(options, counts, average_weight=0.25)
    expected = [1.5] * 2 + [0.375] * 2 * averaged
    found = [*weights, *(averages if averaged else ())]
    return all(bool(((x - y).abs() < 1e-5).all()) for x, y in zip(found, expected, strict=True))

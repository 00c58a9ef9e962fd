"""Gradients summed over all processes while backward still runs: what training needs of DistributedDataParallel.

DDP copies each gradient into its buckets with a kernel of its own, some 340 for a Vim-Tiny. Here one fused call copies
all of a bucket's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

# On four H200s one bucket for all 29 MB of a Vim-Tiny, reduced after backward, beats several that are reduced beside
# it and take multiprocessors from it: 23.3 ms a step, 23.5 with buckets of 8 MB, 24.1 with 1 MB.
BUCKET_BYTES = 64 << 20
_ALIGNMENT = 32  # elements: fused kernels load 16 bytes at once


class _Bucket(NamedTuple):
    """Gradients that are reduced together."""

    flat: Tensor  # all of them, one after the other
    parameters: list[nn.Parameter]
    views: list[Tensor]  # of `flat`, shaped as the parameters


class GradientSum:
    """Sums the gradients of `parameters`, by name, over the processes of the default group, bucket by bucket.

    The first backward pass under :meth:`reducing` shows in which order gradients come; buckets are filled in that order
    (rank 0's), so that all but the last are reduced while backward continues with earlier layers. Each process sees
    every bucket in the same order. After the block ``p.grad`` is a view of a bucket and holds the sum.

    It can be captured in a CUDA graph after a first backward pass.

    A parameter that gets no gradient in a later pass counts as zero there.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
        self.processes = dist.get_world_size()
        self._bucket_bytes = bucket_bytes
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._active = False
        self._arrived: list[nn.Parameter] = []  # in the first pass
        self._missing: list[int] = []  # gradients still to come, of each bucket
        self._works: list[dist.Work] = []
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._parameters = list(self._names)
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    @contextmanager
    def reducing(self) -> Iterator[None]:
        """Backward passes in the block are reduced; when it ends the current stream waits for the sums.

        Raises:
            RuntimeError: a parameter has its first gradient only now, and the other processes don't know of it.
        """
        self._active, self._works = True, []
        self._missing = [len(bucket.parameters) for bucket in self._buckets]
        try:
            yield
        finally:
            self._active = False
        if not self._buckets:
            self._build()
        for bucket in self._buckets[len(self._works) :]:
            self._reduce(bucket)
        for work in self._works:
            work.wait()

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if not self._active:
            return
        if not self._buckets:
            self._arrived.append(parameter)
            return
        if parameter not in self._bucket_of:
            raise RuntimeError(
                f"parameter {self._names[parameter]} got its first gradient after the first step, or not on rank 0; "
                "use every trained parameter in the first step on rank 0, or freeze it with requires_grad_(False)"
            )
        self._missing[self._bucket_of[parameter]] -= 1
        while len(self._works) < len(self._buckets) and self._missing[len(self._works)] == 0:
            self._reduce(self._buckets[len(self._works)])

    def _reduce(self, bucket: _Bucket) -> None:
        fresh, views = [], []
        for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad is not view:
                fresh.append(parameter.grad)
                views.append(view)
            parameter.grad = view
        if fresh:
            torch._foreach_copy_(views, fresh)
        work = dist.all_reduce(bucket.flat, async_op=True)
        assert work is not None
        self._works.append(work)

    def _build(self) -> None:
        places = {parameter: i for i, parameter in enumerate(self._parameters)}
        earlier = [p for p in self._parameters if p.grad is not None]  # without one in this pass, but with accumulation
        order = [[places[parameter] for parameter in dict.fromkeys([*self._arrived, *earlier])]]
        dist.broadcast_object_list(order, src=0)
        parts: list[list[nn.Parameter]] = []
        size = 0
        for parameter in (self._parameters[i] for i in order[0]):
            if not parts or size >= self._bucket_bytes or parts[-1][0].dtype != parameter.dtype:
                parts.append([])
                size = 0
            parts[-1].append(parameter)
            size += parameter.numel() * parameter.element_size()
        self._buckets = [_bucket(part) for part in parts]
        self._bucket_of = {p: i for i, bucket in enumerate(self._buckets) for p in bucket.parameters}


def _bucket(parameters: list[nn.Parameter]) -> _Bucket:
    lengths = [-(-p.numel() // _ALIGNMENT) * _ALIGNMENT for p in parameters]
    flat = torch.zeros(sum(lengths), dtype=parameters[0].dtype, device=parameters[0].device)
    views = [part[: p.numel()].view(p.shape) for p, part in zip(parameters, flat.split(lengths), strict=True)]
    return _Bucket(flat, parameters, views)


@torch.no_grad()
def copy_from_first(module: nn.Module, *, buffers_only: bool = False) -> None:
    """Give every process the parameters and buffers (running statistics, say) that rank 0 has; alone, do nothing."""
    if not dist.is_initialized():
        return
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    for tensor in [*module.buffers()] if buffers_only else [*module.parameters(), *module.buffers()]:
        there = tensor.to(device)  # itself, unless an average is kept in host memory
        dist.broadcast(there, src=0)
        tensor.copy_(there)

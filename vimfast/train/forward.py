"""What models answer to images, without gradients; on a GPU replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vimfast.models.grey import Grey
from vimfast.train.graphs import Lead, Pool, aside, record


class _Captured(NamedTuple):
    """Forward passes of all models over one batch."""

    images: Tensor  # as the graph reads them
    graph: torch.cuda.CUDAGraph
    logits: list[Tensor]  # where it leaves them


class Forward:
    """Answers of several models to the same images; the host waits for nothing but the GPU's lead.

    Batches of one size are replayed as a single CUDA graph, which is captured when the first of them arrives; all
    others, a short last one for example, are launched operation by operation. The bits are the same either way. A model
    with hooks, which no replay would call, is always launched.

    The graph reads the models' weights where they lay when it was captured: change them in place.

    Args:
        models: images [B, 3, H, W] to logits [B, K]; in evaluation mode whenever this is called.
        amp: the context to run under; autocast without a weight cache (``cache_enabled=False``).
        device: of models and images.
        batch: images of a batch that is replayed; None: all are launched.
        pool: memory to share with other graphs that never run beside this one; None: memory of its own.
        warn: is told, in a sentence, if nothing can be captured.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        amp: AbstractContextManager[object],
        device: torch.device,
        *,
        batch: int | None = None,
        pool: Pool | None = None,
        warn: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.models, self._amp, self._batch, self._pool, self._warn = list(models), amp, batch, pool, warn
        self._captured: _Captured | None = None
        self._lead = Lead(device)

    @property
    def captured(self) -> bool:
        """Whether there is a graph."""
        return self._captured is not None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """The logits of each model, fp32 [B, K]; the next call may overwrite them.

        Args:
            images: [B, 3, H, W] on the device; those that are replayed must all have one H and W.
        """
        captured = self._captured_for(images)
        if captured is None:
            logits = self._launch(images)
        else:
            captured.images.copy_(images)
            captured.graph.replay()
            logits = captured.logits
        self._lead.mark()
        return logits

    def _captured_for(self, images: Tensor) -> _Captured | None:
        """The graph for a batch, captured now if there is none yet; None: it is to be launched."""
        if len(images) != self._batch or any(map(_is_watched, self.models)):
            return None
        if self._captured is None:
            self._capture(images)
        return self._captured

    def _launch(self, images: Tensor) -> list[Tensor]:
        with self._amp:
            logits = [model(images) for model in self.models]
        return [own.float() for own in logits]

    def _capture(self, images: Tensor) -> None:
        """Where that fails, all batches are launched. Other threads may use the GPU meanwhile."""
        try:
            with aside(images.device):
                self._launch(images)  # libraries make their handles, kernels are compiled
            self._captured = self._record(images)
        except RuntimeError as error:  # of memory too: what is launched may need less, or says so itself
            self._batch = None
            why = " ".join(str(error).split())
            self._warn(f"evaluation cannot be a CUDA graph ({why[:200]}); --no-cuda-graph avoids this warning")

    def _record(self, images: Tensor) -> _Captured:
        def work() -> tuple[Tensor, list[Tensor]]:
            own = torch.empty_like(images)  # in the graph's memory, as all that it leaves
            return own, self._launch(own)

        graph, (own, logits) = record(work, images.device, pool=self._pool)
        return _Captured(own, graph, logits)


def _is_watched(model: nn.Module) -> bool:
    """Whether code of others is called in its forward pass."""
    hooks = (
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    return any(not isinstance(getattr(hook, "__self__", None), Grey) for hook in hooks)

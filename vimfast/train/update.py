"""The end of a training step: gradients are judged and clipped, weights updated, and their average with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from vimfast import dist
from vimfast.train.muon import Muon
from vimfast.train.optim import Averaged, WeightAverage
from vimfast_kernels.update import why_not
from vimfast_kernels.update.tensors import Counts, Judged, Moved, Options

if TYPE_CHECKING:
    from vimfast_kernels.update.launch import FusedAdamW


class Health(NamedTuple):
    """What became of steps with non-finite gradients: they change no weights."""

    skipped: int  # of all steps
    in_a_row: int  # longest run of skipped steps
    names: list[str]  # the parameters that were non-finite first, in the model's order


class Buffers:
    """The buffers of a model (running statistics, say), which forward passes change, and what they were before."""

    def __init__(self, model: nn.Module) -> None:
        self._now = [*model.buffers()]
        self._before = [buffer.clone() for buffer in self._now]

    def keep(self) -> None:
        """Remember them as they are."""
        if self._now:
            torch._foreach_copy_(self._before, self._now)

    def restore(self) -> None:
        """Have them be what they were."""
        if self._now:
            torch._foreach_copy_(self._now, self._before)

    def restore_where(self, bad: Tensor) -> None:
        """The same where a scalar on the device is not 0."""
        for now, before in zip(self._now, self._before, strict=True):
            torch.where(bad > 0, before, now, out=now)


class Update:
    """Updates a model from its gradients; with a fused optimizer the host waits for nothing.

    If the gradients hold an infinity or a NaN, the step is skipped and counted: weights, buffers and optimizer state
    stay as they are.

    On a GPU, norms, AdamW and the average are three launches of :mod:`vimfast_kernels.update`, also for those of Muon's
    parameters that AdamW moves. For other optimizers, and for parameters that the kernels do not take, they are torch's
    operations. The optimizer's state is the same.

    Args:
        model, optimizer: that moves its parameters.
        average: of the weights; updated after each step.
        buffers: the model's.
        clip_grad: largest norm of all gradients together; None for no clipping.
        several: processes update the same weights, and all call this together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        average: ModelEmaV3 | None,
        buffers: Buffers,
        *,
        clip_grad: float | None,
        several: bool,
    ) -> None:
        self._model, self._optimizer, self._average, self._buffers = model, optimizer, average, buffers
        self._clip_grad, self._several = clip_grad, several
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names, self._parameters = [name for name, _ in named], [p for _, p in named]
        self._places = {p: place for place, p in enumerate(self._parameters)}
        self._device = self._parameters[0].device
        self._counts = Counts(
            torch.zeros(3, device=self._device), torch.zeros(len(named), dtype=torch.bool, device=self._device)
        )
        self._averages: dict[nn.Parameter, Tensor] = {}  # those that the kernels move
        if type(average) is WeightAverage and average.foreach and not average.exclude_buffers:
            self._averages = dict(zip(model.parameters(), average.module.parameters(), strict=True))
        self._others: tuple[list[int], Averaged] | None = None  # places that the kernels average, what is left of it
        self._prepared = False
        self._fused: FusedAdamW | None = None

    def prepare(self) -> None:
        """Compile the kernels, if any are used, so that the first step does not have to."""
        if not self._prepared and adamw_groups(self._optimizer) is not None:
            serve = why_not(self._device, bool(self._averages)) is None
            if self._several and self._device.type == "cuda":  # results differ in their last bits
                serve = all(dist.gather_objects(serve))
            if serve:
                from vimfast_kernels.update.launch import FusedAdamW

                self._fused = FusedAdamW(self._device)
        self._prepared = True

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Returns: 1.0 if the step counts, 0.0 if it was skipped; an fp32 scalar on the device."""
        self.prepare()
        bad = self._by_kernels()
        return 1 - (self._by_operations() if bad is None else bad)

    # With kernels

    def _by_kernels(self) -> Tensor | None:
        """1.0 where the step was skipped; None: nothing is done yet, as the kernels do not serve."""
        groups = adamw_groups(self._optimizer)
        if self._fused is None or groups is None:
            return None
        if any(p not in self._places for group in self._optimizer.param_groups for p in group["params"]):
            return None
        moved, judged = self._with_gradients(groups)
        if self._fused.locate(moved, judged) is not None:
            return None
        decay = self._average.get_decay() if self._average is not None and self._averages else 1.0
        bad, factor = self._fused(
            [options(group) for group in self._optimizer.param_groups],
            self._counts,
            average_weight=1.0 - decay,
            largest=self._clip_grad,
        )
        self._buffers.restore_where(bad)
        if judged.gradients and self._clip_grad is not None:
            torch._foreach_mul_([*judged.gradients], factor)
        if isinstance(self._optimizer, Muon):
            self._optimizer.found_inf = bad
            self._optimizer.step_matrices()
        self._average_others([*moved.places], decay)
        return bad

    def _with_gradients(self, groups: Mapping[int, dict[str, Any]]) -> tuple[Moved, Judged]:
        """Those of AdamW's groups, and the others."""
        moved = [
            (p.grad, p, *_state(self._optimizer, p), self._averages.get(p), self._places[p], number)
            for number, group in groups.items()
            for p in group["params"]
            if p.grad is not None
        ]
        columns: list[list[Any]] = [list(column) for column in zip(*moved, strict=True)] or [[] for _ in Moved._fields]
        if not self._averages:
            columns[5] = []
        known = set(columns[6])
        others = [(p.grad, i) for i, p in enumerate(self._parameters) if p.grad is not None and i not in known]
        return Moved(*columns), Judged([gradient for gradient, _ in others], [place for _, place in others])

    def _average_others(self, places: list[int], decay: float) -> None:
        """What the kernels do not average: buffers, and parameters that they do not move."""
        if self._average is None:
            return
        if not isinstance(self._average, WeightAverage) or not self._averages:  # not the kernels' business
            self._average.update(self._model)
            return
        if self._others is None or self._others[0] != places:
            done = {self._averages[self._parameters[place]].data_ptr() for place in places}
            self._others = places, self._average.besides(self._model, done)
        self._average.move(self._others[1], decay)

    # With torch's operations

    def _by_operations(self) -> Tensor:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        found, nothing = iter(torch._foreach_norm(gradients)), torch.zeros((), device=self._device)
        norms = torch.stack([nothing if p.grad is None else next(found) for p in self._parameters])
        total = norms.norm()
        bad = (~torch.isfinite(total)).float()
        self._note(bad, norms)
        self._buffers.restore_where(bad)
        if self._clip_grad is not None:
            torch._foreach_mul_(gradients, (self._clip_grad / (total + 1e-6)).clamp(max=1.0))
        if self._optimizer.defaults.get("fused"):
            self._optimizer.found_inf = bad  # type: ignore[attr-defined]  # the fused kernels read it and do nothing
            self._optimizer.step()
        elif not bool(bad):  # other optimizers know no such flag: the host has to wait and see
            self._optimizer.step()
        if self._average is not None:
            self._average.update(self._model)
        return bad

    def _note(self, bad: Tensor, norms: Tensor) -> None:
        total, row, longest = self._counts.skipped
        first = (total == 0) & (bad > 0)
        self._counts.first_bad.logical_or_(~torch.isfinite(norms) & first)
        total += bad
        row.add_(bad).mul_(bad)
        torch.maximum(longest, row, out=longest)

    # Health

    def forget_skips(self) -> None:
        """Count from 0 again."""
        self._counts.skipped.zero_()
        self._counts.first_bad.zero_()

    @property
    def counts(self) -> Tensor:
        """fp32 [3] on the device: steps skipped in all, in a row up to now, and the longest row."""
        return self._counts.skipped

    def health(self) -> Health:
        """Skipped steps so far; the host waits for the device."""
        total, _, longest = (int(v) for v in self._counts.skipped.tolist())
        bad = self._counts.first_bad.tolist() if total else []
        return Health(total, longest, [name for name, is_bad in zip(self._names, bad, strict=False) if is_bad])


def adamw_groups(optimizer: Optimizer) -> dict[int, dict[str, Any]] | None:
    """By number, the groups of parameters whose step is AdamW's, as the kernels have it; None: call the optimizer.

    Its class decides, as one derived from AdamW may do anything else. What hooks into its ``step`` has to be called.
    """
    if type(optimizer) not in (AdamW, Muon) or "step" in vars(optimizer) or any(_hooks(optimizer)):
        return None
    groups = {i: group for i, group in enumerate(optimizer.param_groups) if not group.get("muon")}
    for group in groups.values():
        numbers = all(isinstance(value, (int, float)) for value in options(group))
        if not group.get("fused") or not numbers or any(map(group.get, ("amsgrad", "maximize", "differentiable"))):
            return None
    return groups


def options(group: Mapping[str, Any]) -> Options:
    """AdamW's, of a group of parameters."""
    beta1, beta2 = group["betas"]
    return Options(group["lr"], group["weight_decay"], beta1, beta2, group["eps"])


def _hooks(optimizer: Optimizer) -> Iterable[Any]:
    for kind in ("pre", "post"):
        yield getattr(optimizer, f"_optimizer_step_{kind}_hooks", None)
        yield getattr(torch_optimizer, f"_global_optimizer_{kind}_hooks", None)


def _state(optimizer: Optimizer, p: nn.Parameter) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW's means, and steps, of a parameter; made as torch makes them where there are none."""
    state: dict[str, Tensor] = optimizer.state[p]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return state["exp_avg"], state["exp_avg_sq"], state["step"]

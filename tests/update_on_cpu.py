"""Run by test_update.py with TRITON_INTERPRET=1: the kernels of an update on a CPU; prints what it found as JSON."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import quick_interpreter  # noqa: F401  # the same values in less than half of the time
import torch
import torch.nn.functional as F
from adamw_float64 import BETAS, LARGEST, NOTHING, OPTIONS, SHAPES, Parameters
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vimfast.config import EmaConfig, OptimConfig
from vimfast.train import update
from vimfast.train.optim import build_ema, build_optimizer
from vimfast.train.step import TrainStep
from vimfast_kernels.update import launch
from vimfast_kernels.update.launch import FusedAdamW
from vimfast_kernels.update.tensors import Judged, Moved

launched = 0
original = FusedAdamW.__call__


def counted(self: FusedAdamW, *args: Any, **kwargs: Any) -> Any:
    global launched
    launched += 1
    return original(self, *args, **kwargs)


FusedAdamW.__call__ = counted  # type: ignore[method-assign]


def located(moved: Moved, judged: Judged = NOTHING) -> FusedAdamW:
    fused = FusedAdamW(torch.device("cpu"))
    why = fused.locate(moved, judged)
    assert why is None, why
    return fused


def run(parameters: Parameters) -> float:
    """The error of several steps."""
    fused, exact = located(parameters.moved()), parameters.exact()
    for average_weight in parameters.draw():
        exact.step(parameters.gradients, average_weight)
        fused(OPTIONS, parameters.counts, average_weight=average_weight, largest=LARGEST)
    assert all(step.item() == exact.steps for step in parameters.steps)
    assert not parameters.counts.skipped.any()
    return parameters.error(exact)


def unaligned(aligned: Parameters) -> int:
    """How many tensors differ where gradients begin anywhere."""
    other = Parameters("cpu", shift=3)
    run(other)
    pairs = zip([*aligned.state(), *aligned.averages], [*other.state(), *other.averages], strict=True)
    return sum(not torch.equal(x, y) for x, y in pairs)


def skipped() -> dict[str, Any]:
    """Steps with an infinity or a NaN at the end of a chunk, of a tensor, or in the only element."""
    parameters = Parameters("cpu")
    fused = located(parameters.moved())
    found = []
    bad = {0: (3, 2048, "nan"), 2: (0, 0, "inf"), 3: (4, 2047, "-inf")}
    for number, _ in enumerate(parameters.draw()):
        before, averages = copy.deepcopy(parameters.state()), copy.deepcopy(parameters.averages)
        if number in bad:
            place, at, value = bad[number]
            parameters.gradients[place].view(-1)[at] = float(value)
        verdict = fused(OPTIONS, parameters.counts, average_weight=0.25)
        same = [torch.equal(x, y) for x, y in zip(before, parameters.state(), strict=True)]
        assert verdict.bad.item() == (number in bad)
        assert all(same) if number in bad else not any(same)
        assert all(x.isfinite().all() for x in parameters.averages)
        assert not any(torch.equal(x, y) for x, y in zip(averages, parameters.averages, strict=True))
        found.append(parameters.counts.skipped.tolist())
    return {"counts": found, "first": parameters.counts.first_bad.nonzero().flatten().tolist()}


def first_average() -> bool:
    """With a weight of 1, as the warm-up begins, the average is the weights to the bit."""
    parameters = Parameters("cpu")
    next(parameters.draw())
    located(parameters.moved())(OPTIONS, parameters.counts, average_weight=1.0)
    return all(map(torch.equal, parameters.weights, parameters.averages))


def judged() -> dict[str, Any]:
    """Gradients that something else moves count for norm and verdict, and are only read."""
    parameters = Parameters("cpu")
    moved = parameters.moved()
    next(parameters.draw())
    others = Judged([torch.full((5000,), 3.0), torch.ones(2, dtype=torch.bfloat16)], [3, 4])
    fewer = Moved(*(column[:3] for column in moved))
    fused = located(fewer, others)
    verdict = fused(OPTIONS, parameters.counts, largest=1.0)
    everything = torch.cat([g.double().flatten() for g in (*fewer.gradients, *others.gradients)])
    error = abs(verdict.factor.item() * (everything.norm().item() + 1e-6) - 1)
    untouched = bool((others.gradients[0] == 3).all())
    others.gradients[1][1] = float("nan")
    fused(OPTIONS, parameters.counts, largest=1.0)
    return {
        "error": error,
        "untouched": untouched,
        "first": parameters.counts.first_bad.nonzero().flatten().tolist(),
        "moved": [int(step.item()) for step in parameters.steps],
    }


# Whole steps, with the kernels and with torch's operations


class Model(nn.Module):
    """With running statistics, a counter, frozen weights, and a parameter that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.hidden = nn.Linear(7, 300)
        self.unused = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(300, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.frozen(self.norm(x)))))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": "norm|frozen", "blocks": [("hidden", (0,)), ("unused|head", (99999,))]}


def build(opt: str, clip: float | None, average: str, accum_steps: int, layer_decay: float | None) -> TrainStep:
    torch.manual_seed(0)
    model = Model().train()
    settings = OptimConfig(opt=opt, layer_decay=layer_decay, weight_decay=0.1, opt_betas=BETAS)
    optimizer = build_optimizer(settings, model, 1e-2)
    averages = {
        "warm-up": lambda: build_ema(EmaConfig(model_ema_decay=0.99, model_ema_warmup=True), model),
        "timm's": lambda: ModelEmaV3(model, decay=0.9),
        "none": lambda: None,
    }
    return TrainStep(
        model,
        optimizer,
        lambda images, logits, targets: F.cross_entropy(logits, targets),
        amp=torch.autocast("cpu", enabled=False),
        average=averages[average](),
        clip_grad=clip,
        accum_steps=accum_steps,
    )


def train(step: TrainStep, numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        if hasattr(step.average, "updates"):
            step.average.updates = number + 1
        for group in step.optimizer.param_groups:  # a schedule that moves each step
            group["lr"] = 1e-2 * (1 - number / 10) * group.get("lr_scale", 1.0)
        for part in range(step.accum_steps):
            images = torch.randn(6, 7, generator=generator)
            if number == 2 and part == 0:
                images[0, 0] = float("nan")
            targets = torch.rand(6, 5, generator=generator).softmax(1)
            step(images, targets, first=part == 0, last=part == step.accum_steps - 1)


def tensors(step: TrainStep) -> dict[str, Tensor]:
    found = {f"model.{name}": x for name, x in step.model.state_dict().items()}
    if step.average is not None:
        found |= {f"average.{name}": x for name, x in step.average.module.state_dict().items()}
    for i, state in step.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{i}.{name}": x for name, x in state.items()}
    return found


def difference(one: TrainStep, two: TrainStep) -> float:
    """The largest relative one of a tensor."""
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    assert all(x.dtype == second[name].dtype and x.shape == second[name].shape for name, x in first.items())
    assert one.health() == two.health(), (one.health(), two.health())
    return max(
        float((x.double() - second[name].double()).norm() / second[name].double().norm().clamp_min(1e-12))
        for name, x in first.items()
    )


def with_kernels(on: bool) -> None:
    update.why_not = lambda device, averaged: None if on else "switched off"


def compare(opt: str, **options: Any) -> dict[str, Any]:
    """Six steps, the third of which is skipped; the last three after the state has changed hands."""
    whole, parts = build(opt, **options), build(opt, **options)
    with_kernels(False)
    before = launched
    train(whole, range(6))
    assert launched == before
    with_kernels(True)
    train(parts, range(3))
    used = launched - before
    half = difference_of_half(opt, parts, options)
    train(parts, range(3, 6))
    return {"launched": used, "error": difference(parts, whole), "of half": half}


def difference_of_half(opt: str, parts: TrainStep, options: dict[str, Any]) -> float:
    """How far apart are steps with torch's operations and steps with kernels, both resumed from the kernels' state."""
    resumed = []
    for on in (True, False):
        with_kernels(on)
        step = build(opt, **options)
        step.model.load_state_dict(parts.model.state_dict())
        step.optimizer.load_state_dict(copy.deepcopy(parts.optimizer.state_dict()))
        if step.average is not None:
            step.average.module.load_state_dict(parts.average.module.state_dict())
        train(step, range(3, 6))
        resumed.append(step)
    with_kernels(True)
    return difference(*resumed)


def resumed_bits() -> int:
    """How many tensors of a resumed run differ from those of one that was not stopped, both with kernels; the state is
    loaded into an optimizer that has already run, as a run that is rolled back does."""
    options = {"clip": 0.5, "average": "warm-up", "accum_steps": 1, "layer_decay": 0.7}
    whole, parts = build("adamw", **options), build("adamw", **options)
    train(whole, range(3))
    train(parts, range(2))
    parts.model.load_state_dict(whole.model.state_dict())
    parts.average.module.load_state_dict(whole.average.module.state_dict())
    parts.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    train(whole, range(3, 6))
    train(parts, range(3, 6))
    first, second = tensors(whole), tensors(parts)
    return sum(not torch.equal(x, second[name]) for name, x in first.items())


def not_taken() -> int:
    """Launches for parameters of a layout that the kernels do not take: none, and steps are taken all the same."""
    global launched
    before = launched
    step = build("adamw", None, "none", 1, None)
    step.model.hidden.weight.data = step.model.hidden.weight.data.t().contiguous().t()
    weights = step.model.hidden.weight.clone()
    train(step, range(2))
    assert not torch.equal(weights, step.model.hidden.weight)
    return launched - before


def main() -> None:
    assert (launch.BLOCK,) in SHAPES
    torch.manual_seed(0)
    with_kernels(True)
    parameters = Parameters("cpu")
    found = {
        "trial": [launch.trial(torch.device("cpu"), averaged) for averaged in (True, False)],
        "fp32": run(parameters),
        "bf16": run(Parameters("cpu", torch.bfloat16)),
        "unaligned": unaligned(parameters),
        "skipped": skipped(),
        "first average": first_average(),
        "judged": judged(),
        "steps": {
            "adamw and everything": compare("adamw", clip=0.5, average="warm-up", accum_steps=2, layer_decay=0.7),
            "adamw": compare("adamw", clip=None, average="timm's", accum_steps=1, layer_decay=None),
            "muon and everything": compare("muon", clip=0.5, average="warm-up", accum_steps=1, layer_decay=0.7),
        },
        "resumed": resumed_bits(),
        "not taken": not_taken(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())

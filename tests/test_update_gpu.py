"""The end of a step on a GPU: its kernels beside float64 and torch's operations. Needs a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adamw_float64 import LARGEST, NOTHING, OPTIONS, Parameters
from torch import Tensor

from vimfast.config import EmaConfig, OptimConfig
from vimfast.models import create_model
from vimfast.train.optim import build_ema, build_optimizer
from vimfast.train.step import TrainStep
from vimfast_kernels.update import why_not

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")
EVERYTHING = {"clip": 1.0, "layer_decay": 0.7, "warm_up": True}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients: those of the patch embedding are cuDNN's."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def run(parameters: Parameters) -> float:
    """The error of several steps."""
    from vimfast_kernels.update.launch import FusedAdamW

    fused, exact = FusedAdamW(parameters.device), parameters.exact()
    assert fused.locate(parameters.moved(), NOTHING) is None
    for average_weight in parameters.draw():
        exact.step(parameters.gradients, average_weight)
        fused(OPTIONS, parameters.counts, average_weight=average_weight, largest=LARGEST)
    return parameters.error(exact)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.bfloat16, 1.2e-2)], ids=str)
def test_kernels_match_float64(dtype: torch.dtype, bar: float, poison: None) -> None:
    assert why_not(DEVICE, True) is None
    assert run(Parameters("cuda:0", dtype)) < bar


def test_unaligned_gradients_give_the_same() -> None:
    """But for the order of the norm's sum, which is that of the threads, and a thread loads 16 bytes where it can."""
    one, two = Parameters("cuda:0"), Parameters("cuda:0", shift=3)
    run(one)
    run(two)
    for x, y in zip([*one.state(), *one.averages], [*two.state(), *two.averages], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def build(opt: str, clip: float | None, layer_decay: float | None, warm_up: bool, accum_steps: int = 1) -> TrainStep:
    torch.manual_seed(0)
    options = {"img_size": 64, "depth": 3, "embed_dim": 64, "num_classes": 10, "drop_path_rate": 0.0}
    model = create_model("vim_tiny_patch16_224", **options).to(DEVICE).train()
    return TrainStep(
        model,
        build_optimizer(OptimConfig(opt=opt, layer_decay=layer_decay), model, 1e-3),
        lambda images, logits, targets: F.cross_entropy(logits, targets),
        amp=torch.autocast("cuda", torch.bfloat16, cache_enabled=False),
        average=build_ema(EmaConfig(model_ema_decay=0.99, model_ema_warmup=warm_up), model),
        clip_grad=clip,
        accum_steps=accum_steps,
    )


def train(step: TrainStep, numbers: range, *, capture: bool = True) -> None:
    """Steps of these numbers, on batches that are functions of them; that of step 2 has a NaN."""
    for number in numbers:
        assert step.average is not None
        step.average.updates = number + 1
        for part in range(step.accum_steps):
            generator = torch.Generator("cuda").manual_seed(100 * number + part)
            images = torch.randn(8, 3, 64, 64, device=DEVICE, generator=generator)
            targets = torch.rand(8, 10, device=DEVICE, generator=generator).softmax(1)
            if capture and not step.captured:
                step.capture(images, targets)
            if number == 2:
                images[0, 0, 0, 0] = float("nan")
            step(images, targets, first=part == 0, last=part == step.accum_steps - 1)


def tensors(step: TrainStep) -> dict[str, Tensor]:
    assert step.average is not None
    states: dict[int, dict[str, Tensor]] = step.optimizer.state_dict()["state"]
    return {
        **{f"model.{name}": x for name, x in step.model.state_dict().items()},
        **{f"average.{name}": x for name, x in step.average.module.state_dict().items()},
        **{f"optimizer.{i}.{name}": x for i, state in states.items() for name, x in state.items()},
    }


def same_bits(one: TrainStep, two: TrainStep) -> bool:
    first, second = tensors(one), tensors(two)
    return first.keys() == second.keys() and all(torch.equal(x, second[name]) for name, x in first.items())


def load(step: TrainStep, other: TrainStep) -> None:
    step.model.load_state_dict(other.model.state_dict())
    step.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
    assert step.average is not None
    assert other.average is not None
    step.average.module.load_state_dict(other.average.module.state_dict())


@pytest.mark.parametrize(
    ("opt", "options", "atol"),
    [
        ("adamw", {"clip": None, "layer_decay": None, "warm_up": False}, 1e-7),
        ("adamw", {**EVERYTHING, "accum_steps": 2}, 1e-7),
        ("muon", EVERYTHING, 2e-5),  # products in bf16, of gradients that may differ in their last bits
    ],
    ids=["plain", "everything", "muon"],
)
def test_captured_steps_are_those_of_torch(opt: str, options: dict[str, Any], atol: float) -> None:
    """Each from the weights and the state that the kernels have left; and the same bits in another run."""
    kernels, again, plain = (build(opt, **options) for _ in range(3))
    plain._update._prepared = True  # it does not try the kernels
    for number in range(6):
        load(plain, kernels)
        for step in (kernels, again, plain):
            train(step, range(number, number + 1))
        found = tensors(kernels)
        for name, x in tensors(plain).items():
            torch.testing.assert_close(found[name], x, rtol=2e-6, atol=atol, msg=f"{name}, step {number}")
    assert kernels._update._fused is not None
    assert plain._update._fused is None
    assert same_bits(kernels, again)
    assert kernels.health() == plain.health()
    assert kernels.health().skipped == 1
    assert kernels.health().names


def test_a_resumed_run_has_the_same_bits() -> None:
    """Also where the state is loaded into an optimizer that has already run, as after a rollback."""
    whole, parts = build("adamw", **EVERYTHING), build("adamw", **EVERYTHING)
    train(whole, range(3))
    train(parts, range(4))
    load(parts, whole)
    train(whole, range(3, 6))
    train(parts, range(3, 6))
    assert same_bits(whole, parts)


def test_the_host_waits_for_nothing() -> None:
    """Not even where gradients lie elsewhere in each step."""
    step = build("adamw", 1.0, 0.7, True)
    train(step, range(2), capture=False)
    for p in step.model.parameters():
        p.grad = torch.randn_like(p)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for group in step.optimizer.param_groups:
            group["lr"] *= 0.5
        step._update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in step.model.parameters())

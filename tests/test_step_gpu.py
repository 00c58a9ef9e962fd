"""The captured training step does what the launched one does. Needs a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import call, records
from torch import Tensor, nn

from vimfast.config import EmaConfig, OptimConfig
from vimfast.models import create_model
from vimfast.train.gradients import GradientSum
from vimfast.train.optim import build_ema, build_optimizer
from vimfast.train.step import TrainStep

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")


def criterion(images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def build(drop_path: float = 0.0, accum_steps: int = 1, reducing: bool = False, compiled: bool = False) -> TrainStep:
    torch.manual_seed(0)
    options = {"img_size": 64, "depth": 3, "embed_dim": 64, "num_classes": 10, "drop_path_rate": drop_path}
    options["dynamic_img_size"] = True
    model = create_model("vim_tiny_patch16_224", **options).to(DEVICE).train()
    if compiled:
        model.compile()
    return TrainStep(
        model,
        build_optimizer(OptimConfig(), model, 1e-3),
        criterion,
        amp=torch.autocast("cuda", torch.bfloat16, cache_enabled=False),
        average=build_ema(EmaConfig(model_ema_decay=0.9), model),
        gradients=GradientSum(dict(model.named_parameters()), bucket_bytes=100_000) if reducing else None,
        accum_steps=accum_steps,
    )


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(count):
        images = torch.randn(8, 3, 64, 64, device=DEVICE, generator=generator)
        yield images, torch.rand(8, 10, device=DEVICE, generator=generator).softmax(1)


def run(step: TrainStep, capture: bool, count: int = 6) -> list[float]:
    """The losses of `count` batches."""
    if capture:
        step.capture(*next(batches(1)))
    losses = []
    for i, (images, targets) in enumerate(batches(count)):
        place = i % step.accum_steps
        loss, sound = step(images, targets, first=place == 0, last=place == step.accum_steps - 1)
        losses.append(loss.item())
        assert sound.item() == 1
    return losses


def agree(one: TrainStep, two: TrainStep) -> None:
    for name, weight in one.model.state_dict().items():
        torch.testing.assert_close(two.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert one.average is not None
    assert two.average is not None
    for a, b in zip(one.average.module.parameters(), two.average.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_a_captured_step_is_the_launched_one(accum_steps: int) -> None:
    eager, graph = build(accum_steps=accum_steps), build(accum_steps=accum_steps)
    expected = run(eager, capture=False)
    assert run(graph, capture=True) == pytest.approx(expected, rel=1e-4)
    assert graph.captured
    agree(eager, graph)


def alternate(step: TrainStep, capture: bool) -> list[float]:
    """The losses of batches of three sizes, whose graphs are captured where they first begin a step."""
    generator = torch.Generator("cuda").manual_seed(2)
    losses = []
    for i, size in enumerate((64, 64, 96, 96, 64, 64, 48, 48, 96, 96, 64, 64)):
        images = torch.randn(8, 3, size, size, device=DEVICE, generator=generator)
        targets = torch.rand(8, 10, device=DEVICE, generator=generator).softmax(1)
        first, last = i % step.accum_steps == 0, (i + 1) % step.accum_steps == 0
        if capture and first and not step.has_captured(images, targets):
            step.capture(images, targets)
        losses.append(step(images, targets, first=first, last=last)[0].item())
    return losses


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_captured_steps_of_several_shapes_are_the_launched_ones(accum_steps: int) -> None:
    eager, graph = build(accum_steps=accum_steps), build(accum_steps=accum_steps)
    expected = alternate(eager, capture=False)
    assert alternate(graph, capture=True) == pytest.approx(expected, rel=1e-4)
    agree(eager, graph)
    shared = {g.pool() for captured in graph._captured.values() for g in captured.graphs.values()}
    assert len(shared) == 1


def test_a_capture_in_mid_training_leaves_no_trace() -> None:
    step = build(drop_path=0.5)
    run(step, capture=True)
    weights = {name: w.clone() for name, w in step.model.state_dict().items()}
    moments = [v.clone() for state in step.optimizer.state.values() for v in state.values()]
    images, targets = torch.randn(8, 3, 96, 96, device=DEVICE), torch.rand(8, 10, device=DEVICE).softmax(1)
    random_state = torch.cuda.get_rng_state()
    step.capture(images, targets)
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    assert all(torch.equal(w, weights[name]) for name, w in step.model.state_dict().items())
    kept = [v for state in step.optimizer.state.values() for v in state.values()]
    assert all(map(torch.equal, kept, moments))


def test_capturing_leaves_no_trace_and_replays_draw_again() -> None:
    step = build(drop_path=0.5)
    weights = {name: w.clone() for name, w in step.model.state_dict().items()}
    random_state = torch.cuda.get_rng_state()
    images, targets = next(batches(1))
    step.capture(images, targets)
    step.time_replays()
    assert step.seconds is not None
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    assert all(torch.equal(w, weights[name]) for name, w in step.model.state_dict().items())
    assert not step.optimizer.state
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    losses = [step(images, targets)[0].item() for _ in range(4)]
    assert len(set(losses)) == 4
    torch.cuda.set_rng_state(random_state)  # a resumed run draws what the first one drew
    assert [step(images, targets)[0].item() for _ in range(4)] == losses


def test_a_replayed_step_without_numbers_is_skipped() -> None:
    step = build()
    images, targets = next(batches(1))
    step.capture(images, targets)
    step(images, targets)
    weights = {name: w.clone() for name, w in step.model.state_dict().items()}
    _, sound = step(images.fill_(float("nan")), targets)
    assert sound.item() == 0
    assert all(torch.equal(w, weights[name]) for name, w in step.model.state_dict().items())
    assert step.health()[:2] == (1, 1)
    assert step.health().names


def test_a_replayed_step_without_numbers_leaves_running_statistics_as_they_were() -> None:
    """A capture and replays that are timed do too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)).to(DEVICE).train()
    amp = torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    step = TrainStep(model, build_optimizer(OptimConfig(), model, 1e-3), criterion, amp=amp)
    images, targets = next(batches(1))
    images = images + 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step.capture(images, targets)
    step.time_replays()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    step(images, targets)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    assert not torch.equal(after["0.running_mean"], before["0.running_mean"])
    poisoned = images.clone()
    poisoned[0, 1] = float("nan")
    assert step(poisoned, targets)[1].item() == 0
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_the_sum_over_processes_is_in_the_graph() -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    try:
        eager, graph = build(reducing=True), build(reducing=True)
        expected = run(eager, capture=False)
        assert run(graph, capture=True) == pytest.approx(expected, rel=1e-4)
        agree(eager, graph)
        halves, whole = build(reducing=True, accum_steps=2), build(accum_steps=2)
        run(halves, capture=True)
        run(whole, capture=False)
        agree(whole, halves)
        several = [build(reducing=True, accum_steps=accum_steps) for accum_steps in (1, 2)]
        for step in several:
            eager = build(accum_steps=step.accum_steps)
            assert alternate(step, capture=True) == pytest.approx(alternate(eager, capture=False), rel=1e-4)
            agree(eager, step)
        for step in (graph, halves, *several):
            step.forget()  # else the group would wait for the graphs without end
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_model_is_captured() -> None:
    eager, graph = build(), build(compiled=True)
    expected = run(eager, capture=False)
    assert run(graph, capture=True) == pytest.approx(expected, rel=1e-3)


def test_a_transformer_of_timms_is_compiled_and_captured(shards: Path, tmp_path: Path) -> None:
    """It trains as the model as it is written does."""
    words = ("--model", "deit_tiny_patch16_224", "--model-kwargs", "patch_size=8", "depth=2", "--input-size", "32")
    sizes = ("--batch-size", "8", "--eval-batch-size", "4", "--epochs", "2", "--warmup-epochs", "0", "--drop-path", "0")
    losses = []
    for flags in ((), ("--no-torch-compile", "--no-cuda-graph")):
        folder = tmp_path / str(len(flags))
        done = call("vimfast.train", *words, *sizes, *flags, "--data-path", str(shards), "--output_dir", str(folder))
        assert ("compiled, steps as a CUDA graph" in done.stdout) == (not flags)
        losses.append([record[f"{whose}_loss"] for record in records(folder) for whose in ("train", "test")])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)

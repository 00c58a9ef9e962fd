"""Forward passes without gradients: replayed where they are captured, launched elsewhere, with the same answers."""

from __future__ import annotations

import copy
import gc
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from runs import RECIPE, differences, train
from test_step import criterion, graphs  # noqa: F401  # a fixture
from torch import Tensor, nn

from vimfast.config import OptimConfig
from vimfast.models import create_model
from vimfast.models.grey import Grey
from vimfast.train.forward import Forward
from vimfast.train.optim import build_optimizer
from vimfast.train.step import TrainStep

CPU, DEVICE = torch.device("cpu"), torch.device("cuda:0")


class Counted(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.passes = nn.Linear(3, 5), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.head(x.mean((2, 3)))


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=generator) for size in sizes]


@pytest.mark.usefixtures("graphs")
def test_full_batches_are_replayed_and_short_ones_launched() -> None:
    """From one capture, which runs a model twice; the weights may change in place."""
    models = [Counted().eval(), Counted().eval()]
    warnings: list[str] = []
    forward = Forward(models, nullcontext(), CPU, batch=4, warn=warnings.append)
    launched = Forward(models, nullcontext(), CPU)
    for images in batches(3, 4, 4, 2, 4):
        given = [logits.clone() for logits in forward(images)]
        assert all(map(torch.equal, given, launched(images)))
        with torch.no_grad():
            models[1].head.weight += 1
    assert forward.captured
    assert not launched.captured
    assert models[0].passes == 5 + 2 + 3 + 2  # launched; for the capture; replays of the stand-in; short batches
    assert warnings == []


@pytest.mark.usefixtures("graphs")
def test_what_cannot_be_captured_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("not\npermitted")

    monkeypatch.setattr(Forward, "_record", fails)
    model, warnings = Counted().eval(), list[str]()
    forward = Forward([model], nullcontext(), CPU, batch=4, warn=warnings.append)
    for images in batches(4, 4):
        assert torch.equal(forward(images)[0], model(images))
    assert warnings == ["evaluation cannot be a CUDA graph (not permitted); --no-cuda-graph avoids this warning"]
    assert not forward.captured


@pytest.mark.usefixtures("graphs")
def test_hooks_are_called() -> None:
    """Also those that come once there is a graph; that of a grey model is captured with it."""
    model, seen = Counted().eval(), list[int]()
    Grey().before(model)
    model.head = nn.Linear(1, 5)
    forward = Forward([model], nullcontext(), CPU, batch=4)
    (images,) = batches(4)
    replayed = forward(images)[0].clone()
    assert forward.captured
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    for count in (1, 2):
        assert torch.equal(forward(images)[0], replayed)
        assert seen == [4] * count


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(("copied", "captures"), [(False, 1), (True, 3)])
def test_evaluations_of_a_run_are_captured_once(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool, captures: int
) -> None:
    """But each time where models are copied to the GPU, as copies do not change; scores are those of launched ones."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "ema": {"model_ema": True, "model_ema_decay": 0.5}}))
    command = ("--config", str(recipe), "--data-path", str(tree), "--epochs", "3", "--steps-per-epoch", "2")
    command += ("--unscale-lr", "--lr", "1e-2")
    train(*command, "--output_dir", str(tmp_path / "launched"))
    found: list[list[nn.Module]] = []
    record = Forward._record

    def noted(forward: Forward, *inputs: object) -> object:
        found.append(forward.models)
        return record(forward, *inputs)

    monkeypatch.setattr(Forward, "_record", noted)
    monkeypatch.setattr(TrainStep, "time_replays", lambda step: setattr(step, "seconds", 0.5))
    monkeypatch.setattr("vimfast.train.build.captures", lambda *_: True)
    if copied:
        monkeypatch.setattr("vimfast.train.loop._on", lambda device, model: copy.deepcopy(model))
    run = train(*command, "--output_dir", str(tmp_path / "captured"))
    assert len(found) == captures
    assert (found[-1] == [*run.evaluated.models.values()]) == (captures == 1)
    assert differences(tmp_path / "launched", tmp_path / "captured") == []


# On a GPU


SIZES = {"img_size": 64, "depth": 3, "embed_dim": 64, "num_classes": 10, "dynamic_img_size": True}


def on_gpu(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("vim_tiny_patch16_224", **SIZES).to(DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_replayed_answers_have_the_bits_of_launched_ones(name: str) -> None:
    torch.manual_seed(0)
    models = [create_model(name, img_size=64, num_classes=10).to(DEVICE).eval() for _ in range(2)]
    amp = torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    forward, launched = Forward(models, amp, DEVICE, batch=32), Forward(models, amp, DEVICE)
    for size in (32, 32, 7, 32):
        images = torch.randn(size, 3, 64, 64, device=DEVICE)
        given = [logits.clone() for logits in forward(images)]
        assert all(map(torch.equal, given, launched(images)))
        assert not torch.equal(*given)
    assert forward.captured


@pytest.mark.gpu
def test_evaluation_lies_in_the_memory_of_the_training_step() -> None:
    """Which is no larger for it, trains to the same bits, and is free once both are forgotten."""
    amp = torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    images, targets = torch.randn(64, 3, 64, 64, device=DEVICE), torch.rand(64, 10, device=DEVICE).softmax(1)
    gc.collect()
    torch.cuda.empty_cache()
    empty = torch.cuda.memory_reserved()
    trained: list[nn.Module] = []
    for evaluated in (False, True):
        model = on_gpu().train()
        step = TrainStep(model, build_optimizer(OptimConfig(), model, 1e-3), criterion, amp=amp)
        step.capture(images, targets)
        step(images, targets)
        if evaluated:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            forward = Forward([model.eval()], amp, DEVICE, batch=64, pool=step.pool)
            logits = forward(images)[0].clone()
            torch.cuda.empty_cache()
            assert forward.captured
            assert torch.cuda.memory_reserved() == before
            model.train()
        for _ in range(3):
            step(images, targets)
        if evaluated:
            assert not torch.equal(forward(images)[0], logits)
            del forward
        step.restart(1)
        trained.append(model)
    assert all(map(torch.equal, trained[0].parameters(), trained[1].parameters()))
    del step, model, trained
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - empty < 32 << 20  # without the workspaces of libraries

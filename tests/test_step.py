"""The training step where there is no GPU: what it does with gradients around its graphs, which are stood in for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
import yaml
from runs import RECIPE, same, train
from torch import Tensor, nn

from vimfast.augment.recipe import Recipe
from vimfast.config import EmaConfig
from vimfast.data.views import Stage
from vimfast.models import create_model
from vimfast.train.forward import Forward, _Captured
from vimfast.train.loop import EpochEnd, Hook, Place, TrainingRun
from vimfast.train.optim import WeightAverage, build_ema
from vimfast.train.step import TrainStep


def criterion(images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


class StandIn:
    """Replays by computing again, into the gradients that parameters had at the end of the capture."""

    made: list[StandIn] = []  # noqa: RUF012

    def __init__(self, step: TrainStep, compute: Callable[[], Tensor]) -> None:
        self.step, self.compute = step, compute
        step._loss.copy_(compute())
        self.gradients = [p.grad for p in step._parameters]
        self.made.append(self)

    def replay(self) -> None:
        step = self.step
        shown = [p.grad for p in step._parameters]
        if step.accum_steps == 1:  # graphs share memory: the gradients of others are overwritten
            for other in self.made:
                for gradient in other.gradients:
                    gradient.fill_(float("nan"))
        for p, own in zip(step._parameters, self.gradients, strict=True):
            p.grad = own.clone() if step.accum_steps > 1 else None
        step._loss.copy_(self.compute())
        for p, own, before in zip(step._parameters, self.gradients, shown, strict=True):
            own.copy_(p.grad)
            p.grad = before

    def pool(self) -> tuple[int, int]:
        return 0, 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What TrainStep and Forward capture, without a GPU."""

    def record(step: TrainStep, inputs: tuple[Tensor, Tensor]) -> dict[bool, StandIn]:
        found = {}
        for last in [True] if step.accum_steps == 1 else [False, True]:
            found[last] = StandIn(step, lambda last=last: step._forward_backward(*inputs, last))
        if step.accum_steps > 1:  # a capture computes nothing
            step._zero_gradients()
        return found

    def record_forward(forward: Forward, images: Tensor) -> _Captured:
        own = torch.full_like(images, float("nan"))  # a capture computes nothing
        logits = forward._launch(own)

        def replay() -> None:
            for left, found in zip(logits, forward._launch(own), strict=True):
                left.copy_(found)

        return _Captured(own, MagicMock(replay=replay), logits)

    StandIn.made.clear()
    monkeypatch.setattr(TrainStep, "_record", record)
    monkeypatch.setattr(Forward, "_record", record_forward)
    monkeypatch.setattr("vimfast.train.graphs.side_stream", lambda device: MagicMock())
    monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: MagicMock())
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda state, device: torch.set_rng_state(state))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *args: None)
    yield
    StandIn.made.clear()


class Normalized(nn.Module):
    """Running statistics, a plain mean of them, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None)
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean((2, 3)))


def normalized(accum_steps: int = 1) -> tuple[TrainStep, WeightAverage]:
    torch.manual_seed(0)
    model = Normalized().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = build_ema(EmaConfig(model_ema_decay=0.5), model)
    assert average is not None
    amp = torch.autocast("cpu", enabled=False)
    return TrainStep(model, optimizer, criterion, amp=amp, average=average, accum_steps=accum_steps), average


def build(accum_steps: int) -> TrainStep:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "stride": 8, "depth": 2, "embed_dim": 16, "num_classes": 5}
    model = create_model("vim_tiny_patch16_224", **options, drop_path_rate=0.0, dynamic_img_size=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    amp = torch.autocast("cpu", enabled=False)
    return TrainStep(model.train(), optimizer, criterion, amp=amp, accum_steps=accum_steps)


def run(step: TrainStep, sizes: list[int], capture: bool) -> list[float]:
    """The losses of batches of these sizes, their graphs captured where they first begin a step."""
    generator = torch.Generator().manual_seed(1)
    losses = []
    for i, size in enumerate(sizes):
        images = torch.randn(3, 3, size, size, generator=generator)
        targets = torch.rand(3, 5, generator=generator).softmax(1)
        first, last = i % step.accum_steps == 0, (i + 1) % step.accum_steps == 0
        if capture and first and not step.has_captured(images, targets):
            step.capture(images, targets)
        losses.append(step(images, targets, first=first, last=last)[0].item())
    return losses


@pytest.mark.parametrize(
    ("accum_steps", "sizes", "captured"),
    [
        (1, [32, 32, 40, 32, 40, 40, 24, 32], 3),
        (2, [32, 32, 40, 40, 32, 32, 40, 40], 2),
        (2, [32, 40, 40, 32, 32, 24, 32, 32], 2),  # in one step too, and one size that never begins a step
    ],
)
def test_graphs_of_several_shapes_train_what_launches_train(
    graphs: None, accum_steps: int, sizes: list[int], captured: int
) -> None:
    eager, graph = build(accum_steps), build(accum_steps)
    assert run(graph, sizes, capture=True) == run(eager, sizes, capture=False)
    assert len(graph._captured) == captured
    for a, b in zip(eager.model.parameters(), graph.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_captures_each_size_where_it_comes(
    graphs: None, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the weights of a run that launches its steps; where a size cannot be captured, all are launched."""

    class Captures(Hook):
        """As before training on a GPU."""

        def __init__(self, run: TrainingRun) -> None:
            self.run = run

        def epoch_begin(self, place: Place) -> None:
            if place.epoch == 0:
                self.run.capture(torch.zeros(4, 3, 32, 32), torch.zeros(4, 3))

        def epoch_end(self, place: Place, end: EpochEnd) -> None:
            captured.append(len(self.run.train_step._captured))

    def stage(epoch: int) -> Stage:
        return Stage((32, 48)[epoch], Recipe(None))

    captured: list[int] = []
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    flags = ("--config", str(recipe), "--data-path", str(tree), "--input-size", "48", "--steps-per-epoch", "3")
    launched = train(*flags, stage=stage).model.state_dict()
    replayed = train(*flags, stage=stage, hooks=lambda run: [Captures(run)]).model.state_dict()
    assert captured == [1, 2]
    assert same(launched, replayed)

    whole = TrainStep._record

    def fails(step: TrainStep, inputs: tuple[Tensor, Tensor]) -> object:
        if len(inputs[0][0, 0]) == 48:
            raise RuntimeError("not permitted")
        return whole(step, inputs)

    monkeypatch.setattr(TrainStep, "_record", fails)
    assert same(launched, train(*flags, stage=stage, hooks=lambda run: [Captures(run)]).model.state_dict())
    assert captured == [1, 2, 1, 0]
    assert "warning: the step cannot be a CUDA graph (not permitted)" in capsys.readouterr().err


def test_a_shape_without_a_graph_is_launched(graphs: None) -> None:
    eager, graph = build(1), build(1)
    sizes = [32, 40, 32, 40]
    expected = run(eager, sizes, capture=False)
    graph.capture(torch.zeros(3, 3, 32, 32), torch.zeros(3, 5))
    assert run(graph, sizes, capture=False) == expected
    graph.forget()
    assert not graph.captured
    assert run(graph, sizes, capture=False) == run(eager, sizes, capture=False)


def test_a_failed_capture_leaves_the_others(graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, graph = build(2), build(2)
    run(eager, [32, 32], capture=False)
    run(graph, [32, 32], capture=True)

    def fails(*_: object) -> None:
        raise RuntimeError("not permitted when stream is capturing")

    monkeypatch.setattr(TrainStep, "_record", fails)
    images, targets = torch.zeros(3, 3, 40, 40), torch.zeros(3, 5)
    with pytest.raises(RuntimeError, match="not permitted"):
        graph.capture(images, targets)
    assert not graph.has_captured(images, targets)
    sizes = [40, 40, 32, 32]
    assert run(graph, sizes, capture=False) == run(eager, sizes, capture=False)


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_a_skipped_step_leaves_running_statistics_as_they_were(accum_steps: int) -> None:
    """Where the forward pass itself gives NaN, in the first of several batches too; those of the average as well."""
    step, average = normalized(accum_steps)
    parts = range(accum_steps)

    def trained(*batches: Tensor) -> float:
        for i, images in zip(parts, batches, strict=True):
            _, sound = step(images, torch.full((4, 5), 0.2), first=i == 0, last=i == accum_steps - 1)
        return sound.item()

    images = torch.randn(accum_steps, 4, 3, 6, 6) + 1
    assert trained(*images) == 1
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    assert before["first.running_mean"].abs().min() > 0.05
    poisoned = images.clone()
    poisoned[0, 0, 1] = float("nan")
    assert trained(*poisoned) == 0
    for name, value in step.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(torch.isfinite(value).all() for value in average.module.state_dict().values())
    assert trained(*images) == 1
    assert int(step.model.first.num_batches_tracked) == 2 * accum_steps


def test_a_step_that_is_given_up_leaves_everything_as_it_was() -> None:
    """After the first of its two batches."""
    step, average = normalized(2)
    images, targets = torch.randn(2, 4, 3, 6, 6) + 1, torch.full((4, 5), 0.2)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    step(images[0], targets, first=True, last=False)
    assert not torch.equal(step.model.first.running_mean, before["first.running_mean"])
    step.undo()
    for name, value in step.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not average.module.first.running_mean.any()


def test_a_capture_leaves_running_statistics_as_they_were(graphs: None) -> None:
    step, _ = normalized()
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    step.capture(torch.randn(4, 3, 6, 6) + 1, torch.full((4, 5), 0.2))
    for name, value in step.model.state_dict().items():
        assert torch.equal(value, before[name]), name

"""The training step where there is no GPU: what it does with gradients around its graphs, which are stood in for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vimfast.models import create_model
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


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TrainStep.capture without a GPU."""

    def record(step: TrainStep, inputs: tuple[Tensor, Tensor], side: object) -> dict[bool, StandIn]:
        found = {}
        for last in [True] if step.accum_steps == 1 else [False, True]:
            found[last] = StandIn(step, lambda last=last: step._forward_backward(*inputs, last))
        if step.accum_steps > 1:  # a capture computes nothing
            step._zero_gradients()
        return found

    StandIn.made.clear()
    monkeypatch.setattr(TrainStep, "_record", record)
    monkeypatch.setattr("vimfast.train.step.side_stream", lambda device: MagicMock())
    monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: MagicMock())
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda state, device: torch.set_rng_state(state))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *args: None)
    yield
    StandIn.made.clear()


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

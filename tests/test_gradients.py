"""Gradients summed over processes, against one process that sees every batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_on
from torch import Tensor, nn

from vimfast.train.gradients import GradientSum, copy_from_first


class Net(nn.Module):
    """Odd sizes, two dtypes, and a branch that some batches leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        self.branch = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.statistics = nn.BatchNorm1d(7)

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        hidden = self.statistics(self.first(x)).tanh()
        out = self.second(hidden) + (self.branch(hidden) if branch else 0)
        return (out * self.scale).square().sum()


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank))


BRANCH = (True, True, False, True)  # step 2 leaves the branch without gradients


def steps(bucket_bytes: int, accum: int) -> list[list[Tensor]]:
    """The gradients of four steps, whose updates add them to the weights."""
    rank, model = dist.get_rank(), net(dist.get_rank())
    copy_from_first(model)
    parameters = [p for n, p in model.named_parameters() if not n.startswith("statistics")]
    gradients = GradientSum({str(i): p for i, p in enumerate(parameters)}, bucket_bytes)
    found = []
    for step, branch in enumerate(BRANCH):
        if step % 2:
            model.zero_grad(set_to_none=True)
        else:
            for p in parameters:
                if p.grad is not None:
                    p.grad.zero_()
        for part in range(accum - 1):
            model(batch(rank, 100 * part + step), True).backward()
        with gradients.reducing():
            model(batch(rank, step), branch).backward()
        found.append([p.grad.clone() for p in parameters])
    return found


@pytest.mark.parametrize(("processes", "bucket_bytes", "accum"), [(2, 1, 1), (3, 150, 2), (2, 1 << 20, 1)])
def test_gradients_are_those_of_all_batches(tmp_path: Path, processes: int, bucket_bytes: int, accum: int) -> None:
    ranks = run_on(processes, steps, tmp_path, bucket_bytes, accum)
    model = net(0)
    parameters = [p for n, p in model.named_parameters() if not n.startswith("statistics")]
    for step, branch in enumerate(BRANCH):
        model.zero_grad(set_to_none=True)
        for rank in range(processes):
            for part in range(accum - 1):
                model(batch(rank, 100 * part + step), True).backward()
            model(batch(rank, step), branch).backward()
        for i, parameter in enumerate(parameters):
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for rank in range(processes):
                torch.testing.assert_close(ranks[rank][step][i], expected, msg=f"step {step}, parameter {i}")
            assert all(torch.equal(ranks[0][step][i], other[step][i]) for other in ranks[1:])


def late() -> str:
    model = net(0)
    gradients = GradientSum(dict(model.named_parameters()))
    with gradients.reducing():
        model(batch(0, 0), False).backward()
    try:
        with gradients.reducing():
            model(batch(0, 0), True).backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_gradient_that_comes_late_is_refused(tmp_path: Path) -> None:
    for said in run_on(2, late, tmp_path):
        assert said.startswith("parameter branch.")
        assert "first gradient after the first step" in said


def copied() -> list[Tensor]:
    model = net(dist.get_rank())
    model.statistics.running_mean += dist.get_rank() + 1
    copy_from_first(model, buffers_only=True)
    return [model.statistics.running_mean, model.first.weight.detach()]


def test_buffers_of_the_first(tmp_path: Path) -> None:
    one, two = run_on(2, copied, tmp_path)
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])

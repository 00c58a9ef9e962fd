"""The end of a step where there is no GPU: its kernels in Triton's interpreter, and when they are not used.

They are compared with AdamW in float64, and whole steps with those of torch's operations (update_on_cpu.py); on a GPU,
test_update_gpu.py does the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adamw_float64 import Parameters
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from vimfast.train.muon import Muon
from vimfast.train.update import Buffers, Update, adamw_groups

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    pytest.importorskip("triton")
    # Whether a kernel is interpreted is settled when its module is imported: the checks need a process of their own.
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("update_on_cpu.py"))]
    out = subprocess.run(program, env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


def test_kernels_match_float64(found: dict[str, Any]) -> None:
    assert found["trial"] == [True, True]
    assert found["fp32"] < 1e-6
    assert found["bf16"] < 0.03  # the interpreter cuts bf16 off where a GPU rounds
    assert found["unaligned"] == 0
    assert found["first average"]


def test_a_non_finite_gradient_changes_nothing_but_the_counts(found: dict[str, Any]) -> None:
    counts = [[1, 1, 1], [1, 0, 1], [2, 1, 1], [3, 2, 2]]
    assert found["skipped"] == {"counts": counts, "first": [3]}


def test_gradients_of_other_parameters_count(found: dict[str, Any]) -> None:
    own = found["judged"]
    assert own.pop("error") < 1e-6
    assert own == {"untouched": True, "first": [4], "moved": [1, 1, 1, 0, 0]}


def test_whole_steps_are_those_of_torch(found: dict[str, Any]) -> None:
    assert len(found["steps"]) == 3
    for name, step in found["steps"].items():
        assert step["launched"] == 3, name
        assert step["error"] < 3e-6, name
        assert step["of half"] < 3e-6, name


def test_a_resumed_run_has_the_same_bits(found: dict[str, Any]) -> None:
    assert found["resumed"] == 0


def test_other_memory_layouts_are_left_to_torch(found: dict[str, Any]) -> None:
    assert found["not taken"] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.weights.__setitem__(2, p.weights[2].half()), "weights is torch.float16"),
        (lambda p: p.means.__setitem__(2, torch.zeros(2047)), r"means is torch.float32 \(2047,\)"),
        (lambda p: p.steps.__setitem__(0, torch.zeros((), dtype=torch.int64)), "step count is torch.int64"),
        (lambda p: p.gradients.__setitem__(1, torch.zeros(5, 3).t()), r"\(1, 3\)"),
        (lambda p: p.averages.__setitem__(1, torch.zeros(3, 5, device="meta")), "on meta"),
        (lambda p: p.gradients.__setitem__(1, torch.zeros(3, 5).to_sparse()), "sparse"),
    ],
)
def test_what_kernels_cannot_take_is_said(change: Callable[[Parameters], None], words: str) -> None:
    launch = pytest.importorskip("vimfast_kernels.update.launch")
    parameters = Parameters("cpu")
    nothing = launch.Judged([], [])
    assert launch.misfit(parameters.moved(), nothing, CPU) is None
    change(parameters)
    why = launch.misfit(parameters.moved(), nothing, CPU)
    assert why is not None
    assert re.search(words, why), why


class Own(AdamW):
    pass


def hooked(optimizer: Optimizer) -> Optimizer:
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def scheduled(optimizer: Optimizer) -> Optimizer:
    StepLR(optimizer, 1)
    return optimizer


@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (lambda p: AdamW(p, 1e-3, fused=True), [0]),
        (lambda p: AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 1.0}], 1e-3, fused=True), [0, 1]),
        (lambda p: Muon([{"params": p[:1], "muon": True}, {"params": p[1:]}], 1e-3), [1]),
        (lambda p: AdamW(p, 1e-3), None),
        (lambda p: AdamW(p, 1e-3, fused=True, amsgrad=True), None),
        (lambda p: AdamW(p, 1e-3, fused=True, maximize=True), None),
        (lambda p: AdamW(p, torch.tensor(1e-3), fused=True), None),
        (lambda p: Adam(p, 1e-3, fused=True), None),
        (lambda p: SGD(p, 1e-3, fused=True), None),
        (lambda p: Own(p, 1e-3, fused=True), None),
        (lambda p: hooked(AdamW(p, 1e-3, fused=True)), None),
        (lambda p: scheduled(AdamW(p, 1e-3, fused=True)), None),
    ],
)
def test_which_groups_the_kernels_may_move(
    make: Callable[[list[nn.Parameter]], Optimizer], groups: list[int] | None
) -> None:
    optimizer = make([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))])
    found = adamw_groups(optimizer)
    assert groups == (None if found is None else [*found])


@pytest.mark.parametrize("others", [True, False])
def test_kernels_run_on_all_processes_or_on_none(others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    update = Update(model, AdamW(model.parameters(), fused=True), None, Buffers(model), clip_grad=None, several=True)
    update._device = torch.device("cuda")
    monkeypatch.setattr("vimfast.train.update.why_not", lambda device, averaged: None)
    monkeypatch.setattr("vimfast.train.update.dist.gather_objects", lambda own: [own, others])
    monkeypatch.setattr("vimfast_kernels.update.launch.FusedAdamW", lambda device: "kernels")
    update.prepare()
    assert update._fused == ("kernels" if others else None)

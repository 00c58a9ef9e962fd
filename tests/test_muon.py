"""Muon: against a plain implementation in float64, one matrix at a time, and in a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from runs import RECIPE, Stops, differences, train
from torch import Tensor, nn

from vimfast.config import OptimConfig
from vimfast.errors import UserError
from vimfast.models import create_model
from vimfast.train.muon import Muon, hidden_matrices, orthogonalize
from vimfast.train.optim import build_optimizer

LR, DECAY = 0.02, 0.1
SHAPES = [(12, 5), (5, 12), (12, 5), (7, 7)]


def plain_orthogonalize(g: Tensor) -> Tensor:
    """Jordan's iteration, of one matrix."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def plain_muon(p: Tensor, gradients: list[Tensor]) -> Tensor:
    momentum = torch.zeros_like(p)
    for g in gradients:
        momentum = 0.95 * momentum + 0.05 * g
        update = plain_orthogonalize(0.05 * g + 0.95 * momentum)
        p = p * (1 - LR * DECAY) - LR * 0.2 * math.sqrt(max(p.shape)) * update
    return p


def parameters(dtype: torch.dtype) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    torch.manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    return matrices, [nn.Parameter(torch.randn(9, dtype=dtype)), nn.Parameter(torch.randn(3, 4, dtype=dtype))]


def build(matrices: list[nn.Parameter], rest: list[nn.Parameter]) -> Muon:
    groups = [{"params": matrices, "muon": True, "weight_decay": DECAY}, {"params": rest, "weight_decay": DECAY}]
    return Muon(groups, LR)


def test_singular_values_become_about_1() -> None:
    torch.manual_seed(0)
    for shape in ((3, 24, 60), (2, 60, 24), (1, 5, 5)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert ((values > 0.6) & (values < 1.3)).all()
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))  # a gradient of nothing


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_steps_are_those_of_the_plain_implementation(dtype: torch.dtype, tolerance: float) -> None:
    matrices, rest = parameters(dtype)
    before = [p.detach().clone().double() for p in matrices]
    copies = [nn.Parameter(p.detach().clone()) for p in rest]
    adamw = torch.optim.AdamW(copies, LR, weight_decay=DECAY, fused=True)
    optimizer = build(matrices, rest)
    gradients: list[list[Tensor]] = [[] for _ in matrices]
    for _ in range(4):
        for p, seen in zip(matrices, gradients, strict=True):
            p.grad = torch.randn_like(p)
            seen.append(p.grad.double())
        for p, copy in zip(rest, copies, strict=True):
            p.grad = copy.grad = torch.randn_like(p)
        optimizer.step()
        adamw.step()
    for p, start, seen in zip(matrices, before, gradients, strict=True):
        torch.testing.assert_close(p.double(), plain_muon(start, seen), rtol=0, atol=tolerance)
    for p, copy in zip(rest, copies, strict=True):
        assert torch.equal(p, copy)


def test_a_skipped_step_changes_nothing() -> None:
    """What is not finite gets nowhere, and the next step is what it would have been without the skipped one."""
    whole, skipping = (build(*parameters(torch.float32)) for _ in range(2))
    for optimizer in (whole, skipping):
        for bad in (0.0, 1.0, 0.0):
            if bad and optimizer is whole:
                continue
            torch.manual_seed(int(bad))
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.full_like(p, math.nan) if bad else torch.randn_like(p)
            optimizer.found_inf = torch.full((), bad)
            optimizer.step()
    one, two = (optimizer.state_dict()["state"] for optimizer in (whole, skipping))
    assert all(torch.equal(one[i][name], two[i][name]) for i in one for name in one[i])
    mine, others = ([p for group in o.param_groups for p in group["params"]] for o in (whole, skipping))
    assert all(torch.equal(p, q) for p, q in zip(mine, others, strict=True))


def test_which_matrices_are_hidden() -> None:
    vim = create_model("vim_tiny_patch16_224", depth=1)
    names = ("in_proj", "x_proj", "dt_proj", "x_proj_b", "dt_proj_b", "out_proj")
    assert hidden_matrices(vim) == {f"layers.0.mixer.{name}.weight" for name in names}
    deit = create_model("deit_tiny_patch16_224", depth=1)
    assert hidden_matrices(deit) == {
        f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    vim.layers[0].mixer.in_proj.requires_grad_(False)
    groups = build_optimizer(OptimConfig(opt="muon"), vim, 1e-3).param_groups
    assert sum(len(group["params"]) for group in groups if group["muon"]) == len(names) - 1
    trained = [p for p in vim.parameters() if p.requires_grad]
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in trained}
    assert all(group["weight_decay"] > 0 for group in groups if group["muon"])
    with pytest.raises(UserError, match="--opt muon does not take these options"):
        build_optimizer(OptimConfig(opt="muon", opt_betas=(0.9,)), vim, 1e-3)


def test_a_stopped_run_resumes_to_the_same_bits(tree: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    flags = ("--config", str(recipe), "--data-path", str(tree), "--opt", "muon", "--model-ema-warmup", "--output_dir")
    train(*flags, str(tmp_path / "whole"))
    train(*flags, str(tmp_path / "parts"), control=Stops("epoch 1, step 1 "))
    train(*flags, str(tmp_path / "parts"), "--resume", "auto")
    assert differences(tmp_path / "whole", tmp_path / "parts") == []

"""Parameter groups and the learning rate of the recipe."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

import vimfast.models  # noqa: F401, registers them
from vimfast.config import EmaConfig, FinetuneConfig, OptimConfig, ScheduleConfig, load_config
from vimfast.errors import UserError
from vimfast.train.freezing import freeze
from vimfast.train.optim import LearningRate, build_ema, build_optimizer, peak_lr


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 3))
        self.A_log = nn.Parameter(torch.zeros(3, 2))
        self.linear = nn.Linear(3, 2)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}


@pytest.mark.parametrize("decay_a_log", [True, False])
def test_only_matrices_decay(decay_a_log: bool) -> None:
    model = Toy()
    optimizer = build_optimizer(OptimConfig(weight_decay=0.1, decay_a_log=decay_a_log), model, 1e-3)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.1 for p in group["params"]}
    wanted = {"linear.weight"} | ({"A_log"} if decay_a_log else set())
    assert decayed == {id(p) for name, p in model.named_parameters() if name in wanted}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_rate_is_scaled_by_the_global_batch() -> None:
    assert peak_lr(OptimConfig(lr=5e-4), 1024) == 1e-3
    assert peak_lr(OptimConfig(lr=5e-4, unscale_lr=True), 1024) == 5e-4


def test_cosine_enters_one_epoch_late_as_in_the_original() -> None:
    optimizer = build_optimizer(OptimConfig(), Toy(), 1e-3)
    rate = LearningRate(ScheduleConfig(epochs=20, warmup_epochs=5), optimizer, 10)
    for epoch in range(20):
        t = max(epoch - 1, 0)
        warm = 1e-6 + t * (1e-3 - 1e-6) / 5
        cosine = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * t / 20))
        rate.set(epoch, 7)
        assert rate.value == pytest.approx(warm if t < 5 else cosine)


def test_a_place_has_one_rate_however_it_was_reached() -> None:
    for on_updates in (True, False):
        cfg = ScheduleConfig(epochs=6, warmup_epochs=2, sched_on_updates=on_updates, lr_noise=(0.5,))
        walked = LearningRate(cfg, build_optimizer(OptimConfig(), Toy(), 1e-3), 4)
        for place in range(4 * 4 + 2):
            walked.set(place // 4, place % 4)
        jumped = LearningRate(cfg, build_optimizer(OptimConfig(), Toy(), 1e-3), 4)
        jumped.set(4, 1)
        assert walked.value == jumped.value
        plain = LearningRate(replace(cfg, lr_noise=None), build_optimizer(OptimConfig(), Toy(), 1e-3), 4)
        plain.set(2, 1)
        jumped.set(2, 1)
        assert plain.value == jumped.value  # noise begins after half of the schedule
        for rate in (plain, jumped):
            rate.set(4, 1)
        assert plain.value != jumped.value


@pytest.mark.parametrize("sched", ["cosine", "none"])
def test_each_layer_has_its_share_of_the_rate(sched: Any) -> None:
    """Also after a rollback, after another layer decay in the checkpoint, and beside layers that are not trained."""
    model = timm.create_model("vim_tiny_patch16_224", img_size=16, embed_dim=16, depth=3, num_classes=2)
    freeze(model, FinetuneConfig(freeze_layers=1))
    optimizer = build_optimizer(OptimConfig(layer_decay=0.5, weight_decay=0.1), model, 1e-3)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == {id(p) for p in model.parameters() if p.requires_grad}
    schedule = ScheduleConfig(epochs=9, warmup_epochs=0, sched=sched)
    rate = LearningRate(schedule, optimizer, 4)
    plain = LearningRate(schedule, build_optimizer(OptimConfig(), Toy(), 1e-3), 4)
    for factor in (1.0, 0.25):
        rate.scale(factor)
        rate.set(5, 1)
        plain.set(5, 1)
        assert rate.value == pytest.approx(factor * plain.value)
        shares = {"head.weight": 1, "norm_f.weight": 0.5, "layers.2.mixer.A_log": 0.5, "layers.1.norm.weight": 0.25}
        for name, share in shares.items():
            assert groups[id(model.get_parameter(name))]["lr"] == pytest.approx(share * rate.value), name
        for group in optimizer.param_groups:
            group["lr_scale"] = 0.7  # as loaded
    decays = {name for name, p in model.named_parameters() if groups.get(id(p), {}).get("weight_decay") == 0.1}
    assert "layers.2.mixer.in_proj.weight" in decays
    assert not {name for name in decays if name.endswith((".bias", "norm.weight"))}
    with pytest.raises(UserError, match="--layer-decay is 0"):
        load_config(["--layer-decay", "0"])


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_timms_optimizers_step(name: str) -> None:
    model = Toy()
    optimizer = build_optimizer(OptimConfig(opt=name), model, 1e-2)
    model.linear(torch.ones(2, 3)).sum().backward()
    before = model.linear.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.linear.weight)


def test_unknown_names_say_the_near_ones() -> None:
    with pytest.raises(UserError, match=r"adamww.*did you mean 'adamw'"):
        build_optimizer(OptimConfig(opt="adamww"), Toy(), 1e-3)
    with pytest.raises(UserError, match="cosin"):
        LearningRate(ScheduleConfig(sched="cosin"), build_optimizer(OptimConfig(), Toy(), 1e-3), 1)


def test_ema_averages_the_state_dict() -> None:
    model = Toy()
    ema = build_ema(EmaConfig(model_ema_decay=0.9), model)
    start = model.linear.weight.detach().clone()
    with torch.no_grad():
        model.linear.weight += 1
    ema.update(model)
    torch.testing.assert_close(ema.module.linear.weight, start + 0.1)
    assert build_ema(EmaConfig(model_ema=False), model) is None


def test_the_decay_of_the_average_warms_up_as_timms_does() -> None:
    model = Toy()
    ema = build_ema(EmaConfig(model_ema_decay=0.9, model_ema_warmup=True), model)
    theirs = ModelEmaV3(model, decay=0.9, use_warmup=True)
    assert ema is not None
    for step in (1, 2, 3, 40, 41):  # a resumed run begins anywhere
        with torch.no_grad():
            model.linear.weight += 1
        ema.updates = step
        ema.update(model)
        theirs.update(model, step=step)
        assert torch.equal(ema.module.linear.weight, theirs.module.linear.weight)
    assert ema.get_decay() == 0.9

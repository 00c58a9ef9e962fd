"""What timm's own tests/test_models.py asks of every model, asked of the Vision Mambas; and timm's scripts with them.

Of its groups, *torchscript* and *fx* are about other ways to run a model, see docs/export.md. A Vision Mamba gives
tokens [B, M, C], so the checks of default configurations are those that timm makes of its transformers.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from runs import call
from timm.data import resolve_model_data_config
from timm.models import FeatureInfo, group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor

from vimfast.models import VisionMamba
from vimfast.models.registry import MODELS

NAME = "vim_tiny_patch16_224"
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "stride": 8, "embed_dim": 24, "depth": 4}


def built(**options: Any) -> VisionMamba:
    torch.manual_seed(0)
    return timm.create_model(NAME, **SMALL, **options)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_name_is_described_as_it_is(name: str) -> None:
    assert timm.is_model(name)
    assert timm.list_models(name) == [name]
    model = timm.create_model(name, device="meta")
    cfg, state = model.default_cfg, model.state_dict()
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= state.keys()
    assert len(state["head.weight"]) == cfg["num_classes"] == model.num_classes == 1000
    assert model.patch_embed.img_size == resolve_model_data_config(model)["input_size"][1:]
    assert model.num_features == model.head_hidden_size == state["head.weight"].shape[1]


def test_forward_and_checkpointing() -> None:
    model = built().eval()
    outputs = model(images(1))
    assert outputs.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images(1)), outputs, rtol=1e-4, atol=1e-5)
    features, maps = model.forward_intermediates(images(1))
    assert torch.allclose(features, model.forward_features(images(1)))
    model.set_grad_checkpointing(False)
    for ours, theirs in zip(maps, model.forward_intermediates(images(1))[1], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"global_pool": "token"}, {"bimamba_type": "v1"}])
def test_backward_reaches_every_parameter(options: dict[str, Any]) -> None:
    model = built(num_classes=42, **options).train()
    outputs = model(images())
    outputs.mean().backward()
    assert outputs.shape == (2, 42)
    missing = [name for name, p in model.named_parameters() if p.grad is None or p.grad.shape != p.shape]
    # The mean of the patches does not read the class token behind the last block, but the blocks before it do.
    assert missing == []


def test_without_a_classifier() -> None:
    model = built().eval()
    features = model.forward_features(images())
    assert features.shape == (2, 17, 24)
    before = model.forward_head(features, pre_logits=True)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(images()), before)
    model.reset_classifier(0, "")
    assert torch.equal(model(images()), features)
    assert built(num_classes=0).eval()(images()).shape == (2, 24)
    assert built(num_classes=0, global_pool="").eval()(images()).shape == (2, 17, 24)


@pytest.mark.parametrize("options", [{}, {"feature_cls": "getter"}])
def test_feature_maps(options: dict[str, Any]) -> None:
    model = timm.create_model(NAME, features_only=True, **SMALL, **options).eval()
    channels, reduction = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) >= 3
    maps = model(images(1))
    for e, r, got in zip(channels, reduction, maps, strict=True):
        assert got.shape == (1, e, 32 // r, 32 // r)
        assert got.isfinite().all()
    whole = built()
    info = FeatureInfo(whole.feature_info, len(whole.feature_info))
    assert len(info.channels()) == len(whole.forward_intermediates(images(1), intermediates_only=True)) == 4


def test_parameters_by_depth() -> None:
    model = built()
    groups = group_parameters(model, model.group_matcher())
    named = {name for group in groups.values() for name in group}
    assert named == {name for name, _ in model.named_parameters()}
    assert len(groups) == 1 + 4 + 1  # stem, blocks, head and the norm before it
    assert len(group_parameters(model, model.group_matcher(coarse=True))) < len(groups)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    still = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert {"pos_embed", "cls_token", "head.bias"} <= {name for name, p in model.named_parameters() if id(p) in still}
    assert id(model.patch_embed.proj.weight) not in still
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}


def test_weights_of_timms_own_checkpoints(tmp_path: Path) -> None:
    model, other = built(num_classes=3).eval(), built(num_classes=3)
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "last.pth.tar")
    with torch.no_grad():
        other.head.bias.add_(1)
    timm.models.load_checkpoint(other, str(tmp_path / "last.pth.tar"))
    assert torch.equal(other.eval()(images()), model(images()))
    again = timm.create_model(NAME, **SMALL, num_classes=3, checkpoint_path=str(tmp_path / "last.pth.tar")).eval()
    assert torch.equal(again(images()), model(images()))


SCRIPT = """
import argparse, sys, beside
import timm
parser = argparse.ArgumentParser()
parser.add_argument("--model")
print(__name__, beside.WORD, type(timm.create_model(parser.parse_args().model, device="meta")).__name__, sys.argv[1:])
"""


def test_scripts_of_timms(tmp_path: Path) -> None:
    """As its train.py is: the name of the model comes from a flag, and it may import what lies beside it."""
    (tmp_path / "validate.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("WORD = 'found'")
    done = call("vimfast.timm", str(tmp_path / "validate.py"), "--model", NAME)
    assert done.stdout == f"__main__ found VisionMamba ['--model', '{NAME}']\n"
    wrong = call("vimfast.timm", str(tmp_path / "test.py"), ok=False)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "there is no script" in wrong.stderr
    # timm's train.py imports what its --device-modules names.
    assert importlib.import_module("vimfast.models").VisionMamba is VisionMamba

"""A user of hustvl/Vim moves over: the original's files evaluate, resume and finetune, by the commands of a user."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import RECIPE, train

from vimfast.checkpoint import load_checkpoint
from vimfast.errors import UserError
from vimfast.models import VisionMamba, create_model
from vimfast.train.loop import Hook, Place

SMALL = {**RECIPE["model"]["model_kwargs"], "img_size": 32, "num_classes": 3}
FLAGS = [
    *("--model", "vim_tiny_patch16_224", "--input-size", "32", "--device", "cpu", "--batch-size", "4", "--no_amp"),
    *("--num_workers", "1", "--model-kwargs", *(f"{k}={v}" for k, v in RECIPE["model"]["model_kwargs"].items())),
]


class Ran:
    """os.system in a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch hacked",))


def originals_model(**options: Any) -> VisionMamba:
    torch.manual_seed(7)
    return VisionMamba(**{**SMALL, **options})


def originals_state(model: VisionMamba, epoch: int) -> dict[str, Any]:
    """What hustvl/Vim's main.py saves after `epoch`, its optimizer as timm 0.4.12 makes it."""
    groups: tuple[list, list] = [], []
    for name, p in model.named_parameters():
        groups[len(p.shape) > 1 and not name.endswith(".bias") and name not in model.no_weight_decay()].append(p)
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": 0.05}], lr=1e-3
    )
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    average = {name: value + 0.01 for name, value in model.state_dict().items()}
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [1e-3, 1e-3], "t_initial": 300},
        "epoch": epoch,
        "model_ema": average,
        "scaler": "none",
        "args": argparse.Namespace(model="vim_tiny_patch16_224", lr=5e-4, finetune="", gpu=0),
    }


@pytest.fixture
def original(tmp_path: Path) -> Path:
    torch.save(originals_state(originals_model(), 4), tmp_path / "vim.pth")
    return tmp_path / "vim.pth"


def test_evaluation(original: Path, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = train(*FLAGS, "--data-path", str(tree), "--eval", "--resume", str(original))
    state = load_checkpoint(original)
    for whose, part in (("", "model"), ("ema_", "model_ema")):
        weights = trainer.evaluated.models[whose].state_dict()
        assert all(torch.equal(value, state[part][name]) for name, value in weights.items())
    said = capsys.readouterr().out
    assert "reading weights and their moving average (EMA) from " in said
    for name in ("network", "ema network"):
        assert f"Accuracy of the {name} on the 15 test images" in said


@pytest.mark.parametrize("how", ["patches", "original"])
def test_evaluation_at_another_size(original: Path, tree: Path, how: str) -> None:
    flags = ("--data-path", str(tree), "--eval", "--resume", str(original), "--pos-embed-resample", how)
    trainer = train(*FLAGS, *flags, "--input-size", "48")
    want = originals_model(img_size=48).fit_pos_embed(load_checkpoint(original)["model"], how)
    for model, extra in ((trainer.evaluated.models[""], 0.0), (trainer.evaluated.models["ema_"], 0.01)):
        torch.testing.assert_close(model.state_dict()["pos_embed"], want["pos_embed"] + extra)


def test_training_continues(original: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_checkpoint(original)
    seen: dict[str, Any] = {}

    class Watch(Hook):
        def __init__(self, run: Any) -> None:
            self.run = run

        def epoch_begin(self, place: Place) -> None:
            optimizer, model = self.run.optimizer, self.run.model
            seen.setdefault("epoch", place.epoch)
            seen.setdefault("steps", {float(s["step"]) for s in optimizer.state.values()})
            seen.setdefault("moment", optimizer.state[model.layers[1].mixer.A_log]["exp_avg"].clone())

    flags = ("--data-path", str(tree), "--resume", str(original), "--output_dir", str(tmp_path / "run"))
    train(*FLAGS, *flags, "--epochs", "6", hooks=lambda run: [Watch(run)])
    assert (seen["epoch"], seen["steps"]) == (5, {1.0})
    names = [name for name, _ in originals_model().named_parameters()]
    order = [n for n in names if state["model"][n].ndim == 1 or n.endswith(".bias") or n in ("pos_embed", "cls_token")]
    order += [n for n in names if n not in order]
    assert torch.equal(seen["moment"], state["optimizer"]["state"][order.index("layers.1.mixer.A_log")]["exp_avg"])
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["epoch"] == 5
    assert "resuming at epoch 5" in capsys.readouterr().out


def test_finetuning(original: Path, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(originals_state(originals_model(num_classes=10), 4), original)
    flags = ("--data-path", str(tree), "--finetune", str(original), "--input-size", "48", "--epochs", "1")
    trainer = train(*FLAGS, *flags, "--lr", "0", "--warmup-lr", "0", "--min-lr", "0", "--freeze-layers", "1")
    want = load_checkpoint(original)["model"]
    assert torch.equal(trainer.evaluated.models[""].layers[1].mixer.D, want["layers.1.mixer.D"])
    assert torch.equal(trainer.evaluated.models["ema_"].layers[1].mixer.D, want["layers.1.mixer.D"])
    assert trainer.evaluated.models[""].head.weight.shape == (3, 32)
    said = capsys.readouterr().out
    assert "position embedding resampled from 17 to 37 positions" in said
    assert "head has 3 classes here and 10 in" in said
    assert "parameters are trained, the others stay as they are" in said


@pytest.mark.parametrize("flag", ["--eval", "--resume", "--finetune", "--teacher-path"])
def test_a_hostile_file_in_its_place_runs_nothing(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.chdir(tmp_path)
    state = originals_state(originals_model(), 4)
    state["args"].hook = Ran()
    torch.save(state, "evil.pth")
    flags = {"--eval": ("--eval", "--resume"), "--teacher-path": ("--distillation-type", "hard", "--teacher-path")}
    with pytest.raises(UserError, match="could run code and is refused"):
        train(*FLAGS, "--data-path", str(tree), "--epochs", "1", *flags.get(flag, (flag,)), "evil.pth")
    assert not Path("hacked").exists()
    pickle.loads(pickle.dumps(Ran()))  # and it would have
    assert Path("hacked").exists()


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_teacher_is_listened_to(tmp_path: Path, tree: Path, kind: str) -> None:
    torch.manual_seed(0)
    torch.save({"model": create_model("resnet10t", num_classes=3).state_dict()}, tmp_path / "teacher.pth")
    flags = ("--data-path", str(tree), "--epochs", "1", "--distillation-type", kind, "--teacher-model", "resnet10t")
    trainer = train(*FLAGS, *flags, "--teacher-path", str(tmp_path / "teacher.pth"), "--distillation-alpha", "1")
    assert all(torch.isfinite(p).all() for p in trainer.evaluated.models[""].parameters())
    with pytest.raises(UserError, match=r"^--teacher-path: .* is of another model: .*; give its --teacher-model$"):
        train(*FLAGS, *flags, "--teacher-path", str(tmp_path / "teacher.pth"), "--teacher-model", "resnet14t")


@pytest.mark.parametrize(
    "flags",
    [
        ("--cosub", "--drop-path", "0.5"),
        ("--if_random_cls_token_position", "--if_random_token_rank"),
        ("--attn-only", "--global-batch-size", "8"),
    ],
)
def test_other_flags_train(tree: Path, flags: tuple[str, ...]) -> None:
    trainer = train(*FLAGS, "--data-path", str(tree), "--epochs", "1", *flags)
    assert all(torch.isfinite(p).all() for p in trainer.evaluated.models[""].parameters())
    if "--global-batch-size" in flags:
        assert (trainer.accum_steps, trainer.loader.order.batch_size, trainer.place.steps) == (2, 4, 4)

"""Settings: who wins, both spellings, and what a misspelt one says."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from vimfast.config import Config, ModelConfig, load_config
from vimfast.errors import UserError
from vimfast_kernels import backend_names

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_command_line_beats_yaml_beats_default(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("optim:\n  lr: 3e-4\n  opt_betas: [0.9, 0.95]\ndata:\n  batch_size: 32\n")
    cfg = load_config(["--config", str(recipe), "--batch-size", "8", "--no_amp"])
    assert cfg.optim.lr == 3e-4  # PyYAML reads 3e-4 as a string
    assert cfg.optim.opt_betas == (0.9, 0.95)
    assert cfg.data.batch_size == 8
    assert cfg.run.amp is False
    assert cfg.schedule.epochs == Config().schedule.epochs == 300


@pytest.mark.parametrize("flag", ["--output_dir", "--output-dir"])
def test_both_spellings(flag: str) -> None:
    assert load_config([flag, "runs/x"]).run.output_dir == "runs/x"


def test_resolved_config_reads_back_the_same(tmp_path: Path) -> None:
    cfg = load_config(
        ["--cutmix-minmax", "0.2", "0.8", "--model-kwargs", "depth=4", "stride=8", "--clip-grad", "1", "--no-model-ema"]
    )
    cfg.save(tmp_path / "c.yaml")
    assert load_config(["--config", str(tmp_path / "c.yaml")]) == cfg
    assert cfg.model.model_kwargs == {"depth": 4, "stride": 8}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_recipes_load(path: Path) -> None:
    load_config(["--config", str(path)])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lrr", "1"], ["--lrr", "--lr"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["--batch-size", "0"], ["batch_size", "0", "at least 1"]),
        (["--mixup-mode", "bach"], ["bach", "batch"]),
        (["--scan-backend", "gluno"], ["scan_backend", "did you mean 'gluon'", *backend_names()]),
        (["--model-kwargs", "depth"], ["name=value", "depth"]),
        (["--data", "x"], ["--data", "unknown flag"]),  # no abbreviations
    ],
)
def test_wrong_flags_say_the_fix(argv: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(argv)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim:\n  lrr: 1\n", ["optim.lrr", "did you mean 'lr'"]),
        ("optm:\n  lr: 1\n", ["optm", "did you mean 'optim'"]),
        ("schedule:\n  epochs: many\n", ["schedule.epochs", "many", "int"]),
        ("run:\n  amp: 1\n", ["run.amp", "bool"]),
        ("mix:\n  cutmix_minmax: [0.1]\n", ["cutmix_minmax", "list of numbers"]),
        ("data:\n  train_interpolation: cubic\n", ["cubic", "bicubic"]),
        ("- a\n", ["no sections"]),
        ("a: [", ["no readable YAML"]),
    ],
)
def test_wrong_yaml_says_the_fix(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(["--config", str(path)])
    assert all(word in str(error.value) for word in words)


def test_help_lists_the_backends() -> None:
    (field,) = (f for f in fields(ModelConfig) if f.name == "scan_backend")
    assert field.metadata["help"].endswith(": " + ", ".join(backend_names()))


def test_missing_yaml() -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_config(["--config", "nowhere.yaml"])

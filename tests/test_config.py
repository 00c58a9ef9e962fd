"""Settings: who wins, both spellings, and what a misspelt one says."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from vimfast.config import Config, ModelConfig, load_config
from vimfast.config.compat import TIMM
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


def test_printed_settings_say_where_they_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, printed = tmp_path / "r.yaml", tmp_path / "printed.yaml"
    recipe.write_text("optim:\n  lr: 3e-4\n  opt_betas: [0.9, 0.95]\nbatch_size: 32\ndrop: 0.5\n")
    argv = ["--config", str(recipe), "--batch-size", "8", "--model-kwargs", "depth=4", "--if-amp"]
    with pytest.raises(SystemExit) as end:
        load_config([*argv, "--print-config"])
    assert end.value.code == 0
    printed.write_text(text := capsys.readouterr().out)
    assert load_config(["--config", str(printed)]) == load_config(argv)
    lines = {name: (value, origin) for name, value, origin in re.findall(r"^  (\w+): (.*?) +# (.+)$", text, re.M)}
    assert lines["batch_size"] == ("8", "--batch-size")
    assert lines["lr"] == ("0.0003", str(recipe))
    assert lines["opt_betas"] == ("[0.9, 0.95]", str(recipe))
    assert lines["model_kwargs"] == ("{depth: 4}", "--model-kwargs")
    assert lines["amp"] == ("true", "--amp")
    assert lines["epochs"] == ("300", "default")
    assert len(lines) == sum(map(len, Config().to_dict().values()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_recipes_load(path: Path) -> None:
    load_config(["--config", str(path)])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lrr", "1"], ["--lrr", "--lr"]),
        (["--lr", "fast"], ["--lr is 'fast'; it must be a number"]),
        (["--batch-size", "0"], ["--batch-size is 0; it must be >= 1"]),
        (["--mixup-group", "1"], ["--mixup-group is 1; it must be >= 2, or left out"]),
        (["--clip-grad", "0"], ["--clip-grad is 0.0", "drop it for no clipping"]),
        (["--mixup-mode", "bach"], ["bach", "batch"]),
        (["--scan-backend", "gluno"], ["--scan-backend", "did you mean 'gluon'", *backend_names()]),
        (["--model-kwargs", "depth"], ["name=value", "depth"]),
        (["--data", "x"], ["--data", "unknown flag"]),  # no abbreviations
        (["--aa", "augmix-m5"], ["--aa is 'augmix-m5'", "write rand-m9-mstd0.5-inc1"]),
        (["--aa", "rand-m9-tweight"], ["tweight", "3a, 3aw, weights"]),
        (["--aa", "rand-n99-tweights"], ["99 of 15 operations", "lower n"]),
        (["--train-interpolation", "cubic"], ["--train-interpolation", "did you mean 'bicubic'", "bilinear, random"]),
        (["--decoder", "gpu"], ["decoder", "auto, hardware, cuda, cpu"]),
        (["--scale", "0.5", "0.1"], ["(0.5, 0.1)", "MIN <= MAX"]),
        (["--ratio", "0", "1"], ["(0.0, 1.0)", "above 0"]),
        (["--eval-crop-ratio", "1.5"], ["1.5", "at most 1"]),
        (["--cutmix-minmax", "0.8", "0.2"], ["--cutmix-minmax is", "MIN <= MAX"]),
        (["--reprob", "25"], ["--reprob is 25", "<= 1"]),
        (["--lr", "nan"], ["--lr is nan", "a finite number"]),
        (["--warmup-lr", "inf"], ["--warmup-lr is inf", "a finite number"]),
        (["--ratio", "nan", "1"], ["--ratio is nan", "a finite number"]),
        (["--hflip", "3"], ["--hflip is 3", "<= 1"]),
        (["--drop-path", "2"], ["--drop-path is 2", "<= 1"]),
        (["--opt", "adammw"], ["--opt 'adammw'", "did you mean 'adamw'"]),
        (["--sched", "cosin"], ["--sched is 'cosin'", "did you mean 'cosine'", "tanh"]),
        (["--sched", "plateau"], ["--sched plateau", "try cosine or step"]),
        (["--data", "x"], ["unknown flag --data; did you mean '--data-path'?"]),
        (["--data-dir", "x"], ["unknown flag --data-dir; did you mean '--data-path'?"]),
        (["--data_dir=x"], ["unknown flag --data_dir; did you mean '--data-path'?"]),
        (["--learning-rate", "1"], ["unknown flag --learning-rate; did you mean '--lr'?"]),
        (["--workers", "1"], ["unknown flag --workers; did you mean '--num-workers'?"]),
        (["--img-size", "1"], ["unknown flag --img-size; did you mean '--input-size'?"]),
        (["--version"], ["unknown flag --version; did you mean 'vimfast --version'?"]),
        (["photos/"], ["'photos/' follows no flag; give the data with --data-path photos/"]),
        (["--epochs", "1", "2"], ["unrecognized arguments: 2"]),
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
        ("schedule:\n  epochs: many\n", ["schedule.epochs is 'many'; it must be an integer"]),
        ("run:\n  amp: 1\n", ["run.amp is 1; it must be true or false"]),
        ("mix:\n  cutmix_minmax: [0.1]\n", ["cutmix_minmax", "list of 2 numbers"]),
        ("data:\n  train_interpolation: cubic\n", ["cubic", "bicubic"]),
        ("mix:\n  mixup_mode: true\n", ["mix.mixup_mode is True; it must be one of batch, pair, elem"]),
        ("augment:\n  aa: rand-x9\n", ["--aa rand-x9", "'x9'"]),
        ("mix: on\n", ["mix is True", "its keys are mixup, "]),
        ("- a\n", ["holds no settings but a list", "model, data, "]),
        ("# nothing\n", ["sets nothing", "drop --config"]),
        ("batch_sise: 8\n", ["unknown setting batch_sise", "did you mean 'batch_size'"]),
        ("data_dir: x\nworkers: 4\njsd_loss: false\n", ["data_dir (data_path here), workers (num_workers", "jsd_loss"]),
        ("batch_size: 0\n", ["r.yaml: batch_size is 0; it must be >= 1"]),
        ("lr: fast\n", ["optim.lr is 'fast'; it must be a number"]),
        ("a: [", ["r.yaml, line 1, column 5: expected the node content, but found '<stream end>'; correct the YAML"]),
        ("model:\n  model_kwargs: {depth: 4\nrun: {}\n", ["r.yaml, line 3, column 4: expected ',' or '}'"]),
        ("a: \x01", ["not readable YAML"]),
    ],
)
def test_wrong_yaml_says_the_fix(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(["--config", str(path)])
    assert all(word in str(error.value) for word in words)


def test_settings_may_stand_without_their_sections(tmp_path: Path) -> None:
    """As timm writes them; model and finetune are names of sections too."""
    flat, mixed = tmp_path / "args.yaml", tmp_path / "mixed.yaml"
    flat.write_text("model: vim_small_patch16_224\nlr: 1e-3\nepochs: 7\nfinetune: a.pth\nclip_grad: null\n")
    cfg = load_config(["--config", str(flat), "--epochs", "8"])
    assert (cfg.model.model, cfg.finetune.finetune) == ("vim_small_patch16_224", "a.pth")
    assert (cfg.optim.lr, cfg.schedule.epochs, cfg.optim.clip_grad) == (1e-3, 8, None)
    mixed.write_text("model:\n  drop: 0.5\nlr: 1e-3\nmix:\n")
    cfg = load_config(["--config", str(mixed)])
    assert (cfg.model.drop, cfg.optim.lr, cfg.model.model) == (0.5, 1e-3, Config().model.model)


def test_each_setting_has_a_name_of_its_own() -> None:
    names = [name for section in Config().to_dict().values() for name in section]
    assert len(names) == len(set(names))
    assert not set(TIMM) & set(names)
    assert set(TIMM.values()) <= set(names)


def test_words_that_are_ignored_are_not_refused() -> None:
    """ThreeAugment stands for itself, so that the original's command lines for it are taken as they are."""
    assert load_config(["--ThreeAugment", "--aa", "original"]).augment.aa == "original"


@pytest.mark.parametrize("aa", ["", "none"])
def test_no_augmentation_has_two_names(aa: str) -> None:
    assert load_config(["--aa", aa]).augment.aa == aa


def test_help_lists_the_backends() -> None:
    (field,) = (f for f in fields(ModelConfig) if f.name == "scan_backend")
    assert field.metadata["help"].endswith(": " + ", ".join(backend_names()))


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("nowhere.yaml", ["nowhere.yaml does not exist", "the recipes are cifar10, debug, demo, "]),
        ("configs/vim_tiny_1gpu.yaml", ["does not exist", "the recipe of that name is --config vim_tiny_1gpu"]),
        ("vim_tny", ["no recipe 'vim_tny'", "did you mean 'vim_tiny'", "vim_tiny_1gpu, ", "by its path"]),
        ("folder", ["no recipe 'folder'"]),
        ("./folder", ["--config folder is a folder", "a YAML file"]),
        ("./run", ["--config run is a folder", "did you mean run/config.yaml?"]),
        (".", ["--config . is a folder"]),
    ],
)
def test_a_recipe_that_is_not_there(word: str, words: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load_config(["--config", word])
    assert all(part in str(error.value) for part in words)


def test_a_recipe_goes_by_name_and_any_file_by_its_path(tmp_path: Path, monkeypatch: Any) -> None:
    """Whatever lies in the working directory, a name stays a name."""
    monkeypatch.chdir(tmp_path)
    for name in ("vim_small", "own", "vim_base.yaml"):
        Path(name).write_text("schedule:\n  epochs: 7\n")
    assert load_config(["--config", "vim_small"]).model.model == "vim_small_patch16_224"
    for word in ("./vim_small", str(tmp_path / "vim_small"), "own", "vim_base.yaml"):
        assert load_config(["--config", word]).schedule.epochs == 7


def test_gradients_are_not_clipped_to_nothing() -> None:
    for norm in ("0", "-1"):
        with pytest.raises(UserError, match=r"--clip-grad is .*; it must be above 0"):
            load_config(["--clip-grad", norm])


@pytest.mark.parametrize("opt", ["AdamW", "sgd", "lookahead_adam"])
def test_optimizers_go_by_timms_names(opt: str) -> None:
    assert load_config(["--opt", opt]).optim.opt == opt


def test_the_home_folder_has_its_short_name(tmp_path: Path, monkeypatch: Any) -> None:
    """Where the shell leaves it alone: in YAML, and after an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("data:\n  data_path: ~/data\nrun:\n  output_dir: ~/runs\n")
    cfg = load_config(["--config=~/r.yaml", "--resume=~/a.pth", "--finetune=~/b.pth", "--teacher-path=~/c.pth"])
    paths = (cfg.data.data_path, cfg.run.output_dir, cfg.run.resume, cfg.finetune.finetune, cfg.distill.teacher_path)
    assert paths == tuple(str(tmp_path / name) for name in ("data", "runs", "a.pth", "b.pth", "c.pth"))
    assert load_config(["--resume", "auto"]).run.resume == "auto"


def test_the_usual_settings_are_checked_without_torch() -> None:
    load = "from vimfast.config import load_config; load_config(['--sched', 'step'])"
    code = f"import sys; {load}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"

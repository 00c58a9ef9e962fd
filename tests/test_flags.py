"""Every flag of the original's command line: it works in both spellings, or says what to use instead."""

from __future__ import annotations

import dataclasses
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import vimfast.__main__
import vimfast.train.__main__
from vimfast.config import Config, compat, load_config, plan_batches
from vimfast.errors import UserError
from vimfast.models import create_model

ROOT = Path(__file__).parent.parent
TABLE = runpy.run_path(str(ROOT / "tools" / "flags_table.py"))

# A flag of the original, what follows it, and the setting that it makes. Values differ from the defaults.
SETTINGS: list[tuple[str, tuple[str, ...], str, Any]] = [
    ("--batch-size", ("128",), "data.batch_size", 128),
    ("--epochs", ("100",), "schedule.epochs", 100),
    ("--bce-loss", (), "mix.bce_loss", True),
    ("--unscale-lr", (), "optim.unscale_lr", True),
    ("--model", ("vim_small_patch16_224",), "model.model", "vim_small_patch16_224"),
    ("--input-size", ("384",), "model.input_size", 384),
    ("--drop", ("0.1",), "model.drop", 0.1),
    ("--drop-path", ("0.05",), "model.drop_path", 0.05),
    ("--model-ema", (), "ema.model_ema", True),
    ("--no-model-ema", (), "ema.model_ema", False),
    ("--model-ema-decay", ("0.9",), "ema.model_ema_decay", 0.9),
    ("--model-ema-force-cpu", (), "ema.model_ema_force_cpu", True),
    ("--opt", ("sgd",), "optim.opt", "sgd"),
    ("--opt-eps", ("1e-6",), "optim.opt_eps", 1e-6),
    ("--opt-betas", ("0.9", "0.95"), "optim.opt_betas", (0.9, 0.95)),
    ("--clip-grad", ("1",), "optim.clip_grad", 1.0),
    ("--momentum", ("0.8",), "optim.momentum", 0.8),
    ("--weight-decay", ("0.1",), "optim.weight_decay", 0.1),
    ("--sched", ("step",), "schedule.sched", "step"),
    ("--lr", ("1e-3",), "optim.lr", 1e-3),
    ("--lr-noise", ("0.4", "0.9"), "schedule.lr_noise", (0.4, 0.9)),
    ("--lr-noise-pct", ("0.5",), "schedule.lr_noise_pct", 0.5),
    ("--lr-noise-std", ("2",), "schedule.lr_noise_std", 2.0),
    ("--warmup-lr", ("1e-5",), "schedule.warmup_lr", 1e-5),
    ("--min-lr", ("1e-6",), "schedule.min_lr", 1e-6),
    ("--decay-epochs", ("10",), "schedule.decay_epochs", 10.0),
    ("--warmup-epochs", ("20",), "schedule.warmup_epochs", 20),
    ("--cooldown-epochs", ("0",), "schedule.cooldown_epochs", 0),
    ("--decay-rate", ("0.5",), "schedule.decay_rate", 0.5),
    ("--dr", ("0.5",), "schedule.decay_rate", 0.5),
    ("--color-jitter", ("0.4",), "augment.color_jitter", 0.4),
    ("--aa", ("rand-m7",), "augment.aa", "rand-m7"),
    ("--smoothing", ("0",), "mix.smoothing", 0.0),
    ("--train-interpolation", ("random",), "data.train_interpolation", "random"),
    ("--repeated-aug", (), "data.repeated_aug", True),
    ("--no-repeated-aug", (), "data.repeated_aug", False),
    ("--ThreeAugment", (), "augment.three_augment", True),
    ("--src", (), "augment.src", True),
    ("--reprob", ("0",), "augment.reprob", 0.0),
    ("--remode", ("const",), "augment.remode", "const"),
    ("--recount", ("2",), "augment.recount", 2),
    ("--mixup", ("0.2",), "mix.mixup", 0.2),
    ("--cutmix", ("0.5",), "mix.cutmix", 0.5),
    ("--cutmix-minmax", ("0.2", "0.8"), "mix.cutmix_minmax", (0.2, 0.8)),
    ("--mixup-prob", ("0.5",), "mix.mixup_prob", 0.5),
    ("--mixup-switch-prob", ("0.3",), "mix.mixup_switch_prob", 0.3),
    ("--mixup-mode", ("elem",), "mix.mixup_mode", "elem"),
    ("--teacher-model", ("resnet50",), "distill.teacher_model", "resnet50"),
    ("--teacher-path", ("t.pth",), "distill.teacher_path", "t.pth"),
    ("--distillation-type", ("hard",), "distill.distillation_type", "hard"),
    ("--distillation-alpha", ("0.1",), "distill.distillation_alpha", 0.1),
    ("--distillation-tau", ("3",), "distill.distillation_tau", 3.0),
    ("--cosub", (), "distill.cosub", True),
    ("--finetune", ("vim_t.pth",), "finetune.finetune", "vim_t.pth"),
    ("--attn-only", (), "finetune.attn_only", True),
    ("--data-path", ("shards/",), "data.data_path", "shards/"),
    ("--output_dir", ("runs/a",), "run.output_dir", "runs/a"),
    ("--device", ("cpu",), "run.device", "cpu"),
    ("--seed", ("1",), "run.seed", 1),
    ("--resume", ("c.pth",), "run.resume", "c.pth"),
    ("--start_epoch", ("5",), "run.start_epoch", 5),
    ("--eval", (), "run.eval", True),
    ("--eval-crop-ratio", ("1.0",), "data.eval_crop_ratio", 1.0),
    ("--num_workers", ("25",), "data.num_workers", 25),
    ("--if_amp", (), "run.amp", True),
    ("--no_amp", (), "run.amp", False),
    ("--if_random_cls_token_position", (), "model.random_cls_token_position", True),
    ("--no_random_cls_token_position", (), "model.random_cls_token_position", False),
    ("--if_random_token_rank", (), "model.random_token_rank", True),
    ("--no_random_token_rank", (), "model.random_token_rank", False),
    ("--use-checkpoint", (), "model.use_checkpoint", True),
]
ACCEPTED: list[tuple[str, ...]] = [
    *((flag,) for flag in ("--dist-eval", "--pin-mem", "--no-pin-mem", "--train-mode", "--no_nan2num")),
    *(("--if_continue_inf",), ("--distributed",), ("--data-set", "IMNET")),
]
REFUSED: list[tuple[str, ...]] = [
    *((flag,) for flag in ("--if_nan2num", "--no_continue_inf", "--no-train-mode", "--resplit")),
    *(("--patience-epochs", "10"), ("--inat-category", "name"), ("--world_size", "8"), ("--dist_url", "env://")),
    *(("--local-rank", "0"), ("--local-rank=0",), ("--data-set", "CIFAR"), ("--data-set", "INAT19")),
]
# What hustvl/Vim's scripts give to main.py, on 8 GPUs, and the recipe that docs/coming_from_vim.md names instead.
ORIGINALS_NAME = "bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
FINETUNED = "--lr 5e-6 --min-lr 1e-5 --warmup-lr 1e-5 --drop-path 0.0 --weight-decay 1e-8 --epochs 30 --finetune CKPT"
SCRIPTS = {
    "pt-vim-t.sh": ("vim_tiny_patch16_224", "--batch-size 128 --drop-path 0.0 --weight-decay 0.1", "vim_tiny"),
    "pt-vim-s.sh": (
        "vim_small_patch16_224",
        "--batch-size 64 --drop-path 0.05 --weight-decay 0.05 --lr 1e-3",
        "vim_small",
    ),
    "ft-vim-t.sh": ("vim_tiny_patch16_stride8_224", f"--batch-size 128 {FINETUNED}", "vim_tiny_stride8"),
    "ft-vim-s.sh": ("vim_small_patch16_stride8_224", f"--batch-size 128 {FINETUNED}", "vim_small_stride8"),
}


def spellings(flag: str) -> set[str]:
    name, equals, value = flag.removeprefix("--").partition("=")
    return {f"--{spelled}{equals}{value}" for spelled in (name, name.replace("-", "_"), name.replace("_", "-"))}


@pytest.mark.parametrize(("flag", "words", "place", "value"), SETTINGS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_flag_of_the_original_sets_what_it_set(flag: str, words: tuple[str, ...], place: str, value: Any) -> None:
    section, name = place.split(".")
    for spelled in spellings(flag):
        config = load_config([spelled, *words])
        assert getattr(getattr(config, section), name) == value
        changed = {k for k, v in config.to_dict().items() if v != Config().to_dict()[k]}
        assert changed <= {section}


Printed = Callable[..., str]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Printed:
    """The settings that an entry point prints for a command line."""

    def run(main: Callable[[], Any], *argv: str) -> str:
        monkeypatch.setattr("sys.argv", [*argv, "--print-config"])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert (end.value.code, err) == (0, "")
        return out

    return run


@pytest.mark.parametrize("spell", ["-", "_"])
def test_vimfast_train_takes_the_command_lines_of_the_docs(spell: str, printed: Printed) -> None:
    """``vimfast train`` makes of the original's flags in docs/flags.md what ``python -m vimfast.train`` does."""

    def spelled(flag: str) -> str:
        return "--" + re.sub("[-_]", spell, flag[2:])

    rows = [line.split(" | ") for line in (ROOT / "docs" / "flags.md").read_text().splitlines() if "| `--" in line]
    theirs = [re.findall(r"`(--[\w-]+)", row[0]) for row in rows if len(row) == 5 and row[3] != "-"]
    taken = {spelled(flag) for flag, _, _, _ in SETTINGS}
    assert [names for names in theirs if not taken & set(map(spelled, names))] == [["--torch-compile"]]

    for negative in (False, True):  # of a flag and its opposite, the second would win
        argv = [
            word
            for flag, words, _, _ in SETTINGS
            if flag.startswith("--no") == negative
            for word in (spelled(flag), *words)
        ]
        argv += [word for flag, *words in ACCEPTED for word in (spelled(flag), *words)]
        alone = printed(vimfast.train.__main__.main, "vimfast.train", *argv)
        assert alone.count("  # --") >= 5
        assert printed(vimfast.__main__.main, "vimfast", "train", *argv) == alone
        assert printed(vimfast.__main__.main, "vimfast", "train", "--processes", "8", *argv) == alone


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_originals_scripts_and_our_recipes_are_the_same_settings(script: str, printed: Printed) -> None:
    model, flags, recipe = SCRIPTS[script]
    ends = ("--num_workers", "25", "--data-path", "D", "--output_dir", "O", "--no_amp")
    argv = ("--model", f"{model}_{ORIGINALS_NAME}", *flags.split(), *ends)
    there = yaml.safe_load(printed(vimfast.__main__.main, "vimfast", "train", "--processes", "8", *argv))
    own = load_config(["--config", recipe, "--no_amp"])
    batches = plan_batches(own, 8)
    assert (batches.batch_size, batches.accum_steps) == (there["data"]["batch_size"], 1)
    assert there["model"]["model"].startswith(f"{own.model.model}_")
    there["model"]["model"], there["optim"]["global_batch_size"] = own.model.model, own.optim.global_batch_size
    assert own.changed_since(there) == []
    assert script in (ROOT / "docs" / "coming_from_vim.md").read_text()


@pytest.mark.parametrize("words", ACCEPTED)
def test_flags_for_what_is_always_so_change_nothing(words: tuple[str, ...]) -> None:
    for spelled in spellings(words[0]):
        assert load_config([spelled, *words[1:]]).to_dict() == Config().to_dict()


@pytest.mark.parametrize("words", REFUSED)
def test_refused_flags_say_what_to_do(words: tuple[str, ...]) -> None:
    for spelled in spellings(words[0]):
        with pytest.raises(UserError, match=r"is not taken: .*(drop it|give |start with )"):
            load_config([spelled, *words[1:]])


def test_the_table_in_the_docs_is_of_these_flags() -> None:
    want = TABLE["table"]()
    assert (ROOT / "docs" / "flags.md").read_text() == want, "run python tools/flags_table.py > docs/flags.md"


def test_each_note_on_the_original_is_of_a_setting_and_each_setting_of_it_has_one() -> None:
    names = {f.name for section in dataclasses.fields(Config) for f in dataclasses.fields(section.default_factory)}
    assert set(TABLE["ORIGINAL"]) <= names
    noted = {place.split(".")[1] for _, _, place, _ in SETTINGS}
    assert set(TABLE["ORIGINAL"]) == noted | {"torch_compile"}
    taken = {words[0].lstrip("-").replace("-", "_").split("=")[0] for words in (*ACCEPTED, *REFUSED)}
    assert taken == {*compat.ACCEPTED, *compat.REFUSED, "data_set"}


def test_the_random_token_flags_reach_the_model() -> None:
    assert load_config(["--if_random_token_rank"]).model.options() == {"if_random_token_rank": True}
    flags = ["--if_random_cls_token_position", "--model-kwargs", "depth=2"]
    want = {"if_random_cls_token_position": True, "use_middle_cls_token": False, "depth": 2}
    assert load_config(flags).model.options() == want


@pytest.mark.parametrize(
    ("flags", "world", "want"),
    [
        ("--batch-size 64", 8, (64, 1)),
        ("--batch-size 64 --accum-steps 4", 8, (64, 4)),
        ("--batch-size 128 --global-batch-size 1024", 8, (128, 1)),
        ("--batch-size 128 --global-batch-size 1024", 1, (128, 8)),
        ("--batch-size 128 --global-batch-size 1024", 16, (64, 1)),
        ("--batch-size 100 --global-batch-size 1024", 2, (64, 8)),
        ("--batch-size 128 --global-batch-size 1024 --accum-steps 4", 2, (128, 4)),
        ("--batch-size 64 --global-batch-size 30", 3, (10, 1)),
        ("--batch-size 8 --global-batch-size 26", 2, (1, 13)),
    ],
)
def test_a_global_batch_is_the_same_on_any_number_of_gpus(flags: str, world: int, want: tuple[int, int]) -> None:
    assert plan_batches(load_config(flags.split()), world) == want


@pytest.mark.parametrize(("flags", "world"), [("", 3), ("--accum-steps 3", 1), ("", 2048)])
def test_a_global_batch_that_cannot_be_shared_out_is_reported(flags: str, world: int) -> None:
    config = load_config(["--global-batch-size", "1024", *flags.split()])
    with pytest.raises(UserError, match=r"give a multiple of \d+, such as (1023|2048)$"):
        plan_batches(config, world)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_of_this_code_and_shares_out_on_1_and_8_gpus(path: Path) -> None:
    config = load_config(["--config", str(path)])
    batches = {world: plan_batches(config, world) for world in (1, 8)}
    if config.optim.global_batch_size:
        assert {world * b.batch_size * b.accum_steps for world, b in batches.items()} == {
            config.optim.global_batch_size
        }
    model = create_model(config.model.model, img_size=config.model.input_size, device="meta", **config.model.options())
    assert path.stem in ("cifar10", "debug", "demo", "tiny_imagenet") or path.stem.split("_")[1] in config.model.model
    assert model.num_classes == 1000

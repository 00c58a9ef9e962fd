"""docs/flags.md: every flag with its default, what it does, and what hustvl/Vim's main.py makes of it.

    python tools/flags_table.py > docs/flags.md

The table is made from the settings themselves; only the notes on the original are written here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vimfast.config import Config, compat

# Field -> (default and behaviour there, what differs here). A field without an entry is new.
ORIGINAL: dict[str, tuple[str, str]] = {
    "model": ("deit_base_patch16_224", "another default; the original's names and their short forms"),
    "input_size": ("224", ""),
    "drop": ("0", ""),
    "drop_path": ("0.1", ""),
    "random_cls_token_position": (
        "off; no effect in the named models, which hold the token in the middle",
        "works in all of them: the token then stands first in evaluation",
    ),
    "random_token_rank": ("off; prints in each forward pass", "silent; the head reads the token wherever it went"),
    "data_path": ("a folder of its authors'", "no default; shards too"),
    "batch_size": ("64", ""),
    "repeated_aug": ("on, but not in a run of one process", "on in every run"),
    "train_interpolation": ("bicubic", ""),
    "eval_crop_ratio": ("0.875; inputs up to 32 pixels are not resized", ""),
    "num_workers": ("10 processes", "threads of one process; as many as help"),
    "aa": ("rand-m9-mstd0.5-inc1; any of timm's policies", "RandAugment in all its words; other policies are refused"),
    "color_jitter": ("0.3; ignored with --aa", ""),
    "three_augment": ("off", ""),
    "src": ("off; read by --ThreeAugment alone", "works without it too"),
    "reprob": ("0.25", ""),
    "remode": ("pixel", ""),
    "recount": ("1", ""),
    "mixup": ("0.8", ""),
    "cutmix": ("1.0", ""),
    "cutmix_minmax": ("none", ""),
    "mixup_prob": ("1.0", ""),
    "mixup_switch_prob": ("0.5", ""),
    "mixup_mode": ("batch; pair and elem crash on numpy 1.24 and newer", "all three work"),
    "smoothing": ("0.1", ""),
    "bce_loss": ("off; with smoothing every class is a target", "the classes in an image are its targets"),
    "opt": ("adamw", ""),
    "opt_eps": ("1e-8", ""),
    "opt_betas": ("none", ""),
    "momentum": ("0.9", ""),
    "weight_decay": ("0.05", ""),
    "clip_grad": ("none", ""),
    "lr": ("5e-4, x batch x GPUs / 512", "the batch of an update, accumulated ones included"),
    "unscale_lr": ("off", ""),
    "finetune": (
        "none; resamples as if the class token stood first; what does not fit is left out in silence",
        "resamples around the token; reports what is not loaded",
    ),
    "attn_only": ("off; finds no attention and trains the head and positions", "trains the mixers too"),
    "distillation_type": ("none; soft and hard stop at once: the model has no second head", "the head itself learns"),
    "teacher_model": ("regnety_160", ""),
    "teacher_path": ("none; runs code from the file", "runs none"),
    "distillation_alpha": ("0.5", ""),
    "distillation_tau": ("1.0", ""),
    "cosub": ("off", ""),
    "epochs": ("300", ""),
    "sched": ("cosine", "plateau is refused: it follows past accuracies"),
    "warmup_lr": ("1e-6", ""),
    "min_lr": ("1e-5", ""),
    "warmup_epochs": ("5", ""),
    "cooldown_epochs": ("10; not reached", ""),
    "decay_epochs": ("30", ""),
    "decay_rate": ("0.1", ""),
    "lr_noise": ("none", ""),
    "lr_noise_pct": ("0.67", ""),
    "lr_noise_std": ("1.0", ""),
    "model_ema": ("on; off crashes at the first save and under --eval", "may be off"),
    "model_ema_decay": ("0.99996", ""),
    "model_ema_force_cpu": ("off", ""),
    "output_dir": ("none", "a folder with another run in it is not overwritten"),
    "resume": (
        "none; one epoch ahead in its schedule, best accuracy and random state lost; runs code from the file",
        "resumes at the same step, to the same bits; runs none",
    ),
    "eval": ("off; batches of 30 times --batch-size; resampling only with --finetune", "resamples the positions"),
    "start_epoch": ("0", "default: where the checkpoint stopped"),
    "device": ("cuda", "auto: the GPU if there is one"),
    "seed": ("0", "fixes every crop and mix, on any number of GPUs"),
    "amp": ("off; fp16 with --if_amp, which diverges", "on: bf16; --no-amp for fp32"),
    "torch_compile": ("TORCH_COMPILE=1", "the flag, or TORCH_COMPILE=1"),
    "use_checkpoint": ("not in main.py; of the segmentation backbone", "of every model that can"),
}

HEAD = """# Every flag of `python -m vimfast.train`

Made by `python tools/flags_table.py > docs/flags.md`. Each flag is also a YAML key, under its section's name or, as
timm writes it, without one. `--print-config` prints all of them, each with where its value comes from. Flags are taken
with hyphens and with underscores; one that is on by default is turned off by `--no-...`. The column hustvl/Vim holds
its `main.py`'s default and how it goes about what the flag says; the last, what is otherwise here. A dash: there is no
such flag.
"""


def table() -> str:
    """The page, as Markdown."""
    lines = [HEAD]
    for section in dataclasses.fields(Config):
        lines += [f"## {section.name}", "", "| flag | default | what it does | hustvl/Vim | here |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        part: Any = section.default_factory
        lines += [_row(f) for f in dataclasses.fields(part)] + [""]
    lines += ["## Taken, for what they ask for is always so", "", "| flag | why |", "| --- | --- |"]
    lines += [f"| `--{name}` | {why} |" for name, why in compat.ACCEPTED.items()]
    lines += ["| `--data_set IMNET` | any set of images in ImageNet's layout will do |", ""]
    lines += ["## Refused, with this sentence", "", "| flag | what to do instead |", "| --- | --- |"]
    lines += [f"| `--{name}` | {why} |" for name, why in compat.REFUSED.items()]
    lines += [f"| `--data_set CIFAR` and so on | {compat.DATA_SETS} |"]
    return "\n".join(lines) + "\n"


def _row(f: dataclasses.Field[Any]) -> str:
    default = f.default_factory() if callable(f.default_factory) else f.default
    names = [f"`--{name.replace('_', '-')}`" for name in (f.name, *f.metadata["aliases"])]
    if default is True:
        names.append(f"`--no-{f.name.replace('_', '-')}`")
    there, here = ORIGINAL.get(f.name, ("-", ""))
    cells = [", ".join(names), _shown(default), f.metadata["help"].replace("|", "\\|"), there, here]
    return "| " + " | ".join(cells) + " |"


def _shown(value: Any) -> str:
    if value is None or value in ("", {}):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(f"{v:g}" for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    print(table(), end="")

"""Every command on a page of the docs is one that its program takes, and what a test can run is run."""

from __future__ import annotations

import argparse
import hashlib
import re
import runpy
import shutil
import sys
import tarfile
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import visible, write_image
from doc_steps import PAGES, ROOT, Code, Command, blocks, run, steps
from scipy.io import savemat
from torch.distributed.run import get_args_parser
from torchvision.datasets.imagenet import ARCHIVE_META

from vimfast.__main__ import COMMANDS
from vimfast.checks.checking import check
from vimfast.checks.findings import CheckOptions
from vimfast.commands.train import _split
from vimfast.config import load_config, resolve
from vimfast.config.flags import flag_parser
from vimfast.errors import UserError
from vimfast.shards.convert import convert
from vimfast.shards.format import ConversionOptions

SHOWN = [step for page in PAGES for step in steps(page)]

# What is not run here, and why.
NOT_RUN = [
    (r"^make ", "takes minutes, and CI runs most of them"),
    (r"^pip |^python -m (venv|build)", "installs"),
    (
        r"^python tools/|-m vimfast_kernels.tune",
        "measures or draws for minutes, some on a GPU; tests/test_tools.py runs parts",
    ),
    (r"^python -m pytest", "the tests themselves"),
    (r"^python main.py|torch.distributed.launch", "of hustvl/Vim"),
    (r"^torchrun |^srun ", "several hosts or GPUs, and a new interpreter each; tests/test_training.py runs torchrun"),
    (r"^vimfast bench", "compiles models for a minute; tests/test_bench.py runs it"),
    (r"^vimfast prepare s3://", "needs two stores; tests/test_prepare_stores.py starts them"),
    (r"--engine ray", "needs a cluster; tests/test_cluster.py starts one"),
    (r"^vimfast doctor", "runs the whole Vim-Tiny; tests/test_doctor.py runs it"),
    (
        r"--config (vim_tiny_8gpu|vim_tiny_rtx4090) ",
        "for that hardware; what differs from vim_tiny is batches and checkpoints",
    ),
    (
        r"^vimfast export vim_t_midclstok",
        "needs what hustvl/Vim publishes; tests/test_moving_over.py has a file like it",
    ),
    (
        r"^vimfast train --(processes N|max-restarts 3) $|^vimfast (report RUN|check DATA)|^vimfast-prepare --re",
        "named without its folders",
    ),
    (r"--data-path s3://", "needs a store; tests/test_remote.py has one"),
    (r"^python -m vimfast\.", "the same as a command of vimfast; other tests run it by this name"),
    (r"^python train\.py ", "timm's; its wheel does not have it"),
]
NOT_RUN_CODE = {
    "docs/library.md": "tests/test_library.py runs it",
    "docs/kernels.md": "my_scan is the reader's; tests/test_scan.py registers one",
    "docs/imagenet.md": "needs ImageNet's archives; the last test here makes some",
}
SMALL = (  # before a page's own flags, which win
    *("--device", "cpu", "--num-workers", "1", "--input-size", "48", "--model-kwargs", "depth=1", "embed_dim=32"),
    *("--batch-size", "4", "--global-batch-size", "4", "--epochs", "1", "--warmup-epochs", "0"),
    *("--steps-per-epoch", "2", "--eval-steps", "1", "--log-every", "1", "--stages", "[]"),
)
INSTEAD = {"--processes": "2", "--epochs": "2", "--eval-every": "1"}  # of what a page gives
WRITES = ("--out", "--output_dir", "--grid")
ELSEWHERE = {  # flags on pages that are no program's of this repository
    *("--gpus", "--cpus-per-task", "--signal", "--requeue", "--open-mode", "--nodes", "--ntasks-per-node", "--time"),
    *("--gpus-per-node", "--durations", "--no"),
    *("--device-modules", "--img-size"),  # timm's
    "--preload",  # gunicorn's
    "--directory",  # of python -m http.server
}


class Parsed(BaseException):
    """Raised instead of what a program does once it has parsed its flags."""


@pytest.fixture
def parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs parse their flags, and raise :class:`Parsed`."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *given: Any) -> None:
        raise Parsed(parse(parser, *given))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)


def begin(argv: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program of a command parse its flags.

    Raises:
        UserError, SystemExit: it refuses them.
    """
    monkeypatch.setattr(sys, "argv", list(argv))
    program, *rest = argv
    if program == "srun":
        begin(argv[argv.index("torchrun") :], monkeypatch)
    elif program == "torchrun":
        at = rest.index("-m")
        assert rest[at + 1] == "vimfast.train"
        with pytest.raises(Parsed):
            get_args_parser().parse_args(rest)
        begin(["vimfast", "train", *rest[at + 2 :]], monkeypatch)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        variables = re.findall(r"^(\w+) [?:]?= ", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in rest:
            assert word.split("=")[0] in (variables if "=" in word else targets), word
    elif program == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert set(re.findall(r"\[(\w+)\]", " ".join(rest))) <= set(extras)
    elif program == "python" and rest[0].startswith("tools/"):
        if "parse_args" in (ROOT / rest[0]).read_text():
            monkeypatch.setattr(sys, "argv", rest)
            runpy.run_path(str(ROOT / rest[0]), run_name="__main__")
    elif program == "python" and rest[:1] == ["-m"] and rest[1] == "vimfast.train":
        begin(["vimfast", "train", *rest[2:]], monkeypatch)
    elif program == "python" and rest[:2] == ["-m", "vimfast.timm"]:
        pass  # what follows is a script of timm's, and its flags
    elif program == "python" and rest[:1] == ["-m"] and rest[1].startswith("vimfast"):
        monkeypatch.setattr(sys, "argv", rest[1:])
        import_module(rest[1]).main()
    elif program == "vimfast-prepare":
        begin(["vimfast", "prepare", *rest], monkeypatch)
    elif program == "vimfast" and rest[0].startswith("-"):
        assert f'"{rest[0]}"' in (ROOT / "vimfast" / "__main__.py").read_text()
    elif program == "vimfast" and rest[0] == "train":
        try:
            load_config(_split(rest[1:])[1])
        except Parsed as parsed:
            resolve(vars(parsed.args[0]))
    elif program == "vimfast":
        module, _, function = COMMANDS[rest[0]].function.partition(":")
        monkeypatch.setattr(sys, "argv", [f"vimfast {rest[0]}", *rest[1:]])
        getattr(import_module(module), function)()


def outcome(argv: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> BaseException | None:
    """What :func:`begin` raises."""
    try:
        begin(argv, monkeypatch)
    except (Parsed, SystemExit, UserError) as end:
        return end
    return None


@pytest.mark.parametrize("words", sorted({step.words for step in SHOWN if isinstance(step, Command)}), ids=" ".join)
@pytest.mark.usefixtures("parsing")
def test_a_command_is_taken_by_its_program(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "photos.yaml").write_text(blocks("docs/own_images.md", "yaml")[0])
    end = outcome(words, monkeypatch)
    assert not isinstance(end, SystemExit) or end.code == 0  # of --help
    # A command may be named without its arguments, but not with unknown flags.
    assert not isinstance(end, UserError) or re.search("required|is missing|expected one", str(end)), end


@pytest.mark.usefixtures("parsing")
def test_a_misspelled_flag_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--output_dri"):
        begin(["torchrun", "--nproc_per_node=8", "-m", "vimfast.train", "--output_dri", "runs/a"], monkeypatch)
    with pytest.raises(UserError, match="vim_tyni"):
        begin(["vimfast", "train", "--processes", "8", "--config", "vim_tyni"], monkeypatch)
    with pytest.raises(AssertionError):
        begin(["make", "dmeo"], monkeypatch)


def test_flags_in_the_text_are_known() -> None:
    """Flags that a page names by themselves, in `code`."""
    known: set[str] = set(ELSEWHERE)
    parsers: list[argparse.ArgumentParser] = [flag_parser(), get_args_parser()]
    for parser in parsers:
        known |= parser._option_string_actions.keys()
    for source in [
        *(ROOT / "vimfast").rglob("*.py"),
        *(ROOT / "tools").glob("*.py"),
        *(ROOT / "kernels").rglob("*.py"),
    ]:
        known |= set(re.findall(r"\"(--[a-z][\w-]+)\"", source.read_text()))
    for page in PAGES:
        if page in ("docs/flags.md", "docs/coming_from_vim.md", "docs/lab/flags.md"):  # which have hustvl/Vim's, too
            continue
        for span in re.findall(r"`([^`\n]+)`", (ROOT / page).read_text()):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
                assert flag in known, f"{page}: {flag}"


def why_not(step: Code | Command) -> str | None:
    """Why a step is not run here; None: it is."""
    if isinstance(step, Code):
        return NOT_RUN_CODE.get(step.page)
    if len(step.words) < 3 and step.words[0] != "make":
        return "named without its arguments"
    return next((why for pattern, why in NOT_RUN if re.search(pattern, f"{step.text} ")), None)


def test_the_list_of_what_is_not_run_has_nothing_stale() -> None:
    texts = [f"{step.text} " for step in SHOWN if isinstance(step, Command)]
    for pattern, _ in NOT_RUN:
        assert any(re.search(pattern, text) for text in texts), pattern
    assert NOT_RUN_CODE.keys() <= {step.page for step in SHOWN if isinstance(step, Code)}


def runnable() -> dict[str, list[Code | Command]]:
    """What is run of each page; a command that a page before has, too, is run there alone."""
    found: dict[str, list[Code | Command]] = {}
    seen = set()
    for step in SHOWN:
        if why_not(step) is None and step[1] not in seen:
            seen.add(step[1])
            found.setdefault(step.page, []).append(step)
    return found


RUNNABLE = runnable()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tree: Path) -> Path:
    """What pages suppose that a reader has: images, shards, tars, a run, and a checkpoint from elsewhere."""
    folder = tmp_path_factory.mktemp("given")
    shutil.copytree(tree, folder / "imagenet_data")
    shutil.copytree(tree, folder / "photos")
    shutil.copytree(tree / "val" / "n01", folder / "new_photos")
    write_image(folder / "cat.jpg", 1, (300, 200))
    (folder / "photos.yaml").write_text(blocks("docs/own_images.md", "yaml")[0])
    for words in ("prepare imagenet_data/ --out shards/", "train --data-path shards/ --output_dir runs/tiny"):
        succeed(words.split(), folder)
    (folder / "tars").mkdir()
    for tar in (folder / "shards").glob("*.tar"):
        shutil.copy(tar, folder / "tars")
    weights = torch.load(folder / "runs" / "tiny" / "checkpoint.pth", weights_only=True)["model"]
    torch.save({"model": weights}, folder / "vim_t_midclstok_76p1acc.pth")
    return folder


def succeed(words: Sequence[str], folder: Path) -> None:
    """Run a subcommand on a model that is small and for an epoch that is short; assert that it did what it is for."""
    name, *rest = words
    if name == "train":
        rest = [*SMALL, *(INSTEAD.get(before, word) for before, word in pairwise(["", *rest]))]
    outputs = [folder / word for before, word in pairwise(rest) if before in WRITES]
    status, text = run(["vimfast", name, *rest], folder)
    assert status == 0, f"vimfast {' '.join([name, *rest])}\n{text}"
    for output in outputs:
        assert output.exists(), output


@pytest.mark.parametrize("page", RUNNABLE)
def test_a_page_does_what_it_says(page: str, given: Path, tmp_path: Path) -> None:
    """Its commands and its code, in their order; what it is to write is not there before."""
    folder = tmp_path / "here"
    shutil.copytree(given, folder)
    written = set()
    for step in RUNNABLE[page]:
        if isinstance(step, Code):
            status, text = run(step.text, folder)
            assert status == 0, step.text + text
            continue
        name, *rest = step.words[1:] if step.words[0] == "vimfast" else ["prepare", *step.words[1:]]
        for before, word in pairwise(rest):
            if before in ("--out", "--output_dir") and word not in written and "auto" not in rest:
                written.add(word)
                shutil.rmtree(folder / word, ignore_errors=True)
        succeed([name, *rest], folder)


def test_archives_like_imagenets_become_a_folder_that_is_fit_to_train_on(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "imagenet_data"
    root.mkdir()
    synsets = [(i + 1, name, f"word {i}", "", 0) for i, name in enumerate(("n03", "n01", "n02"))]  # an order of its own
    images = sorted((tree / "val").glob("*/*"), key=lambda path: path.name[::-1])
    numbers = {name: number for number, name, *_ in synsets}
    devkit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    fields = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    savemat(devkit / "meta.mat", {"synsets": np.array(synsets, dtype=fields)})
    truth = "".join(f"{numbers[image.parent.name]}\n" for image in images)
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    archives = {split: root / name for split, (name, _) in ARCHIVE_META.items()}
    with tarfile.open(archives["devkit"], "w:gz") as tar:
        tar.add(devkit.parent, devkit.parent.name)
    with tarfile.open(archives["val"], "w") as tar:
        for i, image in enumerate(images):
            tar.add(image, f"ILSVRC2012_val_{i + 1:08}.JPEG")
    with tarfile.open(archives["train"], "w") as tar:
        for name in numbers:
            with tarfile.open(tmp_path / f"{name}.tar", "w") as inner:
                for image in sorted((tree / "train" / name).iterdir()):
                    inner.add(image, image.name)
            tar.add(tmp_path / f"{name}.tar", f"{name}.tar")
    for split, archive in archives.items():
        monkeypatch.setitem(ARCHIVE_META, split, (archive.name, hashlib.md5(archive.read_bytes()).hexdigest()))
    monkeypatch.chdir(tmp_path)
    convert(root, tmp_path / "from_archives", ConversionOptions(), workers=1)
    (code,) = blocks("docs/imagenet.md", "python")
    exec(compile(code, "docs/imagenet.md", "exec"), {})
    convert(root, tmp_path / "from_folders", ConversionOptions(), workers=1)
    assert visible(tmp_path / "from_archives") == visible(tmp_path / "from_folders")
    report = check(root, CheckOptions(classes=None, splits=("train", "val"), decode=True, workers=1))
    assert report.fit
    for split in ("train", "val"):
        names = ("n01", "n02", "n03")
        assert sorted(path.name for path in (root / split).iterdir()) == list(names)
        for name in names:
            ours, theirs = ([p.read_bytes() for p in (top / split / name).iterdir()] for top in (root, tree))
            assert sorted(ours) == sorted(theirs)

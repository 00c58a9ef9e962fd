"""``report.html`` says what happened, to the last digit of other files, and survives what happens to a run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from browser import look, needs_browser
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from runs import RECIPE, Stops, call, records, train

from vimfast.__main__ import COMMANDS
from vimfast.config import load_config
from vimfast.data.source import open_source
from vimfast.errors import UserError, printable
from vimfast.inference import load_classifier, predict
from vimfast.run_report import read_facts, write_facts, write_page
from vimfast.run_report.environment import git_state
from vimfast.run_report.mistakes import confused, hardest
from vimfast.train.answers import Answers

ODD_CLASS, ODD_FILE = "<b>n01&\"'", b"new\nline\xff<i>.JPEG"


class Run(NamedTuple):
    data: Path
    flags: tuple[str, ...]
    folder: Path
    stopped: str  # the page when the run had been stopped in its second epoch
    page: str  # at its end


@pytest.fixture(scope="module")
def run(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three epochs, stopped in the second and resumed, on classes and files of odd names."""
    top = tmp_path_factory.mktemp("report")
    data, folder, recipe = top / "data", top / "a run", top / "recipe.yaml"
    shutil.copytree(tree, data)
    for split in ("train", "val"):
        (data / split / "n01").rename(data / split / ODD_CLASS)
    os.rename(data / "val" / "n02" / "n02_0.JPEG", os.fsencode(data / "val" / "n02") + b"/" + ODD_FILE)
    recipe.write_text(yaml.safe_dump(RECIPE))
    flags = ("--config", str(recipe), "--epochs", "3", "--eval-batch-size", "4", "--data-path", str(data))
    flags = (*flags, "--output_dir", str(folder), "--resume", "auto")
    train(*flags, control=Stops("epoch 1, step 1"))
    stopped = (folder / "report.html").read_text()
    train(*flags)
    return Run(data, flags, folder, stopped, (folder / "report.html").read_text())


def test_a_resumed_run_keeps_its_history(run: Run) -> None:
    facts = read_facts(run.folder)
    assert facts is not None
    assert [pace.epoch for pace in facts.pace] == [r["epoch"] for r in records(run.folder)] == [0, 1, 2]
    assert all(pace.images_per_second > 0 and 0 <= pace.data_share <= 1 for pace in facts.pace)
    assert re.search(r"stopped at epoch 1, step 1 of \d+", run.stopped)
    assert "finished: 3 epochs" in run.page
    assert "stopped" not in run.page
    assert "--resume auto" in run.stopped
    assert "--resume auto" not in run.page
    for text, epochs in ((run.stopped, 1), (run.page, 3)):
        assert len(re.findall(r'<tr><td class="number">\d', text)) == epochs


def test_figures_are_those_of_the_log(run: Run) -> None:
    log = records(run.folder)
    best = max(log, key=lambda record: (record["test_acc1"], -record["epoch"]))
    tiles = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)<small>", run.page))
    assert tiles["Best top-1"] == f"{best['test_acc1']:.2f}%"
    assert tiles["Validation loss"] == f"{log[-1]['test_loss']:.4f}"
    assert f'<td class="number">{best["epoch"]} (best)</td>' in run.page
    for record in log:
        row = re.search(rf'<tr><td class="number">{record["epoch"]}\b.*', run.page)
        assert row
        for name in ("train_loss", "test_loss", "ema_test_loss"):
            assert f">{record[name]:.4f}<" in row[0]


def test_top5_is_shown_where_it_can_be_below_100(run: Run, tmp_path: Path) -> None:
    """The page of a run of three classes had a tile and a chart of 100 %."""
    facts = read_facts(run.folder)
    assert facts is not None
    for name in ("log.txt", "config.yaml"):
        shutil.copy(run.folder / name, tmp_path)
    for classes, shown in ((5, False), (6, True), (None, True)):
        write_facts(tmp_path, replace(facts, classes=classes))
        assert ("top-5" in write_page(tmp_path).read_text().lower()) == shown
    assert facts.classes == len(open_source(str(run.data), "val").classes)


def test_mistakes_are_those_of_the_model(run: Run) -> None:
    """Against the evaluation's own score, the folders that the images lie in, and `vimfast predict`."""
    facts = read_facts(run.folder)
    assert facts is not None
    mistakes = facts.mistakes
    assert mistakes is not None
    assert (mistakes.epoch, mistakes.images, len(mistakes.hardest)) == (2, 15, 15)
    assert mistakes.wrong == round(15 * (1 - records(run.folder)[-1]["test_acc1"] / 100))
    own = [image.label_probability for image in mistakes.hardest]
    assert own == sorted(own)
    paths = {printable(str(path.relative_to(run.data))): path for path in (run.data / "val").glob("*/*")}
    assert {image.file for image in mistakes.hardest} == paths.keys()
    last = load_classifier(run.folder / "checkpoint.pth", weights="raw", device="cpu")
    seen = {image.path: image.guesses for image in predict(last, paths.values()).images}
    for image in mistakes.hardest:
        guesses = {printable(guess.label): guess.probability for guess in seen[paths[image.file]]}
        assert image.label == image.file.split("/")[1]
        assert image.label_probability == pytest.approx(guesses[image.label], abs=1e-5)
        assert image.guess_probability == pytest.approx(max(guesses.values()), abs=1e-5)
        assert guesses[image.guess] == pytest.approx(image.guess_probability, abs=1e-5)
        assert image.thumbnail is not None
    pairs = Counter((image.label, image.guess) for image in mistakes.hardest if image.label != image.guess)
    assert {(pair.label, pair.guess): pair.images for pair in mistakes.confused} == pairs
    assert {pair.of for pair in mistakes.confused} <= {5}


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_nothing_and_runs_nothing(run: Run) -> None:
    tags = _Tags()
    tags.feed(run.page)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in tags.found}
    sources = [own[name] for _, own in tags.found for name in ("src", "href", "srcset", "action") if name in own]
    assert len(sources) == 15
    assert all(str(source).startswith("data:image/jpeg;base64,") for source in sources)
    assert not [name for _, own in tags.found for name in own if name.startswith("on")]
    assert "url(" not in run.page
    assert "@import" not in run.page
    policy = next(own["content"] for tag, own in tags.found if tag == "meta" and "http-equiv" in own)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_odd_names_are_text(run: Run) -> None:
    assert ODD_CLASS not in run.page
    assert "&lt;b&gt;n01&amp;&#34;&#39;" in run.page
    assert "new\\nline\\udcff&lt;i&gt;.JPEG" in run.page


def test_the_next_commands_are_commands(run: Run) -> None:
    for text, count in ((run.stopped, 4), (run.page, 3)):
        commands = [shlex.split(_unescaped(words)) for words in re.findall(r"<h3>To .*</h3>\n<pre>(.*?)</pre>", text)]
        assert len(commands) == count
        for program, command, *words in commands:
            assert program == "vimfast"
            assert command in COMMANDS
            assert str(run.folder) in " ".join(words)
            if command == "train":
                cfg = load_config(words)
                assert (cfg.data.data_path, cfg.run.output_dir) == (str(run.data), str(run.folder))
                assert cfg.run.resume == (str(run.folder) if cfg.run.eval else "auto")


def _unescaped(text: str) -> str:
    return text.replace("&#39;", "'").replace("&#34;", '"').replace("&amp;", "&")


def test_the_command_writes_the_same_page_without_torch(run: Run) -> None:
    (run.folder / "report.html").unlink()
    done = call("vimfast", "report", str(run.folder), importtime=True)
    assert done.stdout == f"written to {run.folder / 'report.html'}\n"
    assert not re.search(r"\| +(torch|timm)$", done.stderr, re.MULTILINE)
    again = (run.folder / "report.html").read_text()
    written = re.compile(r"\nWritten [\d:\- ]+ by")
    assert written.sub("", again) == written.sub("", run.page)


def test_what_is_no_run_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no log\.txt; give the --output_dir of a run of at least one epoch"):
        write_page(tmp_path)
    (tmp_path / "log.txt").write_text("no JSON\n[1]\n")
    with pytest.raises(UserError, match=r"log\.txt is a file; give the --output_dir of a run"):
        write_page(tmp_path / "log.txt")
    with pytest.raises(UserError, match=r"log\.txt holds no epoch"):
        write_page(tmp_path)
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": null, "test_acc1": "<b>", "train_lr": 0.1}\n{"epo')
    for content in (b"{", b'{"processes": 0, "plan": [], "software": []}', b'{"processes": "<b>"}'):
        (tmp_path / "report.json").write_bytes(content)
        with pytest.raises(UserError, match=r"report\.json is damaged \(.*\); delete it; the next epoch"):
            write_page(tmp_path)
    (tmp_path / "report.json").unlink()
    assert b"1 epoch<" in write_page(tmp_path).read_bytes()  # no settings, no facts: what the log says


def test_damaged_facts_cost_a_warning(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / "report.json").write_text('{"processes": 1')
    train(*run.flags, "--output_dir", str(folder), "--epochs", "4", "--eval-steps", "1")
    assert [r["epoch"] for r in records(folder)] == [0, 1, 2, 3]
    facts = read_facts(folder)
    assert facts is not None
    assert [pace.epoch for pace in facts.pace] == [3]
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "report" in line)
    assert "report.json is damaged" in line
    assert line.endswith("the report has no speed of the epochs before 3")


def test_images_left_out_do_not_shift_the_others(run: Run, tree: Path, tmp_path: Path) -> None:
    data, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tree, data)
    broken = data / "val" / "n01" / "n01_3.JPEG"  # in a batch with others of its class
    broken.write_bytes(broken.read_bytes()[:300])
    flags = ("--data-path", str(data), "--output_dir", str(folder), "--epochs", "1", "--steps-per-epoch", "1")
    train(*run.flags, *flags, "--on-bad-image", "skip")
    facts = read_facts(folder)
    assert facts is not None
    assert facts.mistakes is not None
    assert facts.mistakes.images == len(facts.mistakes.hardest) == 14
    expected = {str(path.relative_to(data)) for path in data.glob("val/*/*") if path != broken}
    assert {image.file for image in facts.mistakes.hardest} == expected
    assert all(image.label == image.file.split("/")[1] for image in facts.mistakes.hardest)
    assert facts.mistakes.wrong == round(14 * (1 - records(folder)[-1]["test_acc1"] / 100))


@needs_browser
def test_a_browser_shows_it(run: Run, tmp_path: Path) -> None:
    for width, dark in ((1200, True), (400, False)):
        found, complaints = look(run.folder / "report.html", tmp_path, width=width, dark=dark)
        assert complaints == []
        assert (found["width"], found["content"]) == (width, width)
        assert (found["charts"], found["lines"]) == (5, 3 + 2 + 1 + 1 + 1)  # no top-5 of three classes
        assert (found["images"], found["broken"]) == (15, 0)
        assert found["columns"] == (3 if width == 1200 else 1)
        assert found["outside"] == []


classes = st.integers(0, 4)


@given(st.lists(st.tuples(classes, classes), max_size=60))
def test_confused_pairs_against_a_count(answers: list[tuple[int, int]]) -> None:
    labels, guesses = np.array(answers, np.int64).reshape(-1, 2).T
    counted = Counter(pair for pair in answers if pair[0] != pair[1])
    of = Counter(label for label, _ in answers)
    found = confused(labels, guesses, 5)
    assert [pair.images for pair in found] == sorted(counted.values(), reverse=True)[:5]
    assert all(counted[pair.label, pair.guess] == pair.images and of[pair.label] == pair.of for pair in found)
    own = np.array([(7 * label + guess) % 5 / 5 for label, guess in answers], np.float32)
    ids = np.arange(len(answers))[::-1]
    assert [(own[i], ids[i]) for i in hardest(own, ids, 10)] == sorted(zip(own, ids, strict=True))[:10]


def test_the_state_of_a_checkout(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, "-C", str(tmp_path), *words], check=True, capture_output=True)

    code = tmp_path / "code.py"
    code.write_text("1\n")
    assert git_state(code) == ""
    git("init", "-b", "main")
    assert git_state(code) == ""
    git("add", "code.py")
    git("commit", "-m", "first")
    assert re.fullmatch(r"commit [0-9a-f]{10} of main, unchanged", git_state(code))
    code.write_text("2\n")
    assert git_state(tmp_path).endswith(" of main, 1 file changed")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "installed.py").touch()
    assert git_state(tmp_path / "site" / "installed.py") == ""


@pytest.mark.gpu
def test_no_batch_waits_for_the_host() -> None:
    answers, device = Answers(), torch.device("cuda")
    logits, labels = torch.randn(8, 10, device=device), torch.arange(8, device=device)
    answers.begin()
    answers.add(logits, labels)  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        answers.add(logits, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")

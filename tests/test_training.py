"""The main job on real files: train, stop, resume, evaluate, alone and under torchrun; and what bad input says."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import RECIPE, ROOT, Stops, call, differences, records, refused, same, start, train

from vimfast.augment.colours import IMAGENET_MEAN, IMAGENET_STD
from vimfast.augment.recipe import Recipe
from vimfast.checkpoint import kept_checkpoints, load_checkpoint
from vimfast.config import AugmentConfig, load_config
from vimfast.data.views import CutOut, Stage
from vimfast.dist import World
from vimfast.errors import UserError
from vimfast.processes.control import Control
from vimfast.train.build import build
from vimfast.train.loop import EpochEnd, Hook, Place, TrainingRun
from vimfast.train.report import Reporter


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return str(path)


def test_a_run_leaves_what_a_user_looks_for(recipe: str, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = call("vimfast.train", "--config", recipe, "--data-path", str(shards), "--output_dir", str(run))
    readme = (ROOT / "README.md").read_text()
    listed = re.findall(r"^\| (`.*?) \|", readme[readme.index("| in a run folder |") :], re.MULTILINE)
    named = {name.strip("`/") for row in listed for name in row.split(", ")}
    assert {"checkpoint.pth", "log.txt", "tensorboard"} < set(os.listdir(run)) <= named
    assert list((run / "tensorboard").iterdir())
    records = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1]
    assert {"train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "n_parameters"} <= records[0].keys()
    assert "waiting for data" in done.stdout
    assert "img/s" in (run / "train.log").read_text()

    flags = ("--config", recipe, "--data-path", str(shards), "--eval", "--resume")
    output = call("vimfast.train", *flags, str(run / "best_checkpoint.pth")).stdout
    best = max(records, key=lambda r: r["test_acc1"])
    assert f"* Acc@1 {best['test_acc1']:.3f} Acc@5 {best['test_acc5']:.3f} loss {best['test_loss']:.3f}" in output
    assert f"Accuracy of the network on the 15 test images: {best['test_acc1']:.1f}%" in output
    assert "Accuracy of the ema network on the 15 test images" in output


def test_a_stopped_run_continues_to_the_same_bits(recipe: str, shards: Path, tmp_path: Path) -> None:
    flags = ("--config", recipe, "--data-path", str(shards), "--output_dir")
    whole = train(*flags, str(tmp_path / "whole"))
    train(*flags, str(tmp_path / "parts"), control=Stops(f"epoch 0, step {whole.place.steps} "))  # in the evaluation
    assert not (tmp_path / "parts" / "log.txt").exists()
    torch.manual_seed(123)  # whatever happens in between
    train(*flags, str(tmp_path / "parts"), "--resume", "auto", control=Stops("epoch 1, step 1 "))
    resumed = (*flags, str(tmp_path / "parts"), "--resume", "auto")
    assert "keep the data and --steps-per-epoch as" in refused(
        *resumed, "--steps-per-epoch", str(whole.place.steps - 1)
    )
    assert "--accum-steps as it was, or give --global-batch-size 4" in refused(*resumed, "--batch-size", "2")
    torch.manual_seed(456)
    parts = train(*flags, str(tmp_path / "parts"), "--resume", "auto")
    assert parts.place.steps > 1
    assert parts.control.promise == "all is done; ending"  # no place is saved any more
    assert same(whole.model.state_dict(), parts.model.state_dict())
    assert same(whole.average.module.state_dict(), parts.average.module.state_dict())
    logs = [(tmp_path / name / "log.txt").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_nothing_is_drawn_in_vain_before_an_evaluation(
    recipe: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a resumed run has only to evaluate its epoch, it begins on the next; where that was the last, on none."""
    drawn: list[tuple[int, int]] = []
    draw = CutOut.draw
    monkeypatch.setattr(CutOut, "draw", lambda *args: drawn.append(args[1:3]) or draw(*args))
    flags = ("--config", recipe, "--data-path", str(shards), "--output_dir", str(tmp_path / "run"))
    for epoch in (0, 1):
        run = train(*flags, "--resume", "auto", control=Stops(f"epoch {epoch}, step 9 "))
        assert run.place.step == run.place.steps == 9
        assert drawn[0] == (epoch, 0)
        assert len(set(drawn)) == len(drawn)
        drawn.clear()
    for _ in range(2):  # the evaluation, and nothing at all
        train(*flags, "--resume", "auto")
        assert drawn == []
    assert [json.loads(line)["epoch"] for line in (tmp_path / "run" / "log.txt").open()] == [0, 1]


class DiesIn(Hook):
    """At the beginning of an epoch."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def epoch_begin(self, place: Place) -> None:
        if place.epoch == self._epoch:
            raise RuntimeError("power cut")


def test_a_run_killed_before_its_evaluation_makes_up_for_it(recipe: str, shards: Path, tmp_path: Path) -> None:
    class Dies(Hook):
        def epoch_end(self, place: Place, end: EpochEnd) -> None:
            raise RuntimeError("power cut")

    flags = ("--config", recipe, "--data-path", str(shards), "--output_dir", str(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="power cut"):
        train(*flags, hooks=lambda run: [Dies()])
    train(*flags, "--resume", "auto")
    records = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1]


def test_a_run_that_begins_a_later_epoch_forgets_half_of_an_earlier(recipe: str, shards: Path, tmp_path: Path) -> None:
    flags = ("--config", recipe, "--data-path", str(shards), "--output_dir", str(tmp_path))
    train(*flags, control=Stops("epoch 0, step 2 "))
    with build(load_config([*flags, "--resume", "auto", "--start-epoch", "1"]), World()) as run:
        assert isinstance(run, TrainingRun)
        assert (run.place.epoch, run.place.step) == (1, 0)
        assert run.sums.read() == {"loss": 0.0, "steps": 0.0}


def test_some_epochs_without_an_evaluation(recipe: str, shards: Path, tmp_path: Path) -> None:
    """What was not measured is not in the records, and the report has the mistakes of the last evaluation."""
    every, some = tmp_path / "every", tmp_path / "some"
    words = ("--config", recipe, "--data-path", str(shards), "--epochs", "3", "--steps-per-epoch", "1")
    train(*words, "--output_dir", str(every))
    train(*words, "--output_dir", str(some), "--eval-every", "2")
    measured, own = records(every), records(some)
    assert own[1:] == measured[1:]  # the second and, as always, the last
    assert own[0] == {name: value for name, value in measured[0].items() if "test_" not in name}
    assert "weights after epoch 2:" in (some / "report.html").read_text()
    assert "Max accuracy: -" not in (some / "train.log").read_text()  # of none


def test_an_evaluation_is_begun_while_the_last_steps_run(recipe: str, shards: Path) -> None:
    """And what decodes its images is built once."""
    ready: list[tuple[int, int] | None] = []
    graphs: list[object] = []

    class Looks(Hook):
        def __init__(self, run: TrainingRun) -> None:
            self.loader = run.evaluated.loader

        def epoch_trained(self, place: Place) -> None:
            self.loader._join()
            ready.append(self.loader._next_place)

        def epoch_end(self, place: Place, end: EpochEnd) -> None:
            assert self.loader._next_place is None  # its memory was given back
            graphs.append(self.loader._graph)

    words = ("--config", recipe, "--data-path", str(shards), "--epochs", "4", "--steps-per-epoch", "1")
    train(*words, "--eval-every", "2", hooks=lambda run: [Looks(run)])
    assert ready == [None, (0, 0), None, (0, 0)]
    assert graphs[0] is None
    assert graphs[1] is graphs[2] is graphs[3] is not None


def test_an_epoch_without_an_evaluation_is_saved_once(recipe: str, shards: Path, tmp_path: Path) -> None:
    """It was saved twice, and the second time pushed the epoch before it out of the folder."""
    words = ("--config", recipe, "--data-path", str(shards), "--steps-per-epoch", "1", "--epochs", "4")
    flags = (*words, "--eval-every", "4", "--output_dir", str(tmp_path))
    with pytest.raises(RuntimeError, match="power cut"):
        train(*flags, hooks=lambda run: [DiesIn(2)])
    states = [load_checkpoint(path) for path in kept_checkpoints(tmp_path)]
    assert [(state["epoch"], state["evaluated"]) for state in states] == [(1, False), (0, False)]


def test_the_last_epoch_is_evaluated_where_a_lower_number_of_epochs_makes_it_that(
    recipe: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It had not been, as --eval-every had it, and the run ended without a score or a best checkpoint."""
    words = ("--config", recipe, "--data-path", str(shards), "--steps-per-epoch", "1", "--eval-every", "9")
    flags = (*words, "--output_dir", str(tmp_path))
    with pytest.raises(RuntimeError, match="power cut"):
        train(*flags, "--epochs", "3", hooks=lambda run: [DiesIn(1)])
    assert "test_acc1" not in records(tmp_path)[0]
    capsys.readouterr()
    train(*flags, "--epochs", "1", "--resume", "auto")
    said = capsys.readouterr().out
    assert "all steps of epoch 0 are trained; its evaluation is next" in said
    assert "vimfast predict" in said
    straight = tmp_path / "straight"
    train(*words, "--output_dir", str(straight), "--epochs", "1")
    assert records(tmp_path) == records(straight)
    assert (tmp_path / "best_checkpoint.pth").exists()


def test_a_run_beyond_its_last_epoch_says_how_it_is_evaluated(
    recipe: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--config", recipe, "--data-path", str(shards), "--steps-per-epoch", "2", "--output_dir", str(tmp_path))
    train(*flags, "--epochs", "3", control=Stops("epoch 1, step 1 "))
    before = (tmp_path / "checkpoint.pth").read_bytes()
    capsys.readouterr()
    train(*flags, "--epochs", "1", "--resume", "auto")
    said = " ".join(capsys.readouterr().out.split())
    assert "the run stands at epoch 1, step 1 of 2, beyond --epochs 1; a larger --epochs continues" in said
    assert f"--eval --resume {tmp_path / 'checkpoint.pth'} evaluates it" in said
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_code_of_ones_own_after_each_epoch(recipe: str, shards: Path, tmp_path: Path) -> None:
    """One class; what it is given is what the run records."""
    seen: list[EpochEnd] = []

    class Mine(Hook):
        def epoch_end(self, place: Place, end: EpochEnd) -> None:
            seen.append(end)

    run = train(
        "--config", recipe, "--data-path", str(shards), "--output_dir", str(tmp_path), hooks=lambda run: [Mine()]
    )
    records = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [end.epoch for end in seen] == [r["epoch"] for r in records] == [0, 1]
    assert [end.loss for end in seen] == [r["train_loss"] for r in records]
    assert [end.scores["ema_"].acc1 for end in seen] == [r["ema_test_acc1"] for r in records]
    assert max(end.scores[""].acc1 for end in seen) == run.place.best_acc1


def test_size_and_strength_by_epoch(recipe: str, shards: Path, tmp_path: Path) -> None:
    """One function, from the images to the weights; a stopped run resumes in a later stage to the same bits."""

    def stage(epoch: int) -> Stage:
        return Stage((32, 48)[epoch], Recipe(AugmentConfig(aa=f"rand-m{3 + 6 * epoch}-mstd0.5")))

    seen: dict[int, set[tuple[int, ...]]] = {}

    def watch(run: TrainingRun) -> list[Hook]:
        def note(model: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            seen.setdefault(run.place.epoch if model.training else -1, set()).add(tuple(inputs[0].shape[2:]))

        run.model.register_forward_pre_hook(note)
        return []

    flags = ("--config", recipe, "--data-path", str(shards), "--input-size", "48", "--output_dir")
    whole = train(*flags, str(tmp_path / "whole"), stage=stage, hooks=watch)
    assert seen == {0: {(32, 32)}, 1: {(48, 48)}, -1: {(48, 48)}}
    assert all(torch.isfinite(p).all() for p in whole.model.parameters())
    train(*flags, str(tmp_path / "parts"), stage=stage, control=Stops("epoch 1, step 1 "))
    parts = train(*flags, str(tmp_path / "parts"), "--resume", "auto", stage=stage)
    assert same(whole.model.state_dict(), parts.model.state_dict())
    with pytest.raises(UserError, match="a stage's size 45 is not a whole number of patches"):
        train(*flags, str(tmp_path / "other"), stage=lambda epoch: Stage(45, Recipe(None)))


def test_a_run_outlasts_its_console(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # for the bar
    end, pipe = os.pipe()
    os.close(end)
    with suppress(BrokenPipeError), open(pipe, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        report = Reporter(tmp_path, active=True)
        assert report.live
        report.say("a line")
        with report.steps("epoch 0", 2):
            report.advance()
            report.news("epoch 0", "loss 1", "1")
        Control(World()).say("SIGTERM received")
        report.close()
    assert [line.split(maxsplit=2)[2] for line in (tmp_path / "train.log").open()] == ["a line\n", "epoch 0 loss 1\n"]


def test_a_signal_saves_the_place(recipe: str, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--config", recipe, "--data-path", str(shards), "--output_dir", str(run), "--epochs", "5000")
    with start("vimfast.train", *flags, fresh=True) as watched:  # with nothing imported, as a user's is
        while not (run / "log.txt").exists():
            assert watched.process.poll() is None, watched.text
            time.sleep(0.1)
        watched.process.send_signal(signal.SIGTERM)
        assert watched.wait(60) == 143, watched.err
    assert watched.out.count("SIGTERM received: finishing the step, then saving") == 1
    place = re.search(r"stopped at epoch (\d+), step (\d+)", watched.out)
    state = load_checkpoint(run / "checkpoint.pth")
    assert place is not None
    assert (state["epoch"], state["step"]) == tuple(map(int, place.groups()))


def test_two_processes_train_what_one_does(recipe: str, shards: Path, tree: Path, tmp_path: Path) -> None:
    """Same global batch, same order, same crops: only drop path and mixup draw by process, so they are off."""
    still = ("--drop-path", "0", "--mixup", "0", "--cutmix", "0", "--epochs", "1", "--config", recipe)
    flags = (*still, "--data-path", str(shards), "--output_dir")
    call("vimfast.train", *flags, str(tmp_path / "two"), "--batch-size", "2", processes=2)
    call("vimfast.train", *flags, str(tmp_path / "one"))
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("one", "two"))
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=2e-3, atol=2e-5, msg=name)
    records = [json.loads((tmp_path / name / "log.txt").read_text()) for name in ("one", "two")]
    assert records[0]["train_loss"] == pytest.approx(records[1]["train_loss"], rel=1e-4)
    # 15 images over 2 processes in batches of 2: each is counted once.
    output = call("vimfast.train", *flags, "", "--eval", "--resume", str(tmp_path / "two/checkpoint.pth"), processes=2)
    assert f"Accuracy of the network on the 15 test images: {records[1]['test_acc1']:.1f}%" in output.stdout
    # The folder tree trains too, to the same loss: its order differs from that of the shuffled shards.
    call("vimfast.train", *still, "--data-path", str(tree), "--output_dir", str(tmp_path / "tree"))
    assert json.loads((tmp_path / "tree" / "log.txt").read_text())["test_loss"] < 2.0


@pytest.mark.parametrize(
    "flags",
    [
        ("--opt", "sgd", "--clip-grad", "1", "--bce-loss"),
        ("--use-checkpoint", "--no-repeated-aug", "--no-model-ema", "--mixup-mode", "elem"),
        ("--train-interpolation", "bilinear", "--model-ema-force-cpu", "--smoothing", "0", "--sched", "step"),
        ("--steps-per-epoch", "3", "--eval-steps", "2", "--save-every", "2", "--lr-noise", "0.5", "--opt", "lamb"),
    ],
)
def test_options_of_the_recipe_run(recipe: str, shards: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    trainer = train("--config", recipe, "--data-path", str(shards), "--epochs", "1", *flags)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(recipe: str, shards: Path, tmp_path: Path) -> None:
    flags = ("--config", recipe, "--data-path", str(shards), "--output_dir", str(tmp_path / "run"))
    said = call("vimfast.train", *flags, "--dry-run", "--accum-steps", "3", processes=2).stdout
    assert "batch          24 images an update: 2 processes x 4 images x 3 batches" in said
    assert "vim_tiny_patch16_224 with depth=2 embed_dim=32 patch_size=8 stride=8, 34,339 parameters" in said
    assert "learning rate  2.34e-05 = 0.0005 x 24 / 512, adamw, cosine" in said
    assert said.splitlines()[-1] == "nothing was trained, and nothing written (--dry-run)"
    assert not (tmp_path / "run").exists()
    train(*flags, "--epochs", "1", control=Stops("epoch 0, step 2"))
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    said = call("vimfast.train", *flags, "--dry-run", "--resume", "auto").stdout
    assert "resuming at epoch 0, step 2 of 9" in said
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_a_dry_evaluation_says_what_it_would_do(recipe: str, shards: Path, tmp_path: Path) -> None:
    flags = ("--config", recipe, "--data-path", str(shards), "--epochs", "1", "--steps-per-epoch", "1")
    train(*flags, "--output_dir", str(tmp_path))
    said = call("vimfast.train", *flags, "--eval", "--dry-run", "--resume", str(tmp_path)).stdout
    assert f"evaluates on   15 images of 3 classes in {shards}, at 32 pixels\n" in said
    assert "batch          1 process x 4 images\n" in said
    assert said.endswith("\nnothing was evaluated (--dry-run)\n")


def test_a_finished_run_says_so_when_resumed(
    recipe: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--config", recipe, "--data-path", str(shards), "--output_dir", str(tmp_path), "--eval-steps", "1")
    flags += ("--epochs", "1", "--steps-per-epoch", "1")
    train(*flags)
    assert "Training time" in capsys.readouterr().out
    train(*flags, "--resume", "auto")
    said = capsys.readouterr().out
    assert "all epochs are done (1 of 1); a larger --epochs continues the run, and --eval" in said
    assert "resuming at" not in said
    assert "Training time" not in said


def test_weights_of_another_model_name_the_settings_of_their_run(recipe: str, shards: Path, tmp_path: Path) -> None:
    flags = ("--config", recipe, "--data-path", str(shards), "--eval-steps", "1")
    train(*flags, "--output_dir", str(tmp_path / "run"), "--epochs", "1", "--steps-per-epoch", "1")
    other = (*flags, "--model-kwargs", "depth=1", "patch_size=8", "stride=8", "embed_dim=64")
    own = f"; take its run's settings with --config {tmp_path / 'run' / 'config.yaml'}, or give the --model"
    assert own in refused(*other, "--eval", "--resume", str(tmp_path / "run"))
    assert own in refused(*other, "--finetune", str(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").unlink()
    assert "; give the --model" in refused(*other, "--finetune", str(tmp_path / "run"))


def test_it_learns(recipe: str, shards: Path, tmp_path: Path) -> None:
    flags = ("--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--scale", "0.6", "1", "--no-repeated-aug")
    flags += ("--aa", "none", "--color-jitter", "0", "--reprob", "0", "--input-size", "40")  # 32 would be cut unresized
    rate = ("--lr", "3e-3", "--unscale-lr", "--epochs", "12", "--output_dir", str(tmp_path / "run"))
    train("--config", recipe, "--data-path", str(shards), *flags, *rate)
    losses = [json.loads(line)["train_loss"] for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.1


class Poison(Hook):
    """The loss is NaN on the steps that `when` names."""

    def __init__(self, run: TrainingRun, when: Callable[[int, int], bool]) -> None:
        self.step, self.sound, self.when = run.train_step, run.train_step.criterion, when

    def before_step(self, place: Place) -> None:
        factor = float("nan") if self.when(place.epoch, place.step) else 1.0
        self.step.criterion = lambda images, logits, targets: factor * self.sound(images, logits, targets)


@pytest.mark.parametrize("opt", ["adamw", "lamb"])  # with and without a kernel that can skip by itself
def test_a_step_without_numbers_is_skipped(
    recipe: str, shards: Path, opt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def hooks(run: TrainingRun) -> list[Hook]:
        return [Poison(run, lambda epoch, step: (epoch, step) == (0, 1))]

    trainer = train("--config", recipe, "--data-path", str(shards), "--epochs", "1", "--opt", opt, hooks=hooks)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert trainer.sums.read()["steps"] == 0  # zeroed after the epoch
    assert trainer.train_step.health()[:2] == (1, 1)
    assert "1 step skipped because of non-finite gradients, by epoch 0, step 2" in capsys.readouterr().err
    updates = {int(state["step"]) for state in trainer.optimizer.state.values() if "step" in state}
    assert updates <= {trainer.place.steps - 1}


def test_a_run_that_only_skips_ends_and_leaves_sound_weights(recipe: str, shards: Path, tmp_path: Path) -> None:
    seen: list[TrainingRun] = []

    def hooks(run: TrainingRun) -> list[Hook]:
        seen.append(run)
        return [Poison(run, lambda epoch, step: epoch == 1)]

    flags = ("--config", recipe, "--data-path", str(shards), "--output_dir", str(tmp_path))
    with pytest.raises(
        UserError, match=r"2 steps in a row are non-finite, by epoch 1, step 2,.*first in .*is from before"
    ) as error:
        train(*flags, "--log-every", "1000", "--skip-limit", "2", hooks=hooks)
    assert "try a lower --lr, --clip-grad 1, --on-divergence rollback;" in str(error.value)  # --no_amp is what it has
    assert seen[0].place.steps > 2  # it does not end at a report
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())


def test_small_images_are_evaluated_as_they_are(recipe: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    for split in ("train", "val"):
        for i, pixels in enumerate(noise):
            path = tmp_path / split / f"class{i}" / "image.JPEG"
            path.parent.mkdir(parents=True)
            Image.fromarray(pixels).save(path, quality=95)
    trainer = build(load_config(["--config", recipe, "--data-path", str(tmp_path)]), World())
    (images, labels), *_ = trainer.evaluated.loader.epoch(0)
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    shown = (255 * (images * std + mean)).permute(0, 2, 3, 1)
    files = [tmp_path / "val" / f"class{label}" / "image.JPEG" for label in labels]
    stored = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])
    assert (shown - stored).abs().max() < 1.01  # a level: two decoders
    trainer.close()


def test_accumulated_batches_train_as_one(recipe: str, shards: Path) -> None:
    still = ("--drop-path", "0", "--mixup", "0", "--cutmix", "0", "--epochs", "1", "--config", recipe)
    flags = (*still, "--data-path", str(shards), "--no-repeated-aug")
    parts = train(*flags, "--batch-size", "2", "--accum-steps", "2")
    whole = train(*flags, "--batch-size", "4")
    assert parts.place.steps == whole.place.steps
    for (name, a), b in zip(parts.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5, msg=name)
    assert "--accum-steps 1000" in refused(*flags, "--accum-steps", "1000")


def test_too_little_memory_names_the_flag_of_what_ran(recipe: str, shards: Path) -> None:
    def cramped(*_: object) -> None:
        raise torch.OutOfMemoryError

    class Cramped(Hook):
        before_step = cramped

    flags = ("--config", recipe, "--data-path", str(shards), "--epochs", "1", "--eval-batch-size", "2")
    with pytest.raises(
        UserError, match="memory for 4 images a step; try --batch-size 3 --global-batch-size 4 to train"
    ):
        train(*flags, hooks=lambda run: [Cramped()])
    trainer = build(load_config(list(flags)), World())
    assert isinstance(trainer, TrainingRun)
    assert trainer.average is not None
    trainer.average.module.forward = cramped  # as the average's evaluation would raise
    with pytest.raises(UserError, match=r"memory for 2 images a step; try --eval-batch-size 1$"):
        trainer.run()
    trainer.close()


def test_bad_paths_and_names(recipe: str, shards: Path, tmp_path: Path) -> None:
    start = ("--config", recipe, "--data-path")
    assert "nowhere" in refused(*start, str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(*start, str(tmp_path / "empty"))
    assert "did you mean" in refused(*start, str(shards), "--model", "vim_tiny_patch16_225")
    assert "a checkpoint or a run folder" in refused(*start, str(shards), "--eval")
    assert "--batch-size" in refused(*start, str(shards), "--batch-size", "1000")
    assert "3 classes" in refused(*start, str(shards), "--num-classes", "10")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_folder_that_cannot_be_a_run_folder(recipe: str, tree: Path, tmp_path: Path, dry: tuple[str, ...]) -> None:
    file, start = tmp_path / "file", ("--config", recipe, "--data-path", str(tree), *dry, "--output_dir")
    file.touch()
    assert refused(*start, str(file)).startswith(f"--output_dir {file} is a file; give a folder")
    assert f"{file}/a/b: {file} is a file; give a folder" in refused(*start, f"{file}/a/b")
    assert "a\\udcff is not UTF-8, and TensorBoard" in refused(*start, f"{tmp_path}/a\udcff")


def test_a_class_without_images_is_not_trained(recipe: str, tree: Path, tmp_path: Path) -> None:
    data = tmp_path / "data\udcff"  # and a name that is not UTF-8 is printed all the same
    shutil.copytree(tree, data)
    (data / "train" / "n02b").mkdir()
    start = ("--config", recipe, "--epochs", "1", "--output_dir", str(tmp_path / "run"), "--data-path", str(data))
    assert "class 'n02b' of " in (sentence := refused(*start))
    assert "has no training images; add them, or delete its folders" in sentence
    (data / "train" / "n02b").rmdir()
    train(*start, "--steps-per-epoch", "1")
    assert "data\\udcff" in (tmp_path / "run" / "train.log").read_text()


def test_bad_training_images_are_told_before_a_model_is_built(
    recipe: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vimfast.train.model.create_model", lambda *a, **k: pytest.fail("built"))
    shutil.copytree(tree / "val", tmp_path / "val")
    start = ("--config", recipe, "--data-path")
    assert "has no train/" in refused(*start, str(tmp_path))
    assert "36 training images do not fill one step" in refused(*start, str(tree), "--batch-size", "1000")


def test_what_a_model_cannot_be_built_of_is_one_sentence(recipe: str, tree: Path, tmp_path: Path) -> None:
    start = ("--config", recipe, "--data-path")
    sentence = refused(*start, str(tree), "--input-size", "45")
    assert "--input-size 45 is not a whole number of patches of 8 pixels every 8" in sentence
    assert sentence.endswith("the last 5 rows and columns would never be seen; give 40 or 48")
    vit = ("--model", "vit_tiny_patch16_224", "--input-size", "32", "--model-kwargs", "embed_dim=30", "num_heads=4")
    assert "cannot be built with these options (dim should be divisible" in refused(*start, str(tree), *vit)
    for split in ("train", "val"):
        shutil.copytree(tree / split / "n02", tmp_path / split / "n02")
    assert f"{tmp_path} has one class, 'n02'" in refused(*start, str(tmp_path))


def test_a_warm_up_beyond_the_end_is_told(recipe: str, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--config", recipe, "--data-path", str(tree), "--steps-per-epoch", "1", "--eval-steps", "1")
    train(*flags, "--warmup-epochs", "5")
    assert "warning: --warmup-epochs 5 leaves nothing of --epochs 2; warming up for 1" in capsys.readouterr().err


def test_an_earlier_run_is_not_overwritten(recipe: str, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pth").write_bytes(b"precious")
    sentence = refused("--config", recipe, "--data-path", str(shards), "--output_dir", str(tmp_path))
    assert "--resume auto" in sentence
    assert (tmp_path / "checkpoint.pth").read_bytes() == b"precious"


def test_a_checkpoint_of_another_shape(recipe: str, shards: Path, tmp_path: Path) -> None:
    start = ("--config", recipe, "--data-path", str(shards))
    train(*start, "--epochs", "1", "--output_dir", str(tmp_path))
    path = str(tmp_path / "checkpoint.pth")
    assert "there and" in refused(*start, "--resume", path, "--input-size", "48")
    state = torch.load(path, weights_only=True)
    state["model"]["head.weight"] = torch.zeros(10, 32)
    torch.save(state, path)
    assert "10 classes" in refused(*start, "--eval", "--resume", path)


def test_shards_of_a_newer_format(recipe: str, shards: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(shards, newer)
    manifest = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    assert "99" in refused("--config", recipe, "--data-path", str(newer))


@pytest.mark.parametrize("accum_steps", ["1", "3"])
def test_a_corrupt_image_is_named_and_nothing_is_lost(
    accum_steps: str, recipe: str, tree: Path, tmp_path: Path
) -> None:
    """Also in the second of three batches that make a step; with the image repaired, it resumes to the same bits."""
    own = tmp_path / "tree"
    shutil.copytree(tree, own)
    flags = ("--config", recipe, "--data-path", str(own), "--no-repeated-aug", "--accum-steps", accum_steps)
    whole = train(*flags, "--output_dir", str(tmp_path / "whole"))
    loader = whole.loader
    image = Path(loader.source.name(loader.ids(0, 7)[2]))
    sound = image.read_bytes()
    image.write_bytes(sound[:200])
    run = ("--output_dir", str(tmp_path / "run"))
    sentence = refused(*flags, *run)
    assert sentence.startswith(f"{image} is not a readable image")
    held = f"{tmp_path / 'run' / 'checkpoint.pth'} holds it, resume with --resume auto"
    assert held in (tmp_path / "run" / "train.log").read_text()
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert 0 < state["step"] <= 7 // int(accum_steps)
    image.write_bytes(sound)
    train(*flags, *run, "--resume", "auto")
    assert differences(tmp_path / "run", tmp_path / "whole") == []
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_skipped_images_are_in_the_log(recipe: str, tree: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(tree, bad)
    for name in ("train/n02/n02_3.JPEG", "val/n01/n01_2.JPEG"):
        (bad / name).write_bytes((bad / name).read_bytes()[:200])
    flags = ("--config", recipe, "--data-path", str(bad), "--output_dir", str(tmp_path / "run"), "--epochs", "1")
    train(*flags, "--no-repeated-aug", "--on-bad-image", "skip")
    log = (tmp_path / "run" / "train.log").read_text()
    for name, instead in (("n02_3.JPEG", "another takes its place"), ("n01_2.JPEG", "it is not counted")):
        assert re.search(rf"warning: .*{name}.*: {instead}; bad images so far: 1", log), log


def test_misspelt_flag_on_the_command_line() -> None:
    done = call("vimfast.train", "--data-pth", "x", ok=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown flag --data-pth; did you mean '--data-path'?")
    assert len(done.stderr.splitlines()) == 1


def test_a_damaged_checkpoint_is_passed_over(
    recipe: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bits of an uninterrupted run, as the one before is of the same run."""
    flags = ("--config", recipe, "--data-path", str(shards), "--save-every", "1", "--output_dir")
    whole = train(*flags, str(tmp_path / "whole"))
    run = tmp_path / "parts"
    train(*flags, str(run), control=Stops("epoch 1, step 2 "))
    last = run / "checkpoint.pth"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 4
    last.write_bytes(content)
    assert "checkpoint.1.pth is sound, give that one" in refused(*flags, str(run), "--resume", str(last))
    assert last.read_bytes() == content
    resumed = train(*flags, str(run), "--resume", "auto")
    assert re.search(
        r"checkpoint.pth is no checkpoint, or a damaged one .*taking .*checkpoint.1.pth instead",
        capsys.readouterr().err,
    )
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert (run / "checkpoint.aside.pth").read_bytes() == content
    assert load_checkpoint(run / "checkpoint.1.pth")["epoch"] == 1
    sentence = refused(*flags, str(run))
    assert "holds an earlier run" in sentence
    last.unlink()
    assert refused(*flags, str(run)) == sentence.replace("checkpoint.pth", "checkpoint.1.pth")

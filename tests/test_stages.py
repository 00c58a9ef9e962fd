"""The stages of a run: their epochs and settings, and what they are trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from runs import RECIPE, Stops, differences, records, refused, same, train
from test_step import graphs  # noqa: F401  # a fixture

from vimfast.augment.crops import PaddedCrop, RandomResizedCrop
from vimfast.augment.draws import COLUMNS
from vimfast.config import OptimConfig, ScheduleConfig, StageConfig, load_config, staged
from vimfast.config.stages import MAY_CHANGE
from vimfast.dist import World
from vimfast.errors import UserError
from vimfast.train.build import build
from vimfast.train.device import StageEntry
from vimfast.train.forward import Forward
from vimfast.train.loop import EpochEnd, Hook, Place, TrainingRun
from vimfast.train.optim import LearningRate, build_optimizer
from vimfast.train.step import TrainStep

# Everything that a stage may change but the loss of memory: sizes, batches, augmentation, sampler, mixing, depth, rate.
STAGES = [
    {
        "epochs": 1,
        "input_size": 32,
        "batch_size": 12,
        "repeated_aug": False,
        "aa": "none",
        "reprob": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "drop_path": 0.0,
    },
    {"epochs": 2, "input_size": 40, "batch_size": 3, "accum_steps": 2, "aa": "rand-m3-mstd0.5", "scale": [0.3, 1.0]},
    {"lr": 1e-4, "drop_path": 0.3},
]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    schedule = {**RECIPE["schedule"], "epochs": 4, "stages": STAGES}
    model = {**RECIPE["model"], "input_size": 48}
    path.write_text(yaml.safe_dump({**RECIPE, "model": model, "schedule": schedule}))
    return str(path)


def spans(stages: str, *flags: str) -> list[tuple[int, int]]:
    return [(own.epochs.start, own.epochs.stop) for own in staged(load_config(["--stages", stages, *flags]))]


def test_epochs_and_shares() -> None:
    assert spans("[]", "--epochs", "7") == [(0, 7)]
    assert spans("[{epochs: 3}, {epochs: 4}]", "--epochs", "7") == [(0, 3), (3, 7)]
    shares = "[{share: 0.4}, {share: 0.3}, {}]"
    assert spans(shares, "--epochs", "30") == [(0, 12), (12, 21), (21, 30)]
    assert spans(shares, "--epochs", "5") == [(0, 2), (2, 4), (4, 5)]
    assert spans("[{share: 0.1}, {share: 0.2}, {share: 0.7}]", "--epochs", "10") == [(0, 1), (1, 3), (3, 10)]


def test_a_stage_has_the_settings_of_the_run_but_its_own(recipe: str, tmp_path: Path) -> None:
    config = load_config(["--config", recipe, "--mixup", "0.5", "--cutmix-minmax", "0.2", "0.8"])
    first, second, third = (own.config for own in staged(config))
    assert (first.model.input_size, second.model.input_size, third.model.input_size) == (32, 40, 48)
    assert [own.mix.mixup for own in (first, second, third)] == [0.0, 0.5, 0.5]
    assert second.data.scale == (0.3, 1.0)
    assert third.optim.lr == 1e-4
    config.save(tmp_path / "saved.yaml")
    assert load_config(["--config", str(tmp_path / "saved.yaml")]) == config
    assert config.schedule.stages[1] == StageConfig(2, None, {k: second_value(k) for k in list(STAGES[1])[1:]})


def second_value(name: str) -> Any:
    value = STAGES[1][name]
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("{epochs: 1}", ["--stages is {'epochs': 1}", "a list of stages"]),
        ("[3]", ["--stages, stage 1 is 3", "it must be settings"]),
        ("[{epochs: 2, inputsize: 32}, {}]", ["stage 1: unknown key 'inputsize'; did you mean 'input_size'?"]),
        ("[{epochs: 2}, {opt: sgd}]", ["stage 2: opt cannot change with the stage", *MAY_CHANGE]),
        ("[{epochs: 2, lr: fast}, {}]", ["stage 1: lr is 'fast'", "must be a number"]),
        ("[{epochs: 0.5}, {}]", ["stage 1: epochs is 0.5", "must be an integer"]),
        ("[{epochs: 2}]", ["the stages end after 2 epochs and --epochs is 10", "leave epochs and share out"]),
        ("[{epochs: 12}, {}]", ["stage 2 has none of the 10 epochs", "--stages '[]'"]),
        ("[{share: 0.01}, {}]", ["stage 1 has none of the 10 epochs"]),
        ("[{}, {}]", ["stage 1 has neither epochs nor a share"]),
        ("[{epochs: 1, share: 0.1}, {}]", ["give one of the two"]),
        ("[{share: 1.5}]", ["the share of stage 1 is 1.5"]),
        ("[{epochs: 1}, {reprob: 3}]", ["stage 2: reprob is 3.0", "<= 1"]),
        ("[{epochs: 1, aa: rand-x}, {}]", ["stage 1: "]),
        ("[{scale: [1, 0.5]}]", ["stage 1: the crop's scale"]),
        ("[{batch_size: auto}]", ["the batch_size of stage 1 is auto"]),
        ("[{", ["is not YAML"]),
    ],
)
def test_wrong_stages_say_the_fix(stages: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(["--stages", stages, "--epochs", "10"])
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_the_rate_passes_through_epochs_of_any_length() -> None:
    """A schedule of 10 steps an epoch, entered in epochs of 5 and of 20, and at a share of its height."""
    model = torch.nn.Linear(2, 2)
    cfg = ScheduleConfig(epochs=4, warmup_epochs=1, sched_on_updates=True)
    rates = [LearningRate(cfg, build_optimizer(OptimConfig(), model, 1e-3), 10) for _ in range(2)]
    for step, of in ((0, 5), (3, 5), (6, 20), (19, 20)):
        rates[0].set(2, step, of)
        rates[1].set(2, step * 10 // of)
        assert rates[0].value == rates[1].value
        whole = rates[0].value
        rates[0].set(2, step, of, share=0.5)
        assert rates[0].value == whole / 2
    rates[0].scale(0.5)  # a rollback
    rates[0].set(2, 19, 20, share=0.5)
    assert rates[0].value == whole / 4


class Sees(Hook):
    """What the model is given: size and batch by epoch, and the rates of its depth."""

    def __init__(self, run: TrainingRun) -> None:
        self.given: dict[int, set[tuple[int, ...]]] = {}
        self.depth: list[float] = []
        self.ahead: list[tuple[object, object]] = []  # where the loaders of a stage and of the next stand at its end
        self.run = run
        run.model.register_forward_pre_hook(self.note)

    def note(self, model: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if model.training:
            self.given.setdefault(self.run.place.epoch, set()).add((len(inputs[0]), *inputs[0].shape[2:]))

    def epoch_end(self, place: Place, end: EpochEnd) -> None:
        self.depth.append(self.run.model.drop_path_rate)
        own, following = self.run.stage, self.run.curriculum.after(self.run.stage)
        if following is not None and place.epoch == own.epochs[-1]:
            following.loader._join()
            self.ahead.append((own.loader._next_place, following.loader._next_place))


def test_a_run_resumes_in_every_stage_to_the_same_bits(recipe: str, tree: Path, tmp_path: Path) -> None:
    seen: list[Sees] = []

    def hooks(run: TrainingRun) -> list[Hook]:
        seen.append(Sees(run))
        return [seen[-1]]

    flags = ("--config", recipe, "--data-path", str(tree), "--output_dir")
    whole = train(*flags, str(tmp_path / "whole"), hooks=hooks)
    assert seen[0].given == {0: {(12, 32, 32)}, 1: {(3, 40, 40)}, 2: {(3, 40, 40)}, 3: {(4, 48, 48)}}
    assert seen[0].depth == pytest.approx([0.0, 0.2, 0.2, 0.3])
    assert seen[0].ahead == [(None, (1, 0)), (None, (3, 0))]
    assert [stage.steps for stage in whole.curriculum.stages] == [3, 6, 9]
    assert whole.curriculum.updates(3, 2) == 3 + 6 + 6 + 2
    assert whole.curriculum.batches(3, 2) == 3 + 12 + 12 + 2

    parts = str(tmp_path / "parts")
    # In the first stage, after its last step, in the middle of an update's epochs, and in the last stage.
    places = ["epoch 0, step 2 ", "epoch 0, step 3 ", "epoch 1, step 0 ", "epoch 2, step 4 ", "epoch 3, step 1 "]
    for place in places:
        run = train(*flags, parts, *(["--resume", "auto"] if place != places[0] else []), control=Stops(place))
        assert str(run.place).startswith(place.strip())
    train(*flags, parts, "--resume", "auto")
    assert differences(tmp_path / "whole", tmp_path / "parts") == []
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


def test_one_stage_is_a_run_without_stages(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    flags = ("--config", str(tmp_path / "recipe.yaml"), "--data-path", str(tree))
    none, one = train(*flags), train(*flags, "--stages", "[{input_size: 32}]")
    assert same(none.model.state_dict(), one.model.state_dict())


def test_inside_an_epoch_its_sampler_must_stay(recipe: str, tree: Path, tmp_path: Path) -> None:
    flags = ("--config", recipe, "--data-path", str(tree), "--output_dir", str(tmp_path / "run"))
    train(*flags, control=Stops("epoch 0, step 2 "))
    others = [dict(stage) for stage in STAGES]
    others[0]["repeated_aug"] = True
    with pytest.raises(UserError, match=r"epoch 0, step 2 .* --repeated-aug was --no-repeated-aug"):
        train(*flags, "--resume", "auto", "--stages", yaml.safe_dump(others))
    others[0] = {**STAGES[0], "batch_size": 6}
    with pytest.raises(UserError, match="3 steps of 12 images, this run has 6 of 6"):
        train(*flags, "--resume", "auto", "--stages", yaml.safe_dump(others))
    others[0], others[2] = STAGES[0], {"repeated_aug": False}  # a later stage may be another
    run = train(*flags, "--resume", "auto", "--stages", yaml.safe_dump(others), control=Stops("epoch 1, step 1 "))
    assert (run.place.epoch, run.place.step) == (1, 1)


def test_the_plan_has_the_stages(recipe: str, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("--config", recipe, "--data-path", str(tree), "--dry-run")
    out = capsys.readouterr().out
    assert "4 epochs, 24 steps" in out
    assert "1 epoch at 32 pixels, 2 epochs at 40 pixels, 1 epoch at 48 pixels" in out
    assert "12 images an update: 1 process x 12 images (stage 1 of 3)" in out
    rows = [line.split() for line in out[out.index("work is counted in pixels") :].splitlines()]
    work = [3 * 12 * 32**2, 12 * 6 * 40**2, 9 * 4 * 48**2]
    shares = [f"{own / sum(work):.0%}" for own in work]
    table = {row[0]: row for row in rows if row and row[0] in "123"}
    assert [table[n][1:4] for n in "123"] == [["0", "to", "0"], ["1", "to", "2"], ["3", "to", "3"]]
    assert [table[n][4] for n in "123"] == ["32", "40", "48"]
    assert [table[n][-1] for n in "123"] == shares


def test_all_stages_crop_as_the_last_one_does(tree: Path, tmp_path: Path) -> None:
    """Inputs of up to 32 pixels are cut out of the image as it is, but not in a run that ends with larger ones."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    flags = ("--config", str(tmp_path / "recipe.yaml"), "--data-path", str(tree), "--steps-per-epoch", "1")
    stages = ("--stages", "[{epochs: 1, input_size: 16}, {}]")
    small, large = train(*flags, *stages), train(*flags, *stages, "--input-size", "48")
    crops = [[stage.loader.view.crop for stage in run.curriculum.stages] for run in (small, large)]
    assert crops[0] == [PaddedCrop(of=(32, 32)), PaddedCrop()]
    assert all(isinstance(crop, RandomResizedCrop) for crop in crops[1])

    u, sizes = np.random.default_rng(0).random((50, COLUMNS)), np.full((50, 2), 32)
    whole, half = (crop.squares(u, sizes, size) for crop, size in ((crops[0][1], 32), (crops[0][0], 16)))
    assert (half.resized == 16).all()
    assert np.ptp(half.corner) == 4  # of 2 pixels of padding on either side
    assert np.abs(half.corner - whole.corner / 2).max() <= 1  # they show the same


@pytest.mark.usefixtures("graphs")
def test_a_stage_has_a_graph_of_its_own(
    recipe: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Captured where the stage is entered, once what the one before it held is gone, and to the same bits."""
    flags = ("--config", recipe, "--data-path", str(tree), "--output_dir")
    train(*flags, str(tmp_path / "launched"))
    held: list[tuple[int, bool]] = []
    capture, record, evaluations = TrainStep.capture, Forward._record, list[int]()

    def noted(step: TrainStep, *inputs: torch.Tensor) -> None:
        held.append((len(step._captured), any(p.grad is not None for p in step._parameters)))
        capture(step, *inputs)

    def noted_forward(forward: Forward, *inputs: Any) -> Any:
        evaluations.append(run_of[0].place.epoch)
        return record(forward, *inputs)

    run_of: list[TrainingRun] = []
    monkeypatch.setattr(TrainStep, "capture", noted)
    monkeypatch.setattr(Forward, "_record", noted_forward)
    monkeypatch.setattr(TrainStep, "time_replays", lambda step: setattr(step, "seconds", 0.5))
    monkeypatch.setattr("vimfast.train.build.captures", lambda *_: True)
    run = train(*flags, str(tmp_path / "captured"), hooks=lambda run: run_of.append(run) or [])
    assert held == [(0, False)] * 3
    assert evaluations == [0, 1, 3]  # the first in each stage
    assert isinstance(run.hooks[0], StageEntry)
    assert differences(tmp_path / "launched", tmp_path / "captured") == []
    out = capsys.readouterr().out
    assert "GPU time as measured in stage 1, of others in proportion to pixels" in out
    assert "stage 2 of 3, prepared in " in out
    assert "at least 0:00:12 of GPU time for the steps of its 2 epochs" in out


@pytest.mark.usefixtures("graphs")
def test_a_dry_run_tries_each_stage(
    recipe: str, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its time is measured, not a proportion, and too little memory for a later one is known before the run begins."""
    entered: list[int] = []
    capture = TrainStep.capture

    def noted(step: TrainStep, images: torch.Tensor, targets: torch.Tensor) -> None:
        entered.append(images.shape[2])
        if images.shape[2] > most:
            raise torch.OutOfMemoryError
        capture(step, images, targets)

    def time_replays(step: TrainStep) -> None:
        step.seconds = {32: 1.0, 40: 10.0, 48: 100.0}[entered[-1]]

    most = 48
    monkeypatch.setattr(TrainStep, "capture", noted)
    monkeypatch.setattr(TrainStep, "time_replays", time_replays)
    monkeypatch.setattr("vimfast.train.build.captures", lambda *_: True)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: entered[-1] * 2**30)
    flags = ("--config", recipe, "--data-path", str(tree), "--dry-run", "--eval-every", "7")
    build(load_config(list(flags)), World()).close()
    assert entered == [32, 40, 48, 32]
    out = " ".join(capsys.readouterr().out.split())
    assert "4 epochs, 24 steps; at least 0:19:03 of GPU time for the steps" in out
    assert "1 0 to 0 32 12 3" in out
    assert "32.0 0:00:03" in out
    assert "2 1 to 2 40 2 x 3 12" in out
    assert "to validate after the last epoch" in out
    assert "40.0 0:04:00" in out
    assert "48.0 0:15:00" in out
    most = 36
    error = refused(*flags)
    assert "too little memory for 3 images a step; try batch_size 2 in stage 2 of the recipe, with global" in error


def test_the_evening_recipe_runs_on_a_cpu(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From its first stage to its last, with a tiny model; the sizes are the recipe's."""
    seen: list[Sees] = []

    def hooks(run: TrainingRun) -> list[Hook]:
        seen.append(Sees(run))
        return [seen[-1]]

    tiny = ("--model-kwargs", "depth=1", "embed_dim=16", "--device", "cpu", "--num-workers", "1")
    short = ("--epochs", "8", "--steps-per-epoch", "1", "--eval-steps", "1", "--save-minutes", "0")
    batches = ("--batch-size", "2", "--global-batch-size", "4", "--eval-batch-size", "2")
    run = train("--config", "vim_tiny_evening", "--data-path", str(tree), *tiny, *short, *batches, hooks=hooks)
    sizes = [seen[0].given[epoch] for epoch in range(8)]
    small = [{(4, 128, 128)}] * 4 + [{(4, 160, 160)}] * 2  # a stage with a batch size of its own follows no flag
    assert sizes == [*small, {(2, 192, 192)}, {(2, 224, 224)}]
    assert run.evaluated.loader.view.size_in(0) == (224, 224)
    assert run.place.epoch == 8
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert "stage 4 of 4, prepared in " in capsys.readouterr().out

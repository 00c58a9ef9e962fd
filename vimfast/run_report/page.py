"""The page: everything that the files of a run folder say of it."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vimfast import __version__
from vimfast.config import Config
from vimfast.errors import UserError
from vimfast.files import atomic_write
from vimfast.pages import LineChart, Mark, Series, render
from vimfast.pages.charts import power_of_ten, superscript
from vimfast.run_report.facts import Facts, read_facts
from vimfast.run_report.records import Record, read_records

PAGE = "report.html"

_TEMPLATE = Path(__file__).parent / "run.html"
_CONFIG = "config.yaml"
_TRAINING, _RAW, _AVERAGED = 2, 1, 3  # colours of the palette
_WAITS = 0.05  # of the time: more is worth a word


def write_page(folder: Path, page: bytes | None = None) -> Path:
    """Write the page of a run folder, atomically; returns its path.

    Args:
        page: what :func:`render_page` made of the folder; None: it is made now.

    Raises:
        UserError: the folder is not a run's, or what is in it is damaged.
        OSError: the page cannot be written.
    """
    page = render_page(folder) if page is None else page
    with atomic_write(folder / PAGE, durable=False) as file:
        file.write(page)
    return folder / PAGE


def render_page(folder: Path) -> bytes:
    """The page of a run folder.

    Raises:
        UserError: the folder is not a run's, or what is in it is damaged.
    """
    records, facts, config = read_records(folder), read_facts(folder), _read_config(folder)
    run = _Run(folder, records, facts, config)
    return render(_TEMPLATE, run=run, facts=facts, version=__version__, written=time.strftime("%Y-%m-%d %H:%M"))


def _read_config(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings by section and name; none where the file is missing."""
    path = folder / _CONFIG
    try:
        found = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML ({' '.join(str(error).split())})", "restore it") from None
    if not isinstance(found, dict) or not all(isinstance(section, dict) for section in found.values()):
        raise UserError(f"{path} holds no sections of settings", "restore it")
    return found


class Tile(NamedTuple):
    """A figure, what it is, and a word about it."""

    title: str
    figure: str
    about: str


class NextCommand(NamedTuple):
    """What a user may want now, and the words for it."""

    to: str
    command: str


@dataclass(frozen=True)
class _Run:
    """What the template asks of a run."""

    folder: Path
    records: Sequence[Record]
    facts: Facts | None
    config: dict[str, dict[str, Any]]

    # Where it stands

    @property
    def name(self) -> str:
        return self.folder.resolve().name or str(self.folder)

    def setting(self, section: str, name: str, default: Any = None) -> Any:
        return self.config.get(section, {}).get(name, default)

    @property
    def about(self) -> str:
        parts = [self.setting("model", "model", ""), self.setting("data", "data_path", "")]
        return " · ".join(str(part) for part in parts if part)

    @property
    def epochs(self) -> list[int]:
        return [record["epoch"] for record in self.records]

    @property
    def _planned(self) -> int | None:
        """The epochs that it is to have; None where that is not known."""
        epochs = self.setting("schedule", "epochs")
        return epochs if isinstance(epochs, int) else None

    @property
    def finished(self) -> bool:
        return self._planned is not None and self.epochs[-1] + 1 >= self._planned

    @property
    def status(self) -> tuple[str, str]:
        """A few words, and the class that colours them."""
        done, plural = self.epochs[-1] + 1, "s" * (self.epochs[-1] > 0)
        if self.finished:
            return f"finished: {done} epoch{plural}", "good"
        if self.facts is not None and self.facts.stopped:
            return f"stopped at {self.facts.stopped}", "warn"
        return f"{done} of {self._planned} epochs" if self._planned else f"{done} epoch{plural}", "plain"

    # Figures

    def values(self, name: str) -> list[float | None]:
        """Of a field of the records; None where it is missing or not finite, or says nothing: of five classes or fewer,
        every image's is among the first five answers."""
        classes = None if self.facts is None else self.facts.classes
        silent = name.endswith("test_acc5") and classes is not None and classes <= 5
        found = [None if silent else record.get(name) for record in self.records]
        return [float(v) if isinstance(v, int | float) and math.isfinite(v) else None for v in found]

    @property
    def best(self) -> int | None:
        """The place of the epoch of the best top-1, the first of equals, as the run keeps its checkpoint."""
        return _argmax(self.values("test_acc1"))

    def _paces(self, name: str) -> list[float | None]:
        known = {pace.epoch: getattr(pace, name) for pace in (self.facts.pace if self.facts is not None else ())}
        return [known.get(epoch) for epoch in self.epochs]

    @property
    def tiles(self) -> list[Tile]:
        tiles, best = [], self.best
        if best is not None:
            figure = self.values("test_acc1")[best]
            tiles.append(Tile("Best top-1", f"{figure:.2f}%", f"epoch {self.epochs[best]}, best_checkpoint.pth"))
        averaged = self.values("ema_test_acc1")
        if (place := _argmax(averaged)) is not None:
            tiles.append(Tile("Best top-1 of the EMA", f"{averaged[place]:.2f}%", f"epoch {self.epochs[place]}"))
        if (top5 := self.values("test_acc5")[-1]) is not None:
            tiles.append(Tile("Top-5", f"{top5:.2f}%", f"epoch {self.epochs[-1]}, the last"))
        if (loss := self.values("test_loss")[-1]) is not None:
            trained = self.values("train_loss")[-1]
            about = "" if trained is None else f"in training {trained:.4f}"
            tiles.append(Tile("Validation loss", f"{loss:.4f}", about))
        speeds = [speed for speed in self._paces("images_per_second") if speed is not None]
        if speeds:
            tiles.append(Tile("Images/s", f"{sorted(speeds)[len(speeds) // 2]:,.0f}", "median of the epochs"))
        shares = [share for share in self._paces("data_share") if share is not None]
        if shares:
            mean = sum(shares) / len(shares)
            about = "of the time; vimfast doctor may say why" if mean > _WAITS else "of the time"
            tiles.append(Tile("Waiting for data", f"{mean:.1%}", about))
        return tiles

    @property
    def charts(self) -> list[LineChart]:
        return [chart for chart in self._charts() if not chart.empty]

    def _charts(self) -> list[LineChart]:
        epochs, best = self.epochs, self.best
        training = Series("training", self.values("train_loss"), _TRAINING)
        mark = None
        if best is not None and len(epochs) > 1:
            mark = Mark(0, best, f"best {self.values('test_acc1')[best]:.1f}")
        rates = self.values("train_lr")
        power = power_of_ten(max((rate for rate in rates if rate is not None), default=0.0))
        scaled = [None if rate is None else rate / 10.0**power for rate in rates]
        unit = f", × 10{superscript(power)}" if power else ""
        shares = [None if share is None else 100 * share for share in self._paces("data_share")]
        rate = Series("at the epoch's end", scaled, _TRAINING)
        speed = Series("all processes", self._paces("images_per_second"), _RAW)
        waiting = Series("first process", shares, _RAW)
        accuracy = partial(LineChart, limit=100.0)
        return [
            LineChart("Loss, in nats", epochs, "epoch", [training, *self._weights("test_loss")], "{:.3f}".format),
            accuracy("Top-1 accuracy, %", epochs, "epoch", self._weights("test_acc1"), "{:.2f}".format, mark=mark),
            accuracy("Top-5 accuracy, %", epochs, "epoch", self._weights("test_acc5"), "{:.2f}".format),
            LineChart(f"Learning rate{unit}", epochs, "epoch", [rate], lambda own: f"{own * 10.0**power:.3g}", least=0),
            LineChart("Training speed, images/s", epochs, "epoch", [speed], "{:,.0f}".format, least=0),
            LineChart(
                "Waiting for data, % of the time",
                epochs,
                "epoch",
                [waiting],
                "{:.1f}".format,
                least=0,
                most=100 * _WAITS,
            ),
        ]

    def _weights(self, name: str) -> list[Series]:
        """Of the trained weights, and of their average if there is one."""
        bridged = any(name not in record for record in self.records)  # not every epoch was evaluated
        raw = Series("validation", self.values(name), _RAW, bridged=bridged)
        averaged = self.values(f"ema_{name}")
        if all(value is None for value in averaged):
            return [raw]
        return [raw, Series("EMA", averaged, _AVERAGED, dashed=True, bridged=bridged)]

    @property
    def about_training_loss(self) -> str:
        """Why it cannot be compared with that of validation, if there is a reason."""
        if self.setting("distill", "distillation_type", "none") != "none":
            return "Training loss includes the teacher's share, so it cannot be compared with validation loss."
        if self.setting("mix", "bce_loss") or self.setting("distill", "cosub"):
            return "Training loss is binary cross entropy, so it cannot be compared with validation loss."
        reasons = []
        if self.setting("mix", "smoothing"):
            reasons.append("smoothed")
        if self.setting("mix", "mixup") or self.setting("mix", "cutmix") or self.setting("mix", "cutmix_minmax"):
            reasons.append("mixed")
        if not reasons:
            return ""
        targets = " and ".join(reasons)
        return f"Training loss is that of augmented images and {targets} targets, usually above that of validation."

    @property
    def columns(self) -> list[tuple[str, list[str]]]:
        """The table of all epochs: titles, and a text for each epoch."""
        named = [
            ("learning rate", self.values("train_lr"), "{:.3e}"),
            ("training loss", self.values("train_loss"), "{:.4f}"),
            ("validation loss", self.values("test_loss"), "{:.4f}"),
            ("top-1, %", self.values("test_acc1"), "{:.2f}"),
            ("top-5, %", self.values("test_acc5"), "{:.2f}"),
            ("EMA loss", self.values("ema_test_loss"), "{:.4f}"),
            ("EMA top-1, %", self.values("ema_test_acc1"), "{:.2f}"),
            ("EMA top-5, %", self.values("ema_test_acc5"), "{:.2f}"),
            ("images/s", self._paces("images_per_second"), "{:,.0f}"),
            ("waiting", self._paces("data_share"), "{:.1%}"),
        ]
        return [
            (title, ["–" if value is None else form.format(value) for value in values])
            for title, values, form in named
            if any(value is not None for value in values)
        ]

    # What to do, and what was set

    @property
    def next_commands(self) -> list[NextCommand]:
        own = shlex.quote(str(self.folder))
        count = 1 if self.facts is None else self.facts.processes
        processes = f" --processes {count}" if count > 1 else ""
        train = f"vimfast train{processes} --config {shlex.quote(str(self.folder / _CONFIG))}"
        unfinished = [] if self.finished else [NextCommand("continue to the last epoch", f"{train} --resume auto")]
        return [
            *(unfinished if self.config else []),
            *([NextCommand("evaluate the best checkpoint", f"{train} --eval --resume {own}")] if self.config else []),
            NextCommand("label images of your own", f"vimfast predict {own} photos/ --grid seen.png"),
            NextCommand("write the weights in the Hugging Face hub's layout", f"vimfast export {own} --out exported/"),
        ]

    @property
    def changed(self) -> list[tuple[str, str, str]]:
        """(setting, value, default) of the settings that are not the defaults."""
        rows = []
        for section, values in Config().to_dict().items():
            for name, default in values.items():
                value = self.setting(section, name, default)
                if value != default:
                    rows.append((f"{section}.{name}", _text(value), _text(default)))
        return rows

    @property
    def settings(self) -> str:
        return yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)


def _argmax(values: Sequence[float | None]) -> int | None:
    known = [(value, -place) for place, value in enumerate(values) if value is not None]
    return -max(known)[1] if known else None


def _text(value: Any) -> str:
    """As YAML has it, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()

"""``vimfast predict``: what a trained model sees in images.

    vimfast predict runs/tiny cat.jpg photos/

Exit status 0: all images were looked at. 1: some could not be read. (2: the checkpoint cannot be used.)
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from vimfast.cli import (
    SIZE,
    LiveLine,
    Parser,
    fit_terminal,
    image_size,
    path,
    png,
    refuse_unwritable,
    say_written,
    whole,
    writing,
)
from vimfast.errors import UserError, printable
from vimfast.files import atomic_write
from vimfast.sheet import Caption, Sheet, Tile

if TYPE_CHECKING:
    from pathlib import Path

    from vimfast.inference import Classifier, Predictions, Report, Seen

T = TypeVar("T")

_ACROSS, _MOST, _BARS = 6, 48, 3  # images of a grid's row, of a grid, and classes of an image in it


def main() -> int:
    """Predict as the command line says; returns the exit status."""
    args = parser().parse_args(sys.argv[1:])
    check_order(args.checkpoint, args.images, "predict")
    refuse_unwritable("--grid", args.grid)
    with loaded(args) as classifier:
        predictions = _predict(classifier, args)
        if args.json:
            print(json.dumps(to_json(classifier, predictions), indent=1))
        else:
            _print(classifier, predictions)
        for _, why in predictions.unreadable:
            warn(printable(why))
        if args.grid is not None and predictions.images:
            _save(draw(classifier, predictions), args.grid)
            say_written(args.grid, aside=args.json)
    return int(bool(predictions.unreadable))


def parser() -> Parser:
    """Of the command line."""
    parser = Parser(
        "vimfast predict",
        "Say what a trained model sees in images, which are resized and cut as in its evaluation.",
        epilog="example: vimfast predict runs/tiny cat.jpg photos/ --grid seen.png",
    )
    add = parser.add_argument
    text = (
        "a run folder (its best checkpoint, else its last), a checkpoint of ours or of hustvl/Vim, an exported folder"
    )
    add("checkpoint", metavar="CKPT", type=path, help=f"{text}, or weights alone")
    add("images", metavar="IMAGE", nargs="+", type=path, help="images, and folders of images at any depth")
    add("--top", metavar="K", type=whole(1), default=5, help="classes to list for each image [5]")
    add("--json", action="store_true", help="print a JSON object instead of a table")
    add("--grid", metavar="PNG", type=png, help=f"draw the images, up to {_MOST}, with what is seen in them")
    add_model_flags(parser)
    return parser


def add_model_flags(parser: Parser) -> None:
    """Which model, and how it runs: what :func:`loaded` reads."""
    add = parser.add_argument
    text = "the trained ones, or their average; default: the average, once it has left the initial weights behind"
    add("--weights", choices=("raw", "ema"), help=text)
    add("--model", metavar="NAME", default="", help="name of the model, where the checkpoint does not say")
    text = "side of the images, pixels, or height and width; default: the checkpoint's"
    add("--input-size", metavar=SIZE, type=image_size, help=text)
    add("--batch-size", metavar="N", type=whole(1), default=64, help="images at once [64]")
    add("--device", metavar="NAME", default="auto", help="auto, cuda, cuda:N or cpu [auto]")


@contextmanager
def loaded(args: argparse.Namespace) -> Iterator[Classifier]:
    """The model of the command line, on its device, after a warning for each thing to know about it."""
    with LiveLine() as live:
        live.say("importing torch")
        from vimfast import dist
        from vimfast.inference import load_classifier
    with dist.processes(args.device) as world:
        with LiveLine() as live:
            live.say(f"reading {args.checkpoint}")
            classifier = load_classifier(
                args.checkpoint,
                weights=args.weights,
                model=args.model,
                input_size=args.input_size,
                device=world.device,
            )
        for note in classifier.notes:
            warn(note)
        yield classifier


def warn(sentence: str) -> None:
    """On stderr, broken at words where that is a terminal."""
    print(fit_terminal(f"warning: {sentence}", sys.stderr), file=sys.stderr)


def check_order(checkpoint: Path, images: Sequence[Path], command: str) -> None:
    """Before anything takes time; the words are easily swapped."""
    from vimfast.shards.tree import is_image_name

    if not checkpoint.exists():
        raise UserError(f"{checkpoint} does not exist", "give a run folder, a checkpoint or an exported folder")
    if is_image_name(checkpoint.name) and checkpoint.is_file():
        raise UserError(f"{checkpoint} is an image", f"the checkpoint comes first: vimfast {command} CKPT IMAGE")
    if not any(image.exists() for image in images):
        others = ["", ", nor does the other", f", nor do the {len(images) - 1:,} others"][min(len(images) - 1, 2)]
        raise UserError(f"{images[0]} does not exist{others}", "give images, or folders of images")


def _predict(classifier: Classifier, args: argparse.Namespace) -> Predictions:
    from vimfast.inference import find_images, predict_files

    images, missing = find_images(args.images)
    found = with_bar(
        len(images),
        lambda report: predict_files(classifier, images, top=args.top, batch_size=args.batch_size, report=report),
    )
    return found._replace(unreadable=missing + found.unreadable)


def with_bar(images: int, work: Callable[[Report], T]) -> T:
    """What `work` returns; on a terminal a bar shows how many images it says are done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("images", total=images)
        return work(lambda done: progress.update(bar, completed=done))


def to_json(classifier: Classifier, predictions: Predictions) -> dict[str, Any]:
    """The predictions in plain values."""
    return {
        "checkpoint": str(classifier.origin),
        "weights": classifier.weights,
        "images": [
            {"image": str(image.path), "guesses": [guess._asdict() for guess in image.guesses]}
            for image in predictions.images
        ],
        "unreadable": [{"image": str(path), "why": why} for path, why in predictions.unreadable],
    }


def _print(classifier: Classifier, predictions: Predictions) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = f"{classifier.origin}, {_weights(classifier)} weights"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("label", overflow="fold")
    table.add_column("probability", justify="right")
    if named := classifier.labels != classifier.classes:
        table.add_column("class")
    for image in predictions.images:
        for place, guess in enumerate(image.guesses):
            style = "" if place else "bold"
            row = [Text("" if place else printable(str(image.path))), Text(printable(guess.label), style)]
            row.append(Text(f"{guess.probability:.1%}", style))
            table.add_row(*row, *([Text(guess.name, "dim")] if named else []))
        table.add_section()
    if predictions.images:
        print(fit_terminal(printable(title), sys.stdout))
        Console(highlight=False).print(table)


def _weights(classifier: Classifier) -> str:
    return "averaged" if classifier.weights == "ema" else "trained"


def draw(classifier: Classifier, predictions: Predictions) -> Image.Image:
    """A sheet of the first images as the model gets them, with its first few guesses."""
    from vimfast.augment.colours import to_pixels

    shown = predictions.images[:_MOST]
    loader = classifier.loader([image.path for image in shown])
    batches = [to_pixels(batch.images, classifier.view.normalization) for batch in loader.epoch(0)]
    tiles = [
        Tile(Image.fromarray(pixels), [Caption(image.path.name, faint=True), *_captions(image)])
        for image, pixels in zip(shown, itertools.chain.from_iterable(batches), strict=True)
    ]
    (height, width), total = classifier.view.size_in(0), len(predictions.images)
    which = f"{total} image{'s' * (total > 1)}" if total <= _MOST else f"the first {_MOST} of {total:,} images"
    return Sheet(
        title=str(classifier.origin),
        subtitle=[f"{_weights(classifier)} weights · {which}, as the model gets them: {height} x {width} pixels"],
        panels=[[tile] for tile in tiles],
        across=_ACROSS,
        side=176,
    ).draw()


def _captions(image: Seen) -> list[Caption]:
    return [Caption(guess.label, f"{guess.probability:.0%}", guess.probability) for guess in image.guesses[:_BARS]]


def _save(sheet: Image.Image, out: Path) -> None:
    with writing("--grid", out), atomic_write(out) as file:
        sheet.save(file, "PNG")

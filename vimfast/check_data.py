"""Is this folder tree, or this set of shards, fit to train on?

    python -m vimfast.check_data imagenet_data/
    python -m vimfast.check_data shards/ --decode --json
    python -m vimfast.check_data shards/ --html report.html

Exit status 0: it is, perhaps with warnings. 1: it is not, or there is nothing to check. (2: a misspelled flag.)
"""

from __future__ import annotations

import os
import sys

from vimfast.cli import SIZE, Parser, image_size, path, png, run_main, whole


def main() -> int:
    """Check as the command line says; returns the exit status."""
    args = parser().parse_args(sys.argv[1:])
    from vimfast.checks.checking import run  # here, where a package that is missing can be said in a sentence

    return run(args)


def parser() -> Parser:
    """Of the command line."""
    parser = Parser(
        "python -m vimfast.check_data",
        "Check a folder tree in the ImageNet layout, or shards from vimfast-prepare. "
        "Exit status 0: fit to train on; 1: not.",
        epilog="example: vimfast check imagenet_data/ --html check.html",
    )
    add = parser.add_argument
    add("path", metavar="PATH", type=path, help="folder with train/ and val/, or with shards")
    text = "number of classes; default: 1,000 if the names are ImageNet's, otherwise train and val need only agree"
    add("--classes", metavar="N", type=whole(1), help=text)
    text = "splits that must exist and are checked [train val]"
    add("--splits", nargs="+", choices=("train", "val"), default=["train", "val"], help=text)
    add("--decode", action="store_true", help="decode every image: slow, finds what headers do not show")
    add("--json", action="store_true", help="print a JSON object, with all findings, instead of a table")
    add("--workers", metavar="W", type=whole(1), default=len(os.sched_getaffinity(0)), help="processes [one a core]")
    text = "write a page with all of it: classes, sizes and shapes of images, findings with thumbnails"
    add("--html", metavar="FILE", type=path, help=text)
    text = "draw samples as the trainer sees them with its default settings; vimfast show takes its flags"
    add("--sample-grid", metavar="PNG", type=png, help=text)
    text = "of images in training: their side, pixels, or height and width [224]"
    add("--input-size", metavar=SIZE, type=image_size, default=224, help=text)
    add("--seed", type=whole(0), default=0, help="seed of the samples [0]")
    return parser


if __name__ == "__main__":
    run_main(main)

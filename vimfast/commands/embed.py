"""``vimfast embed``: images as vectors, for search, clustering and classifiers of your own.

    vimfast embed runs/tiny photos/ --out features.npy

Exit status 0: all images were looked at. 1: some could not be read. (2: the checkpoint cannot be used.)
"""

from __future__ import annotations

import csv
import io
import sys
from typing import TYPE_CHECKING

from vimfast.cli import Parser, path, refuse_unwritable, say_written, writing
from vimfast.commands.predict import add_model_flags, check_order, loaded, warn, with_bar
from vimfast.errors import UserError, printable
from vimfast.files import write_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from vimfast.inference import Embeddings


def main() -> int:
    """Embed as the command line says; returns the exit status."""
    args = parser().parse_args(sys.argv[1:])
    check_order(args.checkpoint, args.images, "embed")
    if args.out.suffix != ".npy":
        raise UserError(f"--out is {args.out}", "give a file name ending in .npy; a .csv is written beside it")
    refuse_unwritable("--out", args.out)
    from vimfast.inference import embed_files, find_images

    with loaded(args) as classifier:
        images, missing = find_images(args.images)
        found = with_bar(
            len(images), lambda report: embed_files(classifier, images, batch_size=args.batch_size, report=report)
        )
    unreadable = missing + found.unreadable
    for _, why in unreadable:
        warn(printable(why))
    if found.images:
        for file in save(found, args.out):
            say_written(file)
    return int(bool(unreadable))


def parser() -> Parser:
    """Of the command line."""
    parser = Parser(
        "vimfast embed",
        "Write what the head of a trained model would read of images: a vector for each.",
        epilog="example: vimfast embed runs/tiny photos/ --out features.npy",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=path, help="a run folder, a checkpoint, or an exported folder")
    add("images", metavar="IMAGE", nargs="+", type=path, help="images, and folders of images at any depth")
    text = "file to write: float32 [images, features]; a .csv beside it has the images' paths and folders"
    add("--out", metavar="NPY", type=path, required=True, help=text)
    add_model_flags(parser)
    return parser


def save(found: Embeddings, out: Path) -> list[Path]:
    """Write the vectors and, beside them, what they are of; returns the files.

    Raises:
        UserError: they cannot be written.
    """
    import numpy as np

    vectors, table = io.BytesIO(), io.StringIO()
    np.save(vectors, found.features)
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["image", "label"])
    rows.writerows((str(image), image.parent.name) for image in found.images)
    beside = out.with_suffix(".csv")
    with writing("--out", out):
        write_bytes(beside, table.getvalue().encode(errors="surrogateescape"))
        write_bytes(out, vectors.getvalue())
    return [out, beside]

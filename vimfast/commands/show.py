"""``vimfast show``: what a model really gets, with the flags of training.

vimfast show shards/ --config vim_tiny --out grid.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vimfast.cli import Parser, path_or_url, png, refuse_unwritable, say_written, whole, writing
from vimfast.config import resolve
from vimfast.config.flags import CONFIG, flag_parser
from vimfast.files import atomic_write

_OWN = ("data", "out", "split", "count")


def parser() -> Parser:
    """Of the command line."""
    parser = flag_parser()
    parser.description = "Draw images beside what the loader of training makes of them, mixing included."
    parser.usage = f"{parser.prog} DATA [--out PNG] [--config RECIPE] [FLAGS OF TRAINING]"
    parser.epilog = "example: vimfast show shards/ --config vim_tiny --out grid.png"
    add: Any = parser.add_argument_group("what is drawn").add_argument
    parser._action_groups.insert(1, parser._action_groups.pop())  # --help: before a hundred flags of training
    add("data", metavar="DATA", type=path_or_url, help="shards or a folder tree; stands before the flags")
    add("--out", metavar="PNG", type=png, default=Path("samples.png"), help="file to write [samples.png]")
    add("--split", choices=("train", "val"), default="train", help="train, or val: as the evaluation sees it [train]")
    add("--count", metavar="N", type=whole(1), default=8, help="images [8]")
    return parser


def main() -> None:
    """Draw what the command line asks for."""
    given = vars(parser().parse_args(sys.argv[1:]))
    own = {name: given.pop(name) for name in _OWN}
    cfg = resolve({**given, "data_path": own["data"]})
    refuse_unwritable("--out", own["out"])
    from vimfast.samples import draw_samples

    sheet = draw_samples(cfg, own["split"], own["count"], given.get(CONFIG, ""))
    with writing("--out", own["out"]), atomic_write(own["out"]) as file:
        sheet.save(file, "PNG")
    say_written(own["out"])

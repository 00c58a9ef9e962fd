"""A script of timm's, or any other that calls ``timm.create_model``, with the Vision Mambas registered.

    python -m vimfast.timm validate.py imagenet_data/ --model vim_tiny_patch16_224 --checkpoint model.safetensors
    torchrun --nproc_per_node=8 -m vimfast.timm train.py imagenet_data/ --model vim_tiny_patch16_224

timm looks for models in its registry alone, and importing :mod:`vimfast.models` is what puts them there. (Its train.py
can do that by itself: ``--device-modules vimfast.models``.)
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from vimfast.cli import run_main
from vimfast.errors import UserError


def main() -> None:
    """Run the script that the command line begins with; the words after it are the script's."""
    script = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if script is None or not script.is_file():
        what = "no script was given" if script is None else f"there is no script {script}"
        raise UserError(what, "call it as python -m vimfast.timm SCRIPT ARGUMENTS, e.g. with timm's train.py")
    import vimfast.models  # noqa: F401, registers them

    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)  # as `python SCRIPT` does, for what lies beside it
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    run_main(main)

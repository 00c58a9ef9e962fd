"""The same program as python -m vimfast.export, where it used to be: python tools/export_model.py --help"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))
sys.path.insert(0, str(Path(__file__).parent.parent))

from vimfast.cli import run_main
from vimfast.export import main

if __name__ == "__main__":
    run_main(main)

"""The same program as vimfast-prepare, for a checkout that is not installed: python tools/make_shards.py --help"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from vimfast.prepare import main

if __name__ == "__main__":
    main()

"""``report.html`` of a run folder: what ``log.txt``, ``config.yaml`` and ``report.json`` say, on one page."""

from vimfast.run_report.facts import (
    FACTS,
    Confused,
    Facts,
    Hard,
    Mistakes,
    Pace,
    read_facts,
    write_facts,
)
from vimfast.run_report.page import PAGE, write_page

__all__ = [
    "FACTS",
    "PAGE",
    "Confused",
    "Facts",
    "Hard",
    "Mistakes",
    "Pace",
    "read_facts",
    "write_facts",
    "write_page",
]

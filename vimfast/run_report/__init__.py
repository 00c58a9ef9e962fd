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
from vimfast.run_report.page import PAGE, render_page, write_page
from vimfast.run_report.records import TABLE, read_records, write_table

__all__ = [
    "FACTS",
    "PAGE",
    "TABLE",
    "Confused",
    "Facts",
    "Hard",
    "Mistakes",
    "Pace",
    "read_facts",
    "read_records",
    "render_page",
    "write_facts",
    "write_page",
    "write_table",
]

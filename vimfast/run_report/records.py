"""The records of ``log.txt``, read, and written as a table."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from vimfast.errors import UserError
from vimfast.files import atomic_write

LOG, TABLE = "log.txt", "log.csv"

Record = dict[str, Any]


def read_records(folder: Path) -> list[Record]:
    """The records of a run folder by epoch; lines that are no record are passed over, as a run passes over them.

    Raises:
        UserError: there is none, or the file cannot be read.
    """
    path = folder / LOG
    fix = "give the --output_dir of a run of at least one epoch"
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {LOG}", fix) from None
    except NotADirectoryError:
        raise UserError(f"{folder} is a file", fix) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "fix its permissions, or the disk") from None
    records: dict[int, Record] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("epoch"), int):
            records[record["epoch"]] = record
    if not records:
        raise UserError(f"{path} holds no epoch", fix)
    return [records[epoch] for epoch in sorted(records)]


def write_table(folder: Path) -> None:
    """Write the records as ``log.csv``, a row an epoch and a column for each field; what is not finite is empty.

    Raises:
        UserError: there are no records.
        OSError: it cannot be written.
    """
    records = read_records(folder)
    columns = dict.fromkeys(["epoch", *(name for record in records for name in record)])
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(records)
    with atomic_write(folder / TABLE, durable=False) as file:
        file.write(text.getvalue().encode())

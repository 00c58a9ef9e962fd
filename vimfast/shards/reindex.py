"""The indexes of finished shards, from their tars alone: neither the images they were made of nor the records of the
conversion are needed. The manifest's checksum says whether they are what they were.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vimfast.errors import UserError, remedy
from vimfast.files import read_file, write_bytes
from vimfast.shards.convert import locked
from vimfast.shards.format import (
    INDEX_DTYPE,
    MANIFEST,
    ShardEntry,
    SplitEntry,
    dali_index_name,
    index_header,
    index_name,
    read_manifest,
)
from vimfast.shards.verify import read_tar
from vimfast.shards.workers import Pace, run, tick
from vimfast.shards.writer import dali_index, read_rows

_AGAIN = "copy them again or run vimfast-prepare on their images again"


def reindex(folder: Path, *, workers: int) -> str:
    """Write the indexes of `folder` that are missing or differ from what is in its tars.

    Args:
        workers: processes.

    Returns:
        a line that says what was written.

    Raises:
        UserError: there is no sound manifest, a tar is damaged, or the folder cannot be written to.
    """
    if read_manifest(folder).indexed:  # and before anything is made in a folder that is none of ours
        raise UserError(
            f"the tars of {folder} are links to others",
            "index those again with vimfast-prepare --index-only",
        )
    with locked(folder):
        manifest = read_manifest(folder)
        found = _read_tars(folder, manifest.splits, workers)
        contents: dict[str, bytes] = {}
        for split, entry in manifest.splits.items():
            rows = np.concatenate([found[shard.name][0] for shard in entry.shards] or [np.zeros(0, INDEX_DTYPE)])
            index = index_header(len(rows)) + rows.tobytes()
            if zlib.crc32(index) != entry.index_crc32:
                raise _other_images(folder, split, entry, found)
            contents[index_name(split)] = index
            for number, shard in enumerate(entry.shards):
                contents[dali_index_name(split, number)] = found[shard.name][1]
        wrong = [name for name, content in contents.items() if not _holds(folder / name, content)]
        try:
            for name in wrong:
                write_bytes(folder / name, contents[name])
        except OSError as error:
            fix = f"{remedy(error) or 'fix that'} and run again"
            raise UserError(f"{folder} cannot be written to ({error.strerror})", fix) from None
    return f"{folder}: {f'wrote {_listed(wrong)}' if wrong else 'every index is what is in the tars'}"


Tar = tuple[np.ndarray, bytes]  # its rows of the index, and DALI's index


def _read_tars(folder: Path, splits: Mapping[str, SplitEntry], workers: int) -> dict[str, Tar]:
    todo = [(number, shard) for entry in splits.values() for number, shard in enumerate(entry.shards)]
    pace = Pace(sum(shard.samples for _, shard in todo), "images read")
    found: dict[str, Tar] = {}
    damaged: list[str] = []
    for (_, shard), outcome in run(_read, todo, lambda place: (folder, *place), workers, pace):
        if isinstance(outcome, str):
            damaged.append(f"{shard.name} {outcome}")
        else:
            found[shard.name] = outcome
    if damaged:
        raise UserError(f"{folder} has damaged tars: {'; '.join(sorted(damaged))}", _AGAIN)
    return found


def _read(folder: Path, number: int, shard: ShardEntry) -> Tar | str:
    """What a tar holds, or why it does not serve; in a worker."""
    path = folder / shard.name
    try:
        if (size := path.stat().st_size) != shard.bytes:
            return f"has {size:,} bytes, the manifest says {shard.bytes:,}"
        rows, lines = read_tar(path, number, tick)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except ValueError as error:
        return f"is damaged ({error})"
    if len(rows) != shard.samples:
        return f"has {len(rows):,} images, the manifest says {shard.samples:,}"
    return rows, dali_index(lines)


def _other_images(folder: Path, split: str, entry: SplitEntry, found: Mapping[str, Tar]) -> UserError:
    """The error for tars that are whole, but not those that the manifest is of; names them where there are records."""
    recorded = {shard.name: read_rows(folder, split, number) for number, shard in enumerate(entry.shards)}
    differing = [name for name, rows in recorded.items() if len(rows) and rows.tobytes() != found[name][0].tobytes()]
    which = _listed(differing) if differing else f"the {split} tars"
    return UserError(f"{folder / MANIFEST} is of other images than those in {which}", _AGAIN)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return read_file(path) == content
    except (OSError, ValueError):
        return False


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")

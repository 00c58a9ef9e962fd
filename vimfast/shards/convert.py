"""Converting a folder of images into shards: check the output folder, write the shards, then the manifest.

A conversion that was interrupted resumes when it is run again, and one that is complete is verified: shards that are
what their record says, of sources that are what they were, are kept.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from vimfast import __version__
from vimfast.class_names import are_imagenets
from vimfast.errors import UserError, counted, remedy
from vimfast.files import TEMPORARY, write_bytes
from vimfast.shards.archives import ARCHIVES, NOTE, has_archive, list_archive
from vimfast.shards.format import (
    FORMAT,
    INDEX_DTYPE,
    MANIFEST,
    PLAN,
    SOURCE,
    SPLITS,
    STATE_FOLDER,
    VERSION,
    ConversionOptions,
    Manifest,
    Note,
    PlanDigest,
    ShardEntry,
    SplitEntry,
    fetch_index,
    fetch_manifest,
    index_header,
    index_name,
    is_shards_folder,
    read_index,
    read_manifest,
    read_plan_digests,
    shard_name,
    write_json,
    write_manifest,
)
from vimfast.shards.plan import ShardPlan
from vimfast.shards.stored import Mirror, list_store, mirrored, store_at
from vimfast.shards.tree import FileList, is_folder, scan_split
from vimfast.shards.workers import Engine, Pace, Processes, passing, report, verify_shards, write_shards
from vimfast.shards.writer import estimate_bytes, join_rows, read_record, record_path, unwritable
from vimfast.stores import is_url, open_store

_IMAGENET = 1_000  # classes
_LISTED = 1_000  # objects, which a store lists in one answer


def convert(
    root: Path | str,
    out: Path | str,
    options: ConversionOptions,
    *,
    workers: int,
    skip_bad: bool = False,
    overwrite: bool = False,
    engine: Engine | None = None,
) -> str:
    """Make `out` hold the images of `root` as shards, keeping what an earlier run with the same options has written.

    Args:
        root: a folder in the ImageNet layout, or with the archives of ImageNet; or the URL of such a folder.
        out: a folder, or a URL.
        workers: processes.
        skip_bad: leave unreadable images out and record them in the manifest.
        overwrite: first delete the shards in `out`.
        engine: what verifies and writes the shards; None: so many processes.

    Returns:
        a line that describes what `out` holds now.

    Raises:
        UserError: `root` or `out` cannot be used, an image cannot be read, or the disk is full.
    """
    _check_out(root, out)
    with mirrored(out) if isinstance(out, str) else nullcontext() as mirror:
        folder = Path(out) if mirror is None else mirror.folder
        if mirror is not None:
            mirror.fetch()
        plans = _make_plans(root, options, folder, workers)
        digests, engine = {plan.split: plan.digest() for plan in plans}, engine or Processes(workers)
        with locked(folder), _explained(plans, folder, mirror):
            return _convert(str(root), plans, digests, folder, mirror, engine, skip_bad, overwrite)


@contextmanager
def _explained(plans: Sequence[ShardPlan], out: Path, mirror: Mirror | None) -> Iterator[None]:
    """What ends a conversion early, in words."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_what_is_kept(plans, out, mirror)) from None
    except OSError as error:
        raise unwritable(error, error.filename or out) from None


def _convert(
    root: str,
    plans: list[ShardPlan],
    digests: dict[str, PlanDigest],
    out: Path,
    mirror: Mirror | None,
    engine: Engine,
    skip_bad: bool,
    overwrite: bool,
) -> str:
    name = out if mirror is None else mirror.url
    continued = not overwrite and _is_continued(out, digests, mirror)
    kept = verify_shards(plans, out, engine, mirror) if continued else {}
    if len(kept) == sum(plan.shards for plan in plans) and (found := _finished(plans, out, digests)):
        _report_others(plans)
        return f"{name} is complete already: {_summarize(found)}"
    if mirror is None:
        _check_space(plans, out)
    if overwrite:
        delete_shards(out)
        if mirror is not None:
            mirror.clear()
    (out / MANIFEST).unlink(missing_ok=True)
    write_json(out / STATE_FOLDER / PLAN, digests)
    write_bytes(out / STATE_FOLDER / SOURCE, os.fsencode(root if is_url(root) else os.path.abspath(root)))
    if mirror is not None:
        mirror.remove(MANIFEST)
        for own in (PLAN, SOURCE, *(path.name for path in (out / STATE_FOLDER).glob(f"*{NOTE}"))):
            mirror.publish(f"{STATE_FOLDER}/{own}")
    begin = time.monotonic()
    written = write_shards(plans, out, engine, skip_bad, kept, mirror)
    manifest = _finish(plans, out, digests)
    if mirror is not None:
        for own in (*(index_name(plan.split) for plan in plans), MANIFEST):
            mirror.publish(own)
    _report_others(plans)
    rate = f"; {written / (time.monotonic() - begin):,.0f} images/s" if written else ""
    return f"{name} is complete: {_summarize(manifest)}{rate}"


def _what_is_kept(plans: Sequence[ShardPlan], out: Path, mirror: Mirror | None) -> str:
    """For whoever interrupts a conversion."""
    total = sum(plan.shards for plan in plans)
    done = sum(record_path(out, plan.split, number).exists() for plan in plans for number in range(plan.shards))
    name = out if mirror is None else mirror.url
    if done == 0:
        return f"no shard of {total} is finished; the same command begins again"
    kept = f"{done} of {total} shards" if done < total else f"all {total} shards"
    return f"{kept} are finished and stay in {name}; the same command verifies them and makes the rest"


def _make_plans(root: Path | str, options: ConversionOptions, out: Path, workers: int) -> list[ShardPlan]:
    """One plan for each split that exists; the training set determines the classes."""
    home, _, name = str(root).rpartition("/")
    if name in ARCHIVES.values():
        raise UserError(f"{root} is one of ImageNet's archives", f"give the folder that they are in, {home or '.'}")
    if isinstance(root, str):
        return _plans_of_store(root, options, out, workers)
    found = [split for split in SPLITS if is_folder(root / split) or has_archive(root, split)]
    if not found and is_shards_folder(root):
        raise UserError(
            f"{root} holds shards already", f"train on them with --data-path {root}, or give the folder of images"
        )
    plans: list[ShardPlan] = []
    for split in found or ["train"]:
        files = _list_images(root, split, plans[0].files.classes if plans else None, out, workers)
        plans.append(ShardPlan(split, files, options))
        _report_images(files)
    if 1 < (count := len(plans[0].files.classes)) < _IMAGENET and are_imagenets(plans[0].files.classes):
        report(
            f"{root} looks like a subset of ImageNet, with {count} of its {_IMAGENET:,} classes; "
            f"if it is meant to be whole, classes are missing; if not, check it with vimfast check --classes {count}"
        )
    for split in SPLITS:
        if found and split not in found:
            missing = f"{split}/" if is_folder(root / plans[0].split) else ARCHIVES[split]
            report(f"{root} has no {missing}: only {plans[0].split} is converted")
    return plans


def _plans_of_store(url: str, options: ConversionOptions, out: Path, workers: int) -> list[ShardPlan]:
    plans: list[ShardPlan] = []
    lists = store_at(url).lists
    for split in SPLITS:
        classes = plans[0].files.classes if plans else None
        pace = Pace(None, f"objects of {split} listed", unit="objects")
        watched = partial(passing, pace=pace, at_once=_LISTED)
        files: FileList | None = list_store(url, split, classes, watched) if lists else None
        if files is None and has_archive(url, split):
            files = list_archive(url, split, classes, workers, out / STATE_FOLDER)
        if files is None:
            held = f"images in {split}/<class>/" if lists else ARCHIVES[split]
            report(f"{url} has no {held}: there is no {split} to convert")
            continue
        plans.append(ShardPlan(split, files, options))
        _report_images(files)
    if not plans and not lists:
        where = f"{url} is on a web server, which cannot list its files, and has none of ImageNet's archives there"
        raise UserError(where, "give a bucket's URL, or the folder of the archives")
    if not plans:
        raise UserError(
            f"{url} has no images in train/<class>/ or val/<class>/, and none of ImageNet's archives",
            "give the folder that holds train/, or the archives",
        )
    return plans


def _report_images(files: FileList) -> None:
    report(f"{files.where}: {counted(len(files), 'image')} of {len(files.classes):,} classes")
    empty = np.flatnonzero(np.bincount(files.labels, minlength=len(files.classes)) == 0).tolist()
    if empty:
        report(_without_images(empty, files.classes, files.where))


def _without_images(empty: Sequence[int], classes: Sequence[str], where: str) -> str:
    first = classes[empty[0]]
    if len(empty) == 1:
        return f"class {first} has no images in {where}"
    return f"{len(empty):,} classes have no images in {where}, such as {first}"


def _list_images(root: Path, split: str, classes: list[str] | None, out: Path, workers: int) -> FileList:
    """From a folder, or where there is none from ImageNet's archive."""
    if not is_folder(root / split) and has_archive(root, split):
        return list_archive(root, split, classes, workers, out / STATE_FOLDER)
    pace = partial(Pace, what=f"classes of {split} listed", unit="classes")
    return scan_split(root, split, classes, lambda folders: passing(folders, pace(len(folders))))


def classes_without_images(out: Path | str) -> Iterator[str]:
    """A line for each split of a finished conversion in which classes have no images, or lost them as unreadable.

    Raises:
        UserError: `out` is not a finished conversion.
    """
    store = open_store(out) if isinstance(out, str) else None
    manifest = read_manifest(Path(out)) if store is None else fetch_manifest(store)
    for split, entry in manifest.splits.items():
        read = partial(read_index, Path(out)) if store is None else partial(fetch_index, store)
        labels = read(split, entry.samples, entry.index_crc32)["label"]
        empty = np.flatnonzero(np.bincount(labels, minlength=len(manifest.classes)) == 0).tolist()
        if empty:
            yield _without_images(empty, manifest.classes, split)


def _report_others(plans: Sequence[ShardPlan]) -> None:
    """What lay among the images and was not converted."""
    for plan in plans:
        if others := plan.files.others:
            counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(others.items()))
            report(f"{plan.files.where}: not converted, since the names are not of images: {counts}")
        if loose := plan.files.loose:
            report(f"{plan.files.where}: not converted, outside any class folder: {counted(loose, 'image')}")


# The folder to write to


def _check_out(root: Path | str, out: Path | str) -> None:
    """The out folder must not become part of what is read."""
    if isinstance(root, str) or isinstance(out, str):
        inside_of = [str(root).rstrip("/"), *(f"{str(root).rstrip('/')}/{split}" for split in SPLITS)]
        if str(out).rstrip("/") in inside_of or str(out).startswith(tuple(f"{url}/" for url in inside_of[1:])):
            raise UserError(f"--out {out} is inside the images of {root}", "give a folder of its own")
        return
    inside = [root.resolve(), *((root / split).resolve() for split in SPLITS)]
    target = out.resolve()
    if target == inside[0] or any(target == folder or folder in target.parents for folder in inside[1:]):
        raise UserError(f"--out {out} is inside the images of {root}", "give a folder of its own")
    if os.path.exists(target) and not os.path.isdir(target):  # Path's own raise where nothing may be looked up
        raise UserError(f"--out {out} is a file", "give a folder")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second vimfast-prepare out of the folder; the system releases the lock however this process ends."""
    try:
        (out / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
        file = open(out / STATE_FOLDER / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"{out} cannot be written to ({error.strerror})", remedy(error, "choose another folder")
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another vimfast-prepare is writing to {out}", "wait for it, or give another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


def _is_continued(out: Path, digests: dict[str, PlanDigest], mirror: Mirror | None) -> bool:
    """Whether `out` was started with these plans; False if it holds no shards, an error if it holds others."""
    known = read_plan_digests(out / STATE_FOLDER / PLAN) or _manifest_plan(out)
    if not known and not (our_files(out) if mirror is None else mirror.holds_others()):
        return False
    fix = "add --overwrite to delete them, or give another --out"
    if not known or not set(known) <= set(digests):
        splits = " and ".join(sorted(known)) or "unknown origin"
        raise UserError(f"{out} holds shards of {splits}, not of {' and '.join(digests)} as here", fix)
    for split, earlier in known.items():
        if earlier.fingerprint == digests[split].fingerprint:
            continue
        old, new = _flags(earlier.options), _flags(digests[split].options)
        what = f"from other files in {split}/" if old == new else f"with {old}, not with {new}"
        raise UserError(f"{out} holds shards made {what}", fix)
    return True


def _manifest_plan(out: Path) -> dict[str, PlanDigest]:
    try:
        return read_manifest(out).plan
    except UserError:
        return {}


def _flags(options: ConversionOptions) -> str:
    """The command line's words for these options."""
    values = msgspec.to_builtins(options)
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items() if value is not None)


def _finished(plans: Sequence[ShardPlan], out: Path, digests: dict[str, PlanDigest]) -> Manifest | None:
    """The manifest, if it and the indexes are what follows from the records of the shards."""
    try:
        manifest = read_manifest(out)
        for split, entry in manifest.splits.items():
            read_index(out, split, entry.samples, entry.index_crc32)
    except UserError as error:
        if (out / MANIFEST).exists():
            report(f"{error.problem}: it is made again")
        return None
    if set(manifest.splits) != set(digests):
        return None
    expected = _make_manifest(
        plans, digests, [_split_entry(plan, out, join_rows(out, plan.split, plan.shards)) for plan in plans]
    )
    if msgspec.structs.replace(expected, vimfast=manifest.vimfast, created=manifest.created) != manifest:
        report(f"{out / MANIFEST} differs from the records of its shards: it is made again")
        return None
    return manifest


def our_files(out: Path) -> list[Path]:
    """Everything in `out` that any vimfast-prepare wrote."""
    names = [f"{split}-[0-9]*.{kind}*" for split in SPLITS for kind in ("tar", "idx")]
    names += [f"{index_name(split)}*" for split in SPLITS] + [f"{MANIFEST}*"]
    return [path for name in names for path in out.glob(name)]


def delete_shards(out: Path) -> None:
    """And what a conversion keeps for its next run."""
    (out / MANIFEST).unlink(missing_ok=True)  # first: a folder being deleted must not look complete
    for path in [*our_files(out), *(out / STATE_FOLDER).glob("*.npz*"), out / STATE_FOLDER / PLAN]:
        path.unlink(missing_ok=True)


def _check_space(plans: Sequence[ShardPlan], out: Path) -> None:
    needed = sum(estimate_bytes(plan) for plan in plans)
    there = sum(path.lstat().st_size for path in our_files(out))
    free = shutil.disk_usage(out).free
    if needed > free + there:
        raise UserError(
            f"{out} needs about {_gigabytes(needed - there)} more, {_gigabytes(free)} are free",
            "free some, give an --out on another disk, or store less with --resize 256",
        )


# The end


def _finish(plans: Sequence[ShardPlan], out: Path, digests: dict[str, PlanDigest]) -> Manifest:
    """Write the index of each split, then the manifest, from the records of the shards; returns the manifest."""
    entries = []
    for plan in plans:
        index = join_rows(out, plan.split, plan.shards)
        entries.append(_split_entry(plan, out, index))
        write_bytes(out / index_name(plan.split), index)
    manifest = _make_manifest(plans, digests, entries)
    for path in [*our_files(out), *(out / STATE_FOLDER).glob("*.npz*")]:
        if path.suffix == TEMPORARY:  # of a run that was killed
            path.unlink()
    write_manifest(out, manifest)
    return manifest


def _make_manifest(
    plans: Sequence[ShardPlan], digests: dict[str, PlanDigest], entries: Sequence[SplitEntry]
) -> Manifest:
    options = plans[0].options
    return Manifest(
        format=FORMAT,
        version=VERSION,
        vimfast=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        classes=plans[0].files.classes,
        seed=options.seed,
        resize=options.resize,
        quality=options.quality,
        splits={plan.split: entry for plan, entry in zip(plans, entries, strict=True)},
        plan=digests,
    )


def _split_entry(plan: ShardPlan, out: Path, index: bytes) -> SplitEntry:
    """A split's entry in the manifest, from the records of its shards and the index that follows from them."""
    read = [read_record(out, plan.split, number) for number in range(plan.shards)]
    records = [record for record in read if record]
    samples = sum(record.samples for record in records)
    if len(records) < plan.shards or len(index) != len(index_header(samples)) + samples * INDEX_DTYPE.itemsize:
        raise UserError(f"{out / STATE_FOLDER} changed while it was used", "run again, it resumes")
    if not all(record.samples for record in records):
        raise UserError(
            f"a whole shard of {plan.files.where} is unreadable, {len(plan) - samples} of {len(plan)} images in all, "
            "and DALI reads no empty shard",
            "remove them, then convert with --overwrite",
        )
    return SplitEntry(
        samples=samples,
        bytes=sum(record.image_bytes for record in records),
        shards=[
            ShardEntry(shard_name(plan.split, number), record.samples, record.tar_bytes)
            for number, record in enumerate(records)
        ],
        index_crc32=zlib.crc32(index),
        changed=_notes(pair for record in records for pair in record.changed),
        skipped=_notes(pair for record in records for pair in record.skipped),
    )


def _notes(pairs: Iterable[tuple[str, str]]) -> list[Note]:
    return sorted(Note(file, why) for file, why in pairs)


def _summarize(manifest: Manifest) -> str:
    """The manifest in one line."""
    parts = []
    for split, entry in manifest.splits.items():
        counts = {"converted to RGB JPEG": len(entry.changed), "skipped": len(entry.skipped)}
        notes = "".join(f", {count} {what}" for what, count in counts.items() if count)
        parts.append(f"{counted(entry.samples, f'{split} image')} in {counted(len(entry.shards), 'shard')}{notes}")
    total = sum(shard.bytes for entry in manifest.splits.values() for shard in entry.shards)
    return f"{', '.join(parts)}, {_gigabytes(total)} of tars"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"

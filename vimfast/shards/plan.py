"""The plan of a split: which image goes where. It follows from the list of files and the options alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from vimfast.shards.format import VERSION, ConversionOptions, PlanDigest
from vimfast.shards.origin import Origin
from vimfast.shards.tree import FileList

_KEY_BYTES = 96  # with its extension, what the name field of a plain tar header holds
_FOLDER_BYTES = 64
_MANY_SHARDS, _FEW_SAMPLES = 64, 512


@dataclass(frozen=True)
class Part:
    """One shard's part of the plan: everything needed to write it."""

    split: str
    number: int
    origin: Origin
    names: list[str]  # below the split's folder
    keys: list[str]
    labels: list[int]
    options: ConversionOptions


class ShardPlan:
    """Where each image of a split goes: its shard, its position there, and its key.

    The training set is shuffled as a whole, validation stays sorted. Shards are of equal length within one sample,
    and a small set is cut into more of them than necessary, for readers that distribute whole shards.
    """

    def __init__(self, split: str, files: FileList, options: ConversionOptions) -> None:
        self.split, self.files, self.options = split, files, options
        samples = len(files)
        shuffled = split == "train"
        self.order = np.random.default_rng(options.seed).permutation(samples) if shuffled else np.arange(samples)
        self.shards = max(-(-samples // options.shard_samples), min(_MANY_SHARDS, -(-samples // _FEW_SAMPLES)))
        self._folders = _folder_names(files.classes)
        self._numbered, self._tags = self._find_numbered()

    def __len__(self) -> int:
        return len(self.files)

    def samples(self, number: int) -> int:
        """How many images shard `number` has, without those that turn out unreadable."""
        return len(self) * (number + 1) // self.shards - len(self) * number // self.shards

    def part(self, number: int) -> Part:
        """The part of shard `number`."""
        first = len(self) * number // self.shards
        last = first + self.samples(number)
        ids = self.order[first:last].tolist()
        names = [self.files.name(i) for i in ids]
        keys = [self._key(i, name) for i, name in zip(ids, names, strict=True)]
        labels = self.files.labels[ids].tolist()
        return Part(self.split, number, self.files.origin(ids), names, keys, labels, self.options)

    def digest(self) -> PlanDigest:
        """What distinguishes this plan from those that write other shards."""
        content = [VERSION, self.split, msgspec.to_builtins(self.options), self.files.classes]
        digest = hashlib.sha256(json.dumps(content).encode())
        for array in (self.files.names, self.files.offsets, self.files.labels):
            digest.update(array.data)
        return PlanDigest(digest.hexdigest(), self.options)

    def _key(self, i: int, name: str) -> str:
        label = int(self.files.labels[i])
        if self._numbered[i]:
            return f"{self._folders[label]}/{self._tags[label]}{i:08d}"
        return f"{self._folders[label]}/{_stem(name)}"

    def _find_numbered(self) -> tuple[np.ndarray, dict[int, str]]:
        """Which samples cannot be named after their file, and, for each class that has any, the prefix of the
        numbers that they get instead."""
        numbered, tags = np.zeros(len(self), bool), {}
        starts = np.searchsorted(self.files.labels, np.arange(len(self.files.classes) + 1))
        for label, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
            taken: set[str] = set()
            room = _KEY_BYTES - len(os.fsencode(self._folders[label])) - 1
            for i in range(start, stop):
                stem = _stem(self.files.name(i))
                numbered[i] = stem in taken or len(os.fsencode(stem)) > room
                taken.add(stem)
            if numbered[start:stop].any():
                tag = "file-"
                while any(stem.startswith(tag) for stem in taken):
                    tag = "_" + tag
                tags[label] = tag
        return numbered, tags


def _stem(name: str) -> str:
    """The path inside the class folder, without what confuses readers: WebDataset takes all after the first dot
    of a file name for its extension, and DALI's index separates names by white space."""
    inside = name.split("/", 1)[1]
    folder, slash, base = os.path.splitext(inside)[0].rpartition("/")
    return re.sub(r"\s", "_", folder + slash + base.replace(".", "_"))


def _folder_names(classes: Sequence[str]) -> list[str]:
    """The class names as folders inside the tars, still unique."""
    names: list[str] = []
    taken: set[str] = set()
    for label, name in enumerate(classes):
        folder = re.sub(r"\s", "_", name)
        if len(os.fsencode(folder)) > _FOLDER_BYTES:
            folder = f"class-{label:05d}"
        while folder in taken:
            folder += f"-{label}"
        taken.add(folder)
        names.append(folder)
    return names

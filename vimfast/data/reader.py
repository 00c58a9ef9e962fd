"""A source read for a loader: images that do not decode are named, and left out where that is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from vimfast.data.source import BadImage, Images, Source
from vimfast.errors import UserError
from vimfast.shards import jpeg


class Reader:
    """The images of `source`, without those that were found not to decode.

    In training the next image that does decode stands in for a bad one, so batches keep their size and processes stay
    in step without communicating. In evaluation a bad one is left out. Which images come is then decided by the
    data alone, not by when a bad one was first met.

    Args:
        skip: continue without bad images; else the first one is raised, or handed to `stop`.
        stand_in: put another image in the place of a bad one.
        stop: called with the error that would be raised, of a bad image or of a file that cannot be read, and then
            continued as if it were to be skipped, until the caller has stopped; None: errors are raised.
        report: called once for each bad image.
    """

    def __init__(
        self,
        source: Source,
        *,
        skip: bool,
        stand_in: bool,
        stop: Callable[[UserError], None] | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.source = source
        self.bad: dict[int, str] = {}  # id: what is wrong with it, a sentence that names it
        self._reencoded: set[int] = set()
        self._skip, self._stand_in, self._stop, self._report = skip, stand_in, stop, report or _warn

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, Images]:
        """The ids of the images that come (int64 [n], or fewer where none stands in), and the images.

        Raises:
            UserError: a file cannot be read, or is bad and bad ones are not to be skipped; the sentence names it.
        """
        while True:
            wanted = self.without_bad(ids)
            try:
                images = self.source.read(wanted)
            except BadImage as bad:
                if not self._skip:
                    self._refuse(bad)
                self._leave_out(bad.image, bad.found)
                continue
            except UserError as error:
                self._refuse(error)
                self._leave_out_unreadable(wanted, error)
                continue
            for place in np.flatnonzero(np.isin(wanted, list(self._reencoded))) if self._reencoded else ():
                images.encoded[place] = np.frombuffer(jpeg.to_rgb_jpeg(images.encoded[place])[0], np.uint8)
            return wanted, images

    def blame(
        self,
        batches: Iterable[tuple[np.ndarray, Sequence[np.ndarray]]],
        refused: Callable[[Sequence[np.ndarray]], list[int]],
    ) -> bool:
        """Find what keeps a batch from being decoded, so that reading it again gives one that is.

        What Pillow cannot decode is bad. What it can, and the loader's decoder cannot, is decoded by Pillow and
        re-encoded from then on.

        Args:
            batches: ids and encoded images of those in work, the one that failed first.
            refused: the places of the images that the loader's decoder refuses.

        Returns:
            Whether an image was found.

        Raises:
            UserError: it was, and bad ones are not to be skipped, or it is not what was stored; the sentence names it.
        """
        batches = list(batches)
        for ids, encoded in batches:
            stored = np.flatnonzero(~np.isin(ids, list(self._reencoded)))
            self.source.verify(ids[stored], [encoded[place] for place in stored.tolist()])
            why = {int(i): reason for i, data in zip(ids, encoded, strict=True) if (reason := _why_unreadable(data))}
            if why:
                self._accuse(why)
                return True
        ids, encoded = batches[0]
        found = {int(ids[place]) for place in refused(encoded)}
        self._accuse(dict.fromkeys(found & self._reencoded, "DALI decodes it neither as it is nor as Pillow saves it"))
        for i in found - self._reencoded:
            self._report(f"{self.source.name(i)}: DALI cannot decode it, but Pillow can, which will do it from here on")
        self._reencoded |= found
        return bool(found)

    def _accuse(self, why: dict[int, str]) -> None:
        names = {i: f"{self.source.name(i)} ({reason})" for i, reason in why.items()}
        if names and not self._skip:
            self._refuse(
                UserError(
                    f"cannot decode {', '.join(sorted(names.values()))}",
                    "continue without such images with --on-bad-image skip, or find them all with "
                    "python -m vimfast.check_data DATA --decode",
                )
            )
        for i, name in names.items():
            self._leave_out(i, f"cannot decode {name}")

    def _refuse(self, error: UserError) -> None:
        """Raise it, or have the caller stop and continue until then."""
        if self._stop is None:
            raise error
        self._stop(error)

    def _leave_out_unreadable(self, ids: np.ndarray, error: UserError) -> None:
        """Those of these images that cannot be read; if none of them can, it is not the images."""
        wanted, found = np.unique(ids).tolist(), dict[int, str]()
        for i in wanted:
            try:
                self.source.read(np.array([i], np.int64))
            except UserError as why:  # noqa: PERF203
                found[i] = why.problem
        if len(found) in (0, len(wanted)):
            raise error
        for i, sentence in found.items():
            self._leave_out(i, sentence)

    def _leave_out(self, i: int, sentence: str) -> None:
        if i not in self.bad:
            self.bad[i] = sentence
            instead = "another takes its place" if self._stand_in else "it is not counted"
            self._report(f"{sentence}: {instead}; bad images so far: {len(self.bad)}")

    def without_bad(self, ids: np.ndarray) -> np.ndarray:
        """The ids of those that come for these, as far as bad ones are known."""
        if not self.bad:
            return ids
        if self._stand_in:
            return np.array([self._next_good(i) for i in ids.tolist()], np.int64)
        return ids[~np.isin(ids, list(self.bad))]

    def _next_good(self, i: int) -> int:
        total = len(self.source)
        for step in range(total):
            if (i + step) % total not in self.bad:
                return (i + step) % total
        raise UserError(f"none of the {total} images decodes", "check them with python -m vimfast.check_data")


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


def _why_unreadable(data: np.ndarray) -> str | None:
    try:
        jpeg.to_rgb_jpeg(data)
    except ValueError as error:
        return str(error)
    except MemoryError:
        raise UserError("there is too little memory to decode the images", "free some, and resume") from None
    return None

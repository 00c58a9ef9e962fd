"""The images of a batch, shared out among threads: for work that mostly runs without Python's lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Threads:
    """They are started when they are first needed.

    Args:
        count: of threads; with one, the caller's does the work.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ThreadPoolExecutor | None = None

    def each(self, work: Callable[[int], None], images: int) -> None:
        """``work(i)`` for each i in 0 .. `images` - 1; in any order, and several at a time.

        An error of one of them is raised once the others have ended.
        """
        # next() on it is atomic, so each number is taken once, and nobody idles while images are left.
        left = iter(range(images))

        def some() -> None:
            for i in left:
                work(i)

        helpers = min(self._count, images)
        if helpers < 2:
            some()
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="pixels")
        ends = [self._pool.submit(some) for _ in range(helpers)]
        errors = [error for end in ends if (error := end.exception()) is not None]
        if errors:
            raise errors[0]

    def close(self) -> None:
        """End the threads. Asked for more work, others are started."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


ALONE = Threads(1)
"""The caller's thread."""

"""Images shared out among threads."""

from __future__ import annotations

import threading

import pytest

from vimfast.augment.threads import ALONE, Threads


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("images", [0, 1, 3, 200])
def test_each_image_is_done_once(count: int, images: int) -> None:
    threads, done = Threads(count), []
    for _ in range(2):
        threads.each(done.append, images)
        threads.close()  # and started once more when asked again
    assert sorted(done) == sorted([*range(images)] * 2)


def test_several_are_done_at_a_time() -> None:
    threads, both = Threads(2), threading.Barrier(2, timeout=60)
    threads.each(lambda i: both.wait(), 2)  # would wait for ever, were they done one after the other
    threads.close()


@pytest.mark.parametrize("threads", [ALONE, Threads(3)])
def test_an_error_is_raised_when_all_have_ended(threads: Threads) -> None:
    done: list[int] = []

    def work(i: int) -> None:
        if i == 5:
            raise ValueError("the sixth")
        done.append(i)

    before = threading.active_count()
    with pytest.raises(ValueError, match="the sixth"):
        threads.each(work, 12)
    assert set(done) >= {0, 1, 2, 3, 4}
    threads.close()
    assert threading.active_count() == before

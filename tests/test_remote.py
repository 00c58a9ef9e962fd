"""Shards in a store: the bits that the disk gives, whatever becomes of cache, network and processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from object_servers import BUCKET, EXPIRED, SLOW_DOWN, Proxy, Trouble, wait_for
from remote_shards import IMAGES, IN_SHARD, URL, assert_same, batches, by_window, settings, shard_bytes
from runs import TINY, Stops, differences, environment, refused, train

from vimfast import check_data
from vimfast.commands import show
from vimfast.config import DataConfig, load_config
from vimfast.data import fetching
from vimfast.data.cache import Cache, NoRoom
from vimfast.data.fetching import Fetcher, Timeline
from vimfast.data.order import Detour, Order
from vimfast.data.source import Source, open_source
from vimfast.errors import UserError

WINDOW = ("--order", "window", "--order-window", "3")


@pytest.mark.parametrize("kind", ["permutation", "window", "small", "none"])
def test_batches_are_those_of_the_disk(local: Path, remote: Proxy, tmp_path: Path, kind: str) -> None:
    """Cold and warm, in a new process's place in mid-epoch, in a cache that cannot hold all, and without one."""
    here = open_source(local, "train")
    order = by_window(here) if kind in ("window", "small") else {}
    size = {"small": 9 * shard_bytes(local), "none": 0}.get(kind)
    wanted = batches(here, 35, **order)  # two epochs are 30
    away = open_source(URL, "train", settings(tmp_path, size))
    assert_same(batches(away, 35, **order), wanted)
    if size is None:  # a permutation does not wait for its shards
        wait_for(lambda: len(list(tmp_path.rglob("train-*.tar"))) == IMAGES // IN_SHARD)
    requests = len(remote.requests)
    again = open_source(URL, "train", settings(tmp_path, size))
    assert_same(batches(again, 28, (0, 7), **order), wanted[7:])
    if size is None:
        assert len(remote.requests) == requests + 2, "a warm cache asks for manifest and index alone"
    used = Cache(tmp_path, size).used() if size != 0 else 0
    assert used <= (size if size is not None else 1 << 30)


READS_ALL = """
import sys
from vimfast.data.cache import CacheSettings
from vimfast.data.order import Detour, Order
from vimfast.data.source import open_source

source = open_source(sys.argv[1], "train", CacheSettings(sys.argv[2]))
order = Order(len(source), 5, bounds=source.bounds(), window=4, seed=int(sys.argv[3]))
for step in range(order.steps):
    source.follow(order, 0, step)
    ids = order.step(0, step)[1]
    source.will_need(ids)
    source.read(ids)
    print(step, flush=True)
"""


def reads_all(cache: Path, seed: int = 0) -> subprocess.Popen[str]:
    """A process that reads all images, each once."""
    command = [sys.executable, "-c", READS_ALL, URL, str(cache), str(seed)]
    env = {**os.environ, **environment()}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_two_processes_fetch_each_shard_once(remote: Proxy, tmp_path: Path) -> None:
    remote.troubles = [Trouble(".tar", delay=0.05)]  # so that they meet
    both = [reads_all(tmp_path, seed) for seed in (1, 1)]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert len(out.split()) == IMAGES // 5
    assert [remote.asked(f"train-{number:06d}.tar") for number in range(12)] == [1] * 12
    assert not list(tmp_path.rglob("*.part"))


def test_killed_in_mid_download(local: Path, remote: Proxy, tmp_path: Path) -> None:
    """The half that is left is nobody's, and is fetched again."""
    remote.troubles = [Trouble("train-000004.tar", delay=60)]
    process = reads_all(tmp_path)
    wait_for(lambda: any(path.name == "train-000004.tar.part" for path in tmp_path.rglob("*.part")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (part,) = tmp_path.rglob("train-000004.tar.part")
    assert part.stat().st_size > 0
    assert not list(tmp_path.rglob("train-000004.tar"))
    remote.troubles = []
    here, order = open_source(local, "train"), by_window(open_source(local, "train"))
    assert_same(batches(open_source(URL, "train", settings(tmp_path)), 15, **order), batches(here, 15, **order))
    assert not list(tmp_path.rglob("*.part"))


def one_epoch(source: Source, by_shard: bool = True) -> list[bytes]:
    """All images, as a loader reads them, without decoding."""
    order = Order(len(source), 5, **(by_window(source) if by_shard else {}))
    found = []
    for step in range(order.steps):
        source.follow(order, 0, step)
        ids = order.step(0, step)[1]
        source.will_need(ids)
        found += [image.tobytes() for image in source.read(ids).encoded]
    return found


def test_an_image_of_a_shard_that_was_read_before_is_read_from_the_cache(remote: Proxy, tmp_path: Path) -> None:
    """As the page about a run shows images after each evaluation."""
    source = open_source(URL, "val", settings(tmp_path))
    order = Order(len(source), 5, shuffle=False, drop_last=False)
    for step in range(order.steps):
        source.follow(order, 0, step)
        source.read(order.step(0, step)[1])
    requests = len(remote.requests)
    source.read(np.array([0]))
    assert len(remote.requests) == requests


def test_bytes_changed_on_their_way_are_asked_for_again(local: Path, remote: Proxy, tmp_path: Path) -> None:
    remote.troubles = [Trouble("train-000003.tar", 1, flip=1000)]
    assert one_epoch(open_source(URL, "train", settings(tmp_path))) == one_epoch(open_source(local, "train"))
    assert remote.asked("train-000003.tar") == 2
    remote.troubles = [Trouble("train-000003.tar", 1, flip=600)]
    assert one_epoch(open_source(URL, "train", settings(tmp_path, 0)), False) == one_epoch(
        open_source(local, "train"), False
    )


def test_a_full_cache_asks_of_the_system_what_a_disk_does(
    local: Path, remote: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk to fetch an image ahead, and its bytes: for no image a file is opened, locked or touched."""
    calls = Counter[str]()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        return call

    found = []
    for source in (open_source(local, "train"), open_source(URL, "train", settings(tmp_path))):
        for _ in range(2):
            one_epoch(source)
        with monkeypatch.context() as patch:
            for module, name in ((os, "pread"), (os, "posix_fadvise"), (os, "open"), (os, "utime"), (fcntl, "flock")):
                patch.setattr(module, name, counted(name, getattr(module, name)))
            one_epoch(source)
        found.append(dict(calls))
        calls.clear()
    assert found[0] == found[1] == {"pread": IMAGES, "posix_fadvise": IMAGES}


def test_a_damaged_object_is_named(remote: Proxy, tmp_path: Path) -> None:
    remote.troubles = [Trouble("train-000003.tar", flip=1000)]
    with pytest.raises(UserError, match=rf"^{URL}/train-000003.tar is damaged: 1 image in it .*copy it to the store"):
        one_epoch(open_source(URL, "train", settings(tmp_path)))
    assert not list(tmp_path.rglob("train-000003.tar")), "it does not come into the cache"
    with pytest.raises(UserError, match=rf"^{URL}/train-000003.tar: \S+ is damaged: it differs from its checksum"):
        one_epoch(open_source(URL, "train", settings(tmp_path, 0)), False)


def test_a_copy_that_the_disk_damaged_is_fetched_again(
    local: Path, remote: Proxy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = one_epoch(open_source(local, "train"))
    assert one_epoch(open_source(URL, "train", settings(tmp_path))) == wanted
    (copy,) = tmp_path.rglob("train-000003.tar")
    with copy.open("r+b") as file:
        file.seek(1000)
        file.write(b"\0\0\0\0\0\0")
    assert one_epoch(open_source(URL, "train", settings(tmp_path))) == wanted
    assert (
        f"warning: a copy of {URL}/train-000003.tar in {tmp_path}/vimfast-cache is damaged: it is"
        in capfd.readouterr().err
    )
    assert one_epoch(open_source(URL, "train", settings(tmp_path))) == wanted
    assert (tmp_path / copy).read_bytes() == (local / copy.name).read_bytes()


def test_throttling_passes(local: Path, remote: Proxy, tmp_path: Path) -> None:
    remote.troubles = [Trouble("tar", 5, status=503, body=SLOW_DOWN), Trouble("tar", 3, cut=700)]
    assert one_epoch(open_source(URL, "train", settings(tmp_path))) == one_epoch(open_source(local, "train"))


@pytest.mark.parametrize("size", [None, 0])
def test_expired_credentials_name_the_shard(remote: Proxy, tmp_path: Path, size: int | None) -> None:
    source = open_source(URL, "train", settings(tmp_path, size))
    remote.troubles = [Trouble("tar", status=400, body=EXPIRED)]
    with pytest.raises(UserError, match=rf"^{URL}/train-0000\d\d.tar cannot be read: the credentials have expired"):
        one_epoch(source)


def test_what_is_no_shards_folder(remote: Proxy, tmp_path: Path) -> None:
    for url, sentence in (
        ("s3://elsewhere/x", "s3://elsewhere/x/manifest.json cannot be read: there is no such bucket; give the URL"),
        (f"s3://{BUCKET}/x", f"s3://{BUCKET}/x/manifest.json does not exist; give the URL of a folder"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_source(url, "train", settings(tmp_path))
    with pytest.raises(UserError, match=f"{URL} holds no 'test' split, only train, val"):
        open_source(URL, "test", settings(tmp_path))


def test_names_lead_to_the_object(local: Path, remote: Proxy, tmp_path: Path) -> None:
    here, away = open_source(local, "train"), open_source(URL, "train", settings(tmp_path))
    assert away.name(7) == here.name(7).replace(str(local), URL)
    assert away.identity == here.identity


def test_a_cache_too_small_is_refused(local: Path, remote: Proxy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--cache-size 9,999 is less than 4 of the shards, of up to .*; give .* or 0"):
        open_source(URL, "train", settings(tmp_path, 9999))


def test_no_room_is_no_end(
    local: Path, remote: Proxy, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else holds all of it: images come from the store one by one, and the size is kept."""
    size = 9 * shard_bytes(local)
    cache = Cache(tmp_path, size)
    download = cache.begin("others/data.tar", size)
    assert download is not None
    held = download.finish()
    away = open_source(URL, "train", settings(tmp_path, size))
    found = one_epoch(away)
    assert found == one_epoch(open_source(local, "train"))
    assert "has no room for" in capfd.readouterr().err
    tries, begin = list[str](), Cache.begin

    def count(cache: Cache, name: str, size: int) -> Any:
        tries.append(name)
        return begin(cache, name, size)

    monkeypatch.setattr(Cache, "begin", count)
    time.sleep(0.5)
    assert len(tries) < 10, "threads that look for room wake each other"
    assert cache.used() == size
    del held


FULL_DISK = """
mount -t tmpfs -o size=$2 none "$3" || exit 77
exec "$1" -c "$4" "$5" "$3" $6
"""
FILL_IT = """
import os
space = os.statvfs(sys.argv[2])
with open(sys.argv[2] + "/ballast", "wb") as file:  # somebody else's
    file.write(bytes(space.f_bavail * space.f_frsize - int(sys.argv[3])))
sys.argv[3] = "0"
order ="""


def test_a_full_disk_is_no_end(local: Path, remote: Proxy, tmp_path: Path) -> None:
    """There is room for all shards, then for eight: what was used is evicted, although the size is not reached."""
    page = os.sysconf("SC_PAGE_SIZE")
    shards = [-(-path.stat().st_size // page) * page for path in local.glob("*.tar")]
    program = READS_ALL.replace("order =", FILL_IT, 1)
    words = ["unshare", "-rm", "bash", "-c", FULL_DISK, "bash", sys.executable, str(2 * sum(shards)), str(tmp_path)]
    try:
        done = subprocess.run(
            [*words, program, URL, str(8 * max(shards))],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, **environment()},
        )
    except FileNotFoundError:
        pytest.skip("unshare, which gives a small disk, is not installed")
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"no small disk may be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == IMAGES // 5
    assert "one by one" not in done.stderr


def test_a_disk_too_small_is_refused(
    local: Path, remote: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    sentence = r"the shards take [\d.]+ kB and the disk of .* has room for 50\.0 kB; .* give --cache-size 47\.5kB or"
    with pytest.raises(UserError, match=sentence):
        open_source(URL, "train", settings(tmp_path))


def test_threads_with_nothing_to_do_sleep(remote: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = open_source(URL, "train", settings(tmp_path))
    one_epoch(away)
    looks, look = list[object](), Fetcher._next

    def count(fetcher: Fetcher) -> Any:
        looks.append(fetcher)
        return look(fetcher)

    monkeypatch.setattr(Fetcher, "_next", count)
    time.sleep(0.5)
    assert len(looks) < 10


# Runs


def test_a_run_of_windows_as_large_as_the_cache(
    local: Path, remote: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in mid-epoch and resumed with another, empty cache: it ends as a run from the disk does."""
    size = 9 * shard_bytes(local)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**TINY, "schedule": {"epochs": 2, "warmup_epochs": 0}}))
    flags = ["--config", str(recipe), "--no-model-ema", "--output_dir"]
    train(*flags, str(tmp_path / "here"), "--data-path", str(local), *WINDOW)
    away = [*flags, str(tmp_path / "away"), "--data-path", URL, "--cache-size", str(size), "--cache-dir"]
    train(*away, str(tmp_path / "one"), control=Stops("epoch 1, step 7"))
    assert "cannot hold all shards: --order window --order-window 3" in capsys.readouterr().out
    train(*away, str(tmp_path / "two"), "--resume", "auto")
    assert f"{size} in {tmp_path / 'two'}" in capsys.readouterr().out
    assert not differences(tmp_path / "here", tmp_path / "away")


def test_commands_that_take_a_url_and_that_do_not(
    remote: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["show", URL, "--count", "2", "--cache-dir", "cache", "--input-size", "32"])
    show.main()
    assert (tmp_path / "samples.png").exists()
    monkeypatch.setattr(sys, "argv", ["check", URL])
    with pytest.raises(UserError, match=f"'{URL}'; it must be a path on this machine"):
        check_data.main()


def test_soft_targets_are_for_a_disk(remote: Proxy, tmp_path: Path) -> None:
    sentence = refused("--data-path", URL, "--cache-dir", str(tmp_path), "--soft-targets", "x.npy", "--device", "cpu")
    assert sentence.startswith("--soft-targets needs the name of each of 60 images")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", None),
        ("0", 0),
        ("12", 12),
        ("1.5GB", 1_500_000_000),
        ("2 TiB", 2 << 40),
        ("3k", 3000),
        ("5MB", 5_000_000),
        ("7KB", 7000),
        ("2gb", 2_000_000_000),
        ("1,187,840", 1_187_840),
    ],
)
def test_sizes_of_the_cache(text: str, size: int | None) -> None:
    assert DataConfig(cache_size=text).cache_bytes == size


def test_a_size_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--cache-size is 'much'; give a size such as 500MB or 200GB"):
        load_config(["--data-path", URL, "--cache-size", "much"])


# The cache alone


def fill(cache: Cache, name: str, size: int = 100) -> None:
    download = cache.begin(name, size)
    assert download is not None
    os.pwrite(download.file, b"x" * size, 0)
    download.finish()


def names(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.glob("*/*")}


def test_what_was_used_the_longest_ago_is_evicted_unless_it_is_held(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 400)
    for name in "abcd":
        fill(cache, f"x/{name}")
        time.sleep(0.01)
    assert cache.hold("x/a") is not None  # and let go of: now b is the oldest
    held = cache.hold("x/c")
    fill(cache, "x/e")
    assert names(cache) == set("acde")
    fill(cache, "y/f")
    assert names(cache) == set("acef")
    fill(cache, "y/g")
    assert names(cache) == set("cefg")
    with pytest.raises(NoRoom, match="size of the cache"):
        cache.begin("x/h", 301)
    assert names(cache) == {"c"}
    assert held is not None
    assert os.pread(held.file, 3, 0) == b"xxx"
    assert cache.hold("x/a") is None


def test_what_a_killed_process_left_is_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 400)
    (cache.folder / "x").mkdir()
    (cache.folder / "x/a.part").write_bytes(b"x" * 300)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/mine.tar").write_bytes(b"x" * 300)
    fill(cache, "x/b", 200)
    assert names(cache) == {"b"}
    assert (tmp_path / "photos/mine.tar").exists()


def test_one_fetches_and_others_wait(tmp_path: Path) -> None:
    one, other = Cache(tmp_path, None), Cache(tmp_path, None)
    download = one.begin("x/a", 100)
    assert download is not None
    assert other.begin("x/a", 100) is None
    assert other.hold("x/a") is None
    held = download.finish()
    assert other.begin("x/a", 100) is None
    assert other.hold("x/a") is not None
    assert names(one) == {"a"}
    with open(one.folder / "x/a") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    del held


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--cache-dir \S+/file/x cannot be used .Not a directory.; give a folder"):
        Cache(tmp_path / "file/x", None)


# The order in which shards come


@pytest.mark.parametrize("places", [1 << 18, 7])
def test_shards_come_in_the_order_of_their_first_images(monkeypatch: pytest.MonkeyPatch, places: int) -> None:
    """However many places of an epoch are looked at together."""
    monkeypatch.setattr(fetching, "_PLACES", places)
    bounds = tuple(range(0, 25, 4))
    for order in (
        Order(24, 4, bounds=bounds, window=2),
        Order(24, 4),
        Order(24, 4, limit=3),
        Order(24, 2, repeats=3, bounds=bounds, window=2),
        Order(24, 4, detours=(Detour(0, 2, 1),)),
    ):
        timeline = Timeline(order, np.array(bounds))
        for epoch, step in ((0, 0), (0, 2), (3, order.steps - 1)):
            coming = timeline.from_here(epoch, step, 6)
            here = [i // 4 for s in range(step, order.steps) for i in order.step(epoch, s)[1]]
            following = [i // 4 for s in range(order.steps) for i in order.step(epoch + 1, s)[1]]
            wanted = list(dict.fromkeys(here))
            assert set(coming[: len(wanted)]) == set(wanted)
            assert list(dict.fromkeys([*wanted, *following]))[len(wanted) :] == coming[len(wanted) :]
            assert timeline.from_here(epoch, step, 2) == coming[:2]
    evaluation = Order(24, 5, shuffle=False, drop_last=False)
    assert Timeline(evaluation, np.array(bounds)).from_here(0, 2, 6) == [2, 3, 4, 5]


# A large index


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of any size is too large for memory."""
    monkeypatch.setattr("vimfast.shards.rows.MOST_IN_MEMORY", 1)


@pytest.mark.usefixtures("large")
def test_a_large_index_is_kept_in_the_cache(local: Path, remote: Proxy, tmp_path: Path) -> None:
    order = by_window(open_source(local, "train"))
    wanted = batches(open_source(local, "train"), 20, **order)
    remote.troubles = [Trouble("train.index.npy", 1, flip=500)]
    away = open_source(URL, "train", settings(tmp_path))
    assert_same(batches(away, 20, **order), wanted)
    assert remote.asked("train.index.npy") == 2, "what was damaged on its way is fetched again"
    assert_same(batches(open_source(URL, "train", settings(tmp_path)), 20, **order), wanted)
    assert remote.asked("train.index.npy") == 2
    cache = Cache(tmp_path, 1000)
    with pytest.raises(NoRoom):
        cache.begin("x/y", 900)
    assert list(tmp_path.rglob("train.index.npy")), "it is held while it is in use"


@pytest.mark.usefixtures("large")
def test_a_large_index_that_cannot_be_kept(local: Path, remote: Proxy, tmp_path: Path) -> None:
    remote.troubles = [Trouble("train.index.npy", flip=500)]
    with pytest.raises(UserError, match=rf"{URL}/train.index.npy is damaged: its checksum is not .*; copy it to"):
        open_source(URL, "train", settings(tmp_path))
    assert not list(tmp_path.rglob("*.part"))
    remote.troubles = []
    with pytest.raises(UserError, match=rf"has no room for the [\d,]+ bytes of {URL}/train.index.npy .the size"):
        open_source(URL, "train", settings(tmp_path, 1000))
    size = 4 * shard_bytes(local)
    with pytest.raises(UserError, match=rf"--cache-size {size:,} is less than .* and the [\d,]+ of the indexes; give"):
        open_source(URL, "train", settings(tmp_path, size))
    open_source(URL, "train", settings(tmp_path, 0)).read(np.arange(4))
    (copy,) = tmp_path.rglob("train.index.npy")
    with copy.open("r+b") as file:
        file.seek(500)
        file.write(b"\0\0\0\0\0\0")
    with pytest.raises(UserError, match=rf"{copy} is damaged: .*; delete it and run again, which fetches it again"):
        open_source(URL, "train", settings(tmp_path)).class_counts()

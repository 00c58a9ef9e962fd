"""Processes that read from a store through one cache, all at the same time: ranks of one run, and other runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from forked import WatchedFork
from loaders import make_loader
from object_servers import Proxy, Trouble, environment, proxy_to, wait_for
from remote_shards import IMAGES, IN_SHARD, URL, by_window, settings, shard_bytes
from runs import PACED, TIMEOUT, TINY, differences, start

from vimfast.checkpoint import load_checkpoint
from vimfast.data.order import Order
from vimfast.data.source import Source, open_source
from vimfast.shards.format import shard_name

TOGETHER, WINDOW = 4, 3  # images of a step of all ranks; shards
STEPS = IMAGES // TOGETHER
SECONDS = 120.0  # for what takes a few


def order_of(source: Source, rank: int = 0, world: int = 1) -> Order:
    return Order(len(source), TOGETHER // world, world=world, rank=rank, seed=3, **by_window(source, WINDOW))


def batches(source: Source, rank: int, world: int, steps: range) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Step, images and labels of a rank of a run."""
    loader = make_loader(source, order_of(source, rank, world), size=32, threads=1, prefetch=1, readahead=1)
    for step, batch in zip(steps, loader.epoch(0, steps.start), strict=False):
        yield step, batch[0], batch[1]
    loader.close()


def read_as_rank(rank: int, world: int, steps: range, cache: str, out: str) -> None:
    """In a process of its own. All ranks end a step together, as in training."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/group", rank=rank, world_size=world)
    for step, images, labels in batches(open_source(URL, "train", settings(Path(cache))), rank, world, steps):
        torch.save((images, labels), f"{out}/{step}-{rank}.tmp")
        Path(f"{out}/{step}-{rank}.tmp").rename(f"{out}/{step}-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


class Ranks:
    """The processes of a run, each with a way of its own to the store."""

    def __init__(self, ways: Sequence[Proxy], steps: range, cache: Path, out: Path) -> None:
        self._world, self._steps, self._out = len(ways), steps, out
        out.mkdir()
        self.processes = [
            WatchedFork(read_as_rank, rank, self._world, steps, str(cache), str(out), env=environment(way.url))
            for rank, way in enumerate(ways)
        ]

    def finish(self) -> None:
        for process in self.processes:
            assert process.wait(SECONDS) == 0, process.text

    def done(self) -> range:
        """The steps that all ranks have ended."""
        names = {path.name for path in self._out.glob("*.pt")}
        steps = self._steps
        left = (step for step in steps if not {f"{step}-{rank}.pt" for rank in range(self._world)} <= names)
        return range(steps.start, next(left, steps.stop))

    def assert_as_from(self, folder: Path) -> None:
        """Each rank has had the bits of the disk in these steps."""
        for rank in range(self._world):
            for step, *wanted in batches(open_source(folder, "train"), rank, self._world, self.done()):
                found = torch.load(self._out / f"{step}-{rank}.pt", weights_only=True)
                assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)), (rank, step)


def by_need(folder: Path) -> list[str]:
    """The shards, in the order in which the first of their images are needed."""
    shards = order_of(open_source(folder, "train")).drawn(0, 0, IMAGES)[1] // IN_SHARD
    return [shard_name("train", shard) for shard in dict.fromkeys(shards.tolist())]


def asked(*ways: Proxy) -> set[str]:
    """The training shards that were requested by these ways."""
    names = {path.rpartition("/")[2] for way in ways for _, path, _ in way.requests}
    return {name for name in names if name.startswith("train-")}


def met(way: Proxy) -> set[str]:
    """The shards whose requests have met a trouble that all of them meet."""
    return {trouble.name for trouble in way.troubles if trouble.times < -1}  # it counts down from there


def files(cache: Path, ending: str) -> set[str]:
    """Of shards, in a cache, without this ending of theirs."""
    return {path.name.removesuffix(ending) for path in cache.glob(f"vimfast-cache/*/*.tar{ending}")}


def test_a_rank_killed_in_mid_download_and_others_in_its_place(
    local: Path, remote: Proxy, moto: str, tmp_path: Path
) -> None:
    """Two ranks of a run, and another run beside them. One rank is killed while it fetches a shard, which the others
    then fetch, and the run with it. It is resumed on four ranks while the last shards are still to come, then on one.
    """
    need, cache = by_need(local), tmp_path / "cache"
    # Of the last, fewer than a process fetches at once: while they are held up, it has to have a thread for the late.
    early, late, last = set(need[: 2 * WINDOW + 1]), set(need[2 * WINDOW + 1 : -2]), set(need[-2:])
    met, killed, resumed = (threading.Event() for _ in range(3))
    with ExitStack() as stack:
        ways = [stack.enter_context(proxy_to(moto)) for _ in range(7)]
        for event in (met, killed, resumed):
            stack.callback(event.set)
        for way in ways:
            way.troubles = [Trouble(name, until=resumed) for name in last]
        ways[1].troubles += [Trouble(name, until=killed) for name in late]
        for way in (ways[0], ways[2]):  # until rank 1 is where it is to be killed
            way.troubles.append(Trouble("manifest.json", until=met))

        two = Ranks(ways[:2], range(STEPS), cache, tmp_path / "two")
        beside = Ranks(ways[2:3], range(STEPS), cache, tmp_path / "beside")
        wait_for(lambda: files(cache, "") >= early and late <= asked(ways[1]), SECONDS)
        met.set()
        wait_for(lambda: len(two.done()) > 0 and len(beside.done()) > 0, SECONDS)
        assert files(cache, ".part") >= late
        two.processes[1].process.send_signal(signal.SIGKILL)
        assert two.processes[1].wait(SECONDS) == -signal.SIGKILL
        assert two.processes[0].wait(SECONDS) != 0
        wait_for(lambda: files(cache, "") == early | late, SECONDS)  # the run beside them has taken over
        assert not beside.processes[0].ended

        four = Ranks(ways[3:], range(two.done().stop, STEPS - 1), cache, tmp_path / "four")
        wait_for(lambda: all(way.asked("index.npy") for way in ways[3:]), SECONDS)
        resumed.set()
        four.finish()
        beside.finish()
        one = Ranks(ways[3:4], range(STEPS - 1, STEPS), cache, tmp_path / "one")
        one.finish()
        assert asked(*ways[3:]) <= last, "what is in the cache is not fetched again"
    for ranks in (two, four, one, beside):
        ranks.assert_as_from(local)
    assert all(len(ranks.done()) > 0 for ranks in (two, four, one))
    assert beside.done() == range(STEPS)
    assert files(cache, "") == set(need)
    assert not files(cache, ".part")


def trained(folder: Path) -> int:
    """The steps of a run, as of its last checkpoint."""
    state = load_checkpoint(folder / "checkpoint.pth")
    return int(state["epoch"]) * STEPS + int(state["step"])


@pytest.mark.faults
def test_trainings_on_two_four_and_one_ranks_killed_in_mid_download(local: Path, remote: Proxy, tmp_path: Path) -> None:
    """Under torchrun, with a cache that is smaller than the data, so that every epoch downloads: the weights are those
    of the same from the disk."""
    recipe, cache = tmp_path / "recipe.yaml", tmp_path / "cache"
    recipe.write_text(yaml.safe_dump({**TINY, "schedule": {"epochs": 3, "warmup_epochs": 0}}))
    size = str(9 * shard_bytes(local))
    places = {
        "disk": ("--data-path", str(local), "--order", "window", "--order-window", str(WINDOW)),
        "store": ("--data-path", URL, "--cache-dir", str(cache), "--cache-size", size),
    }
    for name, data in places.items():
        for world, killed_in in ((2, 1), (4, 2), (1, None)):
            flags = ("--config", str(recipe), *data, "--batch-size", str(TOGETHER // world), "--no-model-ema")
            flags += ("--resume", "auto", "--output_dir", str(tmp_path / name))
            troubled = tmp_path / f"{name} {world}"
            hold = {"PAUSE": "0", "HOLD": f"{killed_in}/1 {troubled}"}
            with start(PACED, *flags, processes=world, **hold, **environment(remote.url)) as run:
                if killed_in is None:
                    assert run.wait(TIMEOUT) == 0, run.text
                    break
                run.wait_for(f"step {killed_in}/1$", TIMEOUT)
                if name == "store":
                    remote.troubles = [Trouble(shard, delay=TIMEOUT) for shard in by_need(local)]
                    troubled.touch()
                    wait_for(lambda: bool(met(remote)), SECONDS)  # if the cache has no room for a shard, by an image
                wait_for(lambda folder=tmp_path / name, steps=killed_in * STEPS: trained(folder) >= steps, SECONDS)
                run.kill()  # all of it at once: what is left of a run would save its place
                assert trained(tmp_path / name) == killed_in * STEPS
                remote.troubles = []
    assert not differences(tmp_path / "disk", tmp_path / "store")

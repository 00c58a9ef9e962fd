"""A run on two nodes, one of which is lost: network namespaces, joined by ``tools/two_nodes.sh``, with gloo on CPUs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from object_servers import wait_for
from remote_shards import small_shards
from runs import ROOT, TIMEOUT, TINY, call, differences, environment
from watch import Watched

pytestmark = pytest.mark.faults  # each starts four interpreters that import torch, and most of them twice
IMAGES, IN_SHARD = 240, 20
STEPS = IMAGES // 4  # of an epoch
STORE = "http://127.0.0.1:9417/shards"


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    """Skip where there may be none."""
    probe = f"vimfast-probe-{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("ip, of the package iproute2, is not installed")
    if made.returncode:
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
    subprocess.run(["ip", "netns", "del", probe], check=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 to train on, of 2 classes."""
    return small_shards(tmp_path_factory.mktemp("nodes"), IMAGES, IN_SHARD)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    schedule = {"epochs": 2, "warmup_epochs": 0}
    path.write_text(yaml.safe_dump({**TINY, "schedule": schedule, "run": {**TINY["run"], "log_every": 5}}))
    return str(path)


@pytest.fixture(scope="module")
def undisturbed(shards: Path, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes on one node, from the disk."""
    folder = tmp_path_factory.mktemp("undisturbed")
    call("vimfast.train", "--config", recipe, "--data-path", str(shards), "--output_dir", str(folder), processes=2)
    return folder


class Nodes(Watched):
    """The two of them, with a process each."""

    def __init__(self, data: object, *flags: str) -> None:
        self.name = f"vimfast-{os.getpid()}"
        words = [str(ROOT / "tools/two_nodes.sh"), str(data), *flags]
        env = {"NAME": self.name, "PYTHON": sys.executable, "PROCESSES": "1", "RESTARTS": "2", **environment()}
        super().__init__(words, env=env)

    def wait_for_step(self, step: int) -> None:
        """Until one of the first epoch has been reported."""
        wait_for(lambda: f"epoch 0 [{step}/{STEPS}]" in self.text or self.process.poll() is not None, TIMEOUT)
        assert self.process.poll() is None, self.text

    def cut_power(self, number: int) -> None:
        """All processes of a node at once, as a power cut does."""
        for pid in subprocess.check_output(["ip", "netns", "pids", f"{self.name}-{number}"], text=True).split():
            os.kill(int(pid), signal.SIGKILL)

    def cable(self, state: str) -> None:
        """Up or down."""
        subprocess.run(["ip", "-n", f"{self.name}-1", "link", "set", "eth-vf1", state], check=True)

    def serve(self, folder: Path, number: int) -> subprocess.Popen[bytes]:
        """A store in a node's namespace, of which the other knows nothing."""
        name = f"{self.name}-{number}"
        wait_for(Path(f"/etc/netns/{name}/hosts").exists)  # what is made last of it
        words = ["ip", "netns", "exec", name, sys.executable, str(ROOT / "tools/object_server.py"), str(folder)]
        return subprocess.Popen([*words, "--port", STORE.split(":")[2].split("/")[0]])

    def finish(self) -> None:
        """To the end of the run."""
        assert self.wait(TIMEOUT) == 0, self.text
        assert self.text.count("ended with status 0") == 2


def flags(recipe: str, folder: Path) -> tuple[str, ...]:
    return ("--config", recipe, "--output_dir", str(folder), "--save-every", "4")


@pytest.mark.parametrize("number", [0, 1])
def test_a_node_that_loses_its_power_comes_back(
    shards: Path, recipe: str, undisturbed: Path, tmp_path: Path, number: int
) -> None:
    """Node 0 is where all meet: the other cannot start again without it, and ends with the status that says so."""
    with Nodes(shards, *flags(recipe, tmp_path)) as nodes:
        nodes.wait_for_step(10)
        nodes.cut_power(number)
        nodes.finish()
    assert f"node {number} ended with status 137" in nodes.text
    assert ("node 1 ended with status 255" in nodes.text) == (number == 0)
    assert "resuming at epoch 0, step" in nodes.text
    assert not differences(tmp_path, undisturbed)


def test_a_node_that_is_cut_off_ends_and_both_come_back(
    shards: Path, recipe: str, undisturbed: Path, tmp_path: Path
) -> None:
    """A cable says nothing when it breaks; the run notices by what does not come."""
    with Nodes(shards, *flags(recipe, tmp_path), "--stall-timeout", "12") as nodes:
        nodes.wait_for_step(10)
        nodes.cable("down")
        wait_for(lambda: "no progress for" in nodes.text or "has not answered for" in nodes.text, TIMEOUT)
        nodes.cable("up")
        nodes.finish()
    assert "resuming at epoch 0, step" in nodes.text
    assert not differences(tmp_path, undisturbed)


def test_a_short_cut_is_waited_out(shards: Path, recipe: str, undisturbed: Path, tmp_path: Path) -> None:
    with Nodes(shards, *flags(recipe, tmp_path)) as nodes:
        nodes.wait_for_step(10)
        nodes.cable("down")
        assert nodes.process.poll() is None
        nodes.cable("up")
        nodes.finish()
    assert "resuming" not in nodes.text
    assert not differences(tmp_path, undisturbed)


def test_each_node_has_shards_on_a_disk_of_its_own(
    shards: Path, recipe: str, undisturbed: Path, tmp_path: Path
) -> None:
    """They come from a store, at an address that both nodes reach. One node is replaced, by one with an empty disk."""
    caches = [tmp_path / f"cache{number}" for number in (0, 1)]

    def is_filled(cache: Path) -> bool:
        return len(list(cache.rglob("train-*.tar"))) == IMAGES // IN_SHARD

    with Nodes(STORE, *flags(recipe, tmp_path / "run"), "--cache-dir", f"{tmp_path}/cache{{node}}") as nodes:
        servers = [nodes.serve(shards, number) for number in (0, 1)]
        nodes.wait_for_step(10)
        wait_for(lambda: all(map(is_filled, caches)))
        nodes.cut_power(1)
        shutil.rmtree(caches[1])
        servers.append(nodes.serve(shards, 1))
        nodes.finish()
        assert all(map(is_filled, caches))
    for server in servers:
        server.kill()
        server.wait()
    assert not differences(tmp_path / "run", undisturbed)

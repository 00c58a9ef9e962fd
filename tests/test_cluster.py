"""``vimfast prepare --engine ray``: the bytes of one machine, whatever becomes of the nodes."""

from __future__ import annotations

import builtins
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import visible, write_image
from object_servers import BUCKET, Proxy

from vimfast.errors import UserError
from vimfast.shards import cluster as clusters
from vimfast.shards.cluster import RayCluster
from vimfast.shards.convert import convert
from vimfast.shards.format import MANIFEST, ConversionOptions
from vimfast.stores import open_store

ROOT = Path(__file__).parent.parent
OPTIONS = ConversionOptions(resize=64, quality=90, shard_samples=10)
WORDS = ("--resize", "64", "--shard-samples", "10")
TIMEOUT = 180.0  # seconds for what takes a few


def test_without_ray_it_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with (
        pytest.raises(UserError, match=r"needs Ray, which is not installed; pip install 'vimfast\[ray\]'"),
        RayCluster(None, 1).opened(),
    ):
        pass


@contextmanager
def answering(answer: bytes | None) -> Iterator[str]:
    """The address of a server that says this to whoever connects, and hangs up; None: it says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                if answer is not None:
                    connection.recv(1 << 16)
                    connection.sendall(answer)
                over.wait(TIMEOUT if answer is None else 0)

        over = threading.Event()
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        over.set()


def refused(address: str) -> str:
    """What is said of the address of no cluster."""
    pytest.importorskip("ray")
    with pytest.raises(UserError, match="; give the address that ray start --head printed, ") as error:  # noqa: SIM117
        with RayCluster(address, None).opened():
            pass
    return error.value.problem


def test_an_address_where_nobody_listens_is_named_at_once() -> None:
    """It took a quarter of an hour, in silence."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert refused(address) == f"no Ray cluster can be used at {address} (Connection refused)"
        assert refused(f"ray://{address}") == f"no Ray cluster can be used at ray://{address} (Connection refused)"


def test_a_cluster_that_ray_remembers_and_that_has_ended_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took 42 s."""
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        monkeypatch.setattr("ray._private.services.find_gcs_addresses", list)  # another test's
        assert re.fullmatch(r"no Ray cluster can be used at [\d.]+:\d+ \(Connection refused\)", refused("auto"))


def test_no_cluster_to_be_found_is_said_without_advice_of_rays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", list)
    assert refused("auto") == "no Ray cluster can be used at auto (Could not find any running Ray instance)"


def test_an_address_that_stays_silent_is_named_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_PATIENCE", 0.2)
    with answering(None) as address:
        assert "it accepts a connection and says nothing for 0 s" in refused(address)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0\r\n", b""])
def test_an_address_of_something_else_is_named(answer: bytes) -> None:
    with answering(answer) as address:
        assert "something other than Ray answers there" in refused(address)


def test_a_server_of_grpc_answers_as_ray_does() -> None:
    grpc = pytest.importorskip("grpc")
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        clusters._expect_answer(f"127.0.0.1:{port}")
        clusters._expect_answer(f"ray://localhost:{port}")
    finally:
        server.stop(None)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images that take some time each."""
    root = tmp_path_factory.mktemp("large")
    for i in range(4):
        write_image(root / f"train/n{i % 2}/{i}.JPEG", i, (2000, 1500))
    for i in range(4, 200):
        os.link(root / f"train/n{i % 2}/{i % 4}.JPEG", root / f"train/n{i % 2}/{i}.JPEG")
    return root


@pytest.fixture(scope="module")
def expected(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected")
    convert(large, out, OPTIONS, workers=2)
    return visible(out)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without cores, and two nodes with one each, all on this machine."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 << 20}
    head = {"num_cpus": 0, "include_dashboard": False, **memory}
    try:
        nodes = Cluster(initialize_head=True, head_node_args=head)
        nodes.workers = [nodes.add_node(num_cpus=1, **memory) for _ in range(2)]
    except Exception as error:
        if "timed out during startup" in str(error):
            pytest.skip("this machine is too busy: Ray gives a node 30 s to start")
        raise
    nodes.wait_for_nodes()
    yield nodes
    nodes.shutdown()


def start(cluster: Any, root: object, out: str, folder: Path) -> subprocess.Popen[str]:
    """A conversion that is run in `folder`."""
    command = [sys.executable, "-m", "vimfast.prepare", str(root), "--out", out, *WORDS, "--engine", "ray"]
    command += ["--address", cluster.address]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def records(out: Path) -> int:
    return len(list(out.glob(".prepare/*.npz")))


def wait_for_records(process: subprocess.Popen[str], out: Path, count: int) -> None:
    end = time.monotonic() + TIMEOUT
    while records(out) < count:
        assert time.monotonic() < end
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.01)


@pytest.mark.faults  # Ray takes some 20 s to start and to notice a lost node
def test_a_cluster_that_loses_a_node_writes_what_one_machine_writes(
    cluster: Any, large: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(cluster, large, "out", tmp_path)
    wait_for_records(process, out, 3)
    cluster.remove_node(cluster.workers[0], allow_graceful=False)
    assert not (out / MANIFEST).exists(), "it was over before the node was lost"
    said = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 0, said
    assert "is complete: 200 train images" in said
    assert visible(out) == expected
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    again = start(cluster, large, "out", tmp_path)
    assert "is complete already" in again.communicate(timeout=TIMEOUT)[0]
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


@pytest.mark.faults
def test_a_cluster_stops_when_it_is_told_to_and_resumes(
    cluster: Any, large: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(cluster, large, "out", tmp_path)
    wait_for_records(process, out, 3)
    process.send_signal(2)
    said = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 130, said
    assert "shards are finished and stay in" in said.splitlines()[-1]
    (large / "train/n0/0.JPEG").touch()  # the same image: nothing is made again for it
    process = start(cluster, large, "out", tmp_path)
    assert "is complete: 200 train images" in process.communicate(timeout=TIMEOUT)[0]
    assert visible(out) == expected


@pytest.mark.faults
def test_nodes_need_to_share_nothing_but_a_store(
    s3: Proxy, request: pytest.FixtureRequest, large: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Images come from it, too. The nodes have the environment that they are started with."""
    url = f"s3://{BUCKET}/{tmp_path.name}"
    images, shards = open_store(f"{url}/images"), open_store(f"{url}/shards")
    for path in large.rglob("*.JPEG"):
        images.put(str(path.relative_to(large)), path)
    cluster = request.getfixturevalue("cluster")
    process = start(cluster, f"{url}/images", f"{url}/shards", tmp_path)
    said = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 0, said
    copy = tmp_path / "copy"
    copy.mkdir()
    for entry in shards.entries():
        if "/" not in entry.name:
            (copy / entry.name).write_bytes(shards.read(entry.name))
    assert visible(copy) == expected


@pytest.mark.faults
def test_what_a_task_says_is_said_here(cluster: Any, tmp_path: Path) -> None:
    write_image(tmp_path / "root/train/n0/0.JPEG", 0)
    (tmp_path / "root/train/n0/1.JPEG").write_bytes(b"no image")
    process = start(cluster, tmp_path / "root", "out", tmp_path)
    said = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 2, said
    assert "1.JPEG: " in said
    assert said.splitlines()[-1].startswith("error: 1 of 2 images cannot be read, listed above; ")
    assert "Traceback" not in said

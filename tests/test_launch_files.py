"""The launch files of recipes/launch: what they start, and the statuses by which schedulers start it again."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError
from torch.distributed.run import get_args_parser

from vimfast.config import load_config

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "recipes" / "launch"

# In place of python: notes what torchrun.py was started with, and ends with status 1 on SIGTERM, as torchrun does.
PYTHON = """#!/bin/bash
[ "${1##*/}" = torchrun.py ] && [ -f "$1" ] || exit 66
shift
printf '%s\\n' "$@" > "$NOTES/torchrun"
[ "$HOLD" = yes ] || exit "$STATUS"
trap 'sleep 0.1; exit 1' TERM
touch "$NOTES/ready"
while true; do sleep 0.02; done
"""
# In place of srun: runs the command here, once, and passes SIGTERM on.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'host0\\nhost1\\n'; else echo "$@" >> "$NOTES/scontrol"; fi
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With programs of a cluster that there is not."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("python", PYTHON), ("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NAME": "vim-tiny",
        "SLURM_JOB_NODELIST": "host[0-1]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "64",
        "USER": "me",
    }
    return {
        **os.environ,
        **slurm,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "NOTES": str(tmp_path),
        "HOLD": "no",
        "STATUS": "0",
    }


def started_with(tmp_path: Path) -> tuple[Any, Any]:
    """torchrun's flags and the trainer's settings, each parsed by its own parser."""
    words = (tmp_path / "torchrun").read_text().splitlines()
    flags = get_args_parser().parse_args(words)
    at = words.index("-m")
    assert words[at + 1] == "vimfast.train"
    return flags, load_config(words[at + 2 :])


def stopped(command: list[str], environment: dict[str, str], tmp_path: Path, number: int) -> int:
    """The status after a signal in the middle of the run."""
    process = subprocess.Popen(command, env={**environment, "HOLD": "yes"}, cwd=ROOT)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        return process.wait(timeout=60)
    finally:
        process.kill()


@pytest.mark.parametrize("name", ["node.sh", "slurm.sh"])
def test_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


@pytest.mark.parametrize("status", [0, 1])
def test_a_node_ends_as_torchrun_does(environment: dict[str, str], tmp_path: Path, status: int) -> None:
    command = ["bash", str(LAUNCH / "node.sh"), "--config", "debug", "--data-path", "my shards", "--output_dir", "runs"]
    nodes = {"NODES": "3", "RENDEZVOUS": "host0:1234", "JOB": "job-1", "GPUS": "4", "STATUS": str(status)}
    assert subprocess.run(command, env={**environment, **nodes}, check=False).returncode == status
    flags, config = started_with(tmp_path)
    assert (flags.nnodes, flags.nproc_per_node, flags.rdzv_id, flags.max_restarts) == ("3", "4", "job-1", 3)
    assert (flags.rdzv_backend, flags.rdzv_endpoint) == ("c10d", "host0:1234")
    assert (config.data.data_path, config.run.output_dir, config.run.resume) == ("my shards", "runs", "auto")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_node_that_was_stopped_says_that_it_is_to_be_started_again(
    environment: dict[str, str], tmp_path: Path, number: int, status: int
) -> None:
    """Torchrun itself says 1, as for bad input."""
    assert stopped(["bash", str(LAUNCH / "node.sh")], environment, tmp_path, number) == status


def test_scripts_start_as_their_first_lines_say() -> None:
    for name in ("node.sh", "slurm.sh"):
        assert os.access(LAUNCH / name, os.X_OK), name


def failed(*statuses: int) -> ChildFailedError:
    """What torchrun ends with when its processes have."""
    failures = {rank: ProcessFailure(rank, 17, status, "") for rank, status in enumerate(statuses)}
    return ChildFailedError("vimfast.train", failures)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RendezvousConnectionError("The connection to the C10d store has failed."), 255),
        (RendezvousTimeoutError(), 255),
        (failed(143, 143), 143),
        (failed(75, 75), 143),
    ],
)
def test_torchrun_says_what_to_start_again(monkeypatch: pytest.MonkeyPatch, error: Exception, status: int) -> None:
    """Kubernetes does so from 128 on; SLURM starts a job with a lost node again by itself."""

    def main() -> None:
        raise error

    monkeypatch.setattr("torch.distributed.run.main", main)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(LAUNCH / "torchrun.py"))
    assert ended.value.code == status


@pytest.mark.parametrize("error", [failed(2, 3), failed(-9), SignalException("SIGTERM", signal.SIGTERM)])
def test_torchrun_ends_as_ever_where_another_start_would_fail_too(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def main() -> None:
        raise error

    monkeypatch.setattr("torch.distributed.run.main", main)
    with pytest.raises(type(error)):
        runpy.run_path(str(LAUNCH / "torchrun.py"))


@pytest.mark.parametrize("status", [0, 1, 2, 255])
def test_a_job_that_ends_by_itself_is_not_requeued(environment: dict[str, str], tmp_path: Path, status: int) -> None:
    command = ["bash", str(LAUNCH / "slurm.sh")]
    assert subprocess.run(command, env={**environment, "STATUS": str(status)}, cwd=ROOT).returncode == status
    assert not (tmp_path / "scontrol").exists()
    flags, config = started_with(tmp_path)
    assert (flags.nnodes, flags.rdzv_id, flags.rdzv_endpoint) == ("2", "17-0", "host0:29500")
    assert (config.data.data_path, config.data.cache_dir) == ("s3://bucket/shards", "/tmp/vimfast-me")
    assert config.run.output_dir.endswith("/runs/vim-tiny")


@pytest.mark.parametrize("number", [143, 75])
def test_a_job_whose_nodes_saved_their_place_is_requeued(
    environment: dict[str, str], tmp_path: Path, number: int
) -> None:
    assert (
        subprocess.run(
            ["bash", str(LAUNCH / "slurm.sh")], env={**environment, "STATUS": str(number)}, cwd=ROOT
        ).returncode
        == number
    )
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"


def test_slurm_is_asked_for_what_the_script_relies_on() -> None:
    """The signal goes to the nodes, not to the script, long enough before the end; the job may be requeued."""
    words = [
        word
        for line in (LAUNCH / "slurm.sh").read_text().splitlines()
        if line.startswith("#SBATCH")
        for word in line.split()[1:]
    ]
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    assert flags["signal"] == "TERM@180"
    assert {"requeue", "open-mode"} <= flags.keys()
    assert (flags["ntasks-per-node"], flags["nodes"]) == ("1", "2")


def test_the_kubernetes_job_is_one_that_its_operator_takes(environment: dict[str, str], tmp_path: Path) -> None:
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    name, replicas = job["metadata"]["name"], job["spec"]["pytorchReplicaSpecs"]
    assert replicas.keys() == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    nodes = sum(replica["replicas"] for replica in replicas.values())
    for replica in replicas.values():
        assert replica["restartPolicy"] == "ExitCode"
        pod = replica["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] >= 60
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert all("mountPath" in mount for mount in container["volumeMounts"])
        given = {entry["name"]: entry["value"] for entry in container["env"]}
        assert (given["NODES"], given["RENDEZVOUS"]) == (str(nodes), f"{name}-master-0:29500")
        command = [*container["command"], *container["args"]]
        assert subprocess.run(command, env={**environment, **given}, cwd=ROOT, check=False).returncode == 0
        flags, config = started_with(tmp_path)
        assert (flags.nnodes, flags.rdzv_id) == (given["NODES"], given["JOB"])
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert config.data.cache_dir in mounts
        assert str(Path(config.run.output_dir).parent) in mounts


def test_scripts_pass_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [LAUNCH / "node.sh", LAUNCH / "slurm.sh", ROOT / "tools/two_nodes.sh"]
    done = subprocess.run(["shellcheck", "--severity=warning", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_pods_are_valid_ones() -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate, with 22 MB, is not installed")
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    for name, replica in job["spec"]["pytorchReplicaSpecs"].items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name.lower()}, **replica["template"]}
        schemas.validate(pod, "1.32", strict=True)

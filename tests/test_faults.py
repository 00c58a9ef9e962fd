"""The long half of what is tested about faults: random moments, every stage, disks that fill. ``make test-faults``.

What is random follows from ``FAULTS_SEED``, which is reported at the end of the tests; moments in time also from how
busy the machine is.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from conftest import visible, write_image
from runs import ROOT, TIMEOUT, TINY, differences, environment, records, start
from watch import Watched

from vimfast.checks import checking
from vimfast.checks.findings import CheckOptions
from vimfast.data.source import open_source
from vimfast.errors import UserError
from vimfast.shards.format import MANIFEST

pytestmark = pytest.mark.faults
KILLS = 25


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Of each test its own, whichever tests run."""
    return random.Random(f"{os.environ['FAULTS_SEED']} {request.node.name}")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 images to train on and 40 to validate, of 20 classes."""
    root = tmp_path_factory.mktemp("images")
    for i in range(40):
        write_image(root / f"val/c{i % 20:02d}/{i}.JPEG", i, (100 + i, 90))
    for i in range(2000):
        path = root / f"train/c{i % 20:02d}/{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(root / f"val/c{i % 20:02d}/{i % 20}.JPEG", path)
    return root


def convert(root: Path, out: Path, *flags: str, program: str = "vimfast.prepare", **env: str) -> Watched:
    """A conversion into many small shards."""
    words = [str(root), "--out", str(out), "--resize", "64", "--shard-samples", "100", "--workers", "2", *flags]
    return start(program, *words, fresh=True, **env)


def finish(root: Path, out: Path, *flags: str) -> float:
    """Run the conversion to its end; returns the seconds that it took."""
    with convert(root, out, *flags) as run:
        assert run.wait(TIMEOUT) == 0, run.text
        assert run.ended is not None
        return run.ended - run.begin


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    finish(images, out)
    return out


def assert_refused_or_whole(out: Path, undisturbed: Path) -> None:
    """What is left of a conversion can be trained on only if it is complete."""
    if (out / MANIFEST).exists():
        assert visible(out) == visible(undisturbed)
    else:
        with pytest.raises(UserError):
            open_source(out, "train")


def assert_same(out: Path, undisturbed: Path) -> None:
    assert visible(out) == visible(undisturbed)
    assert not list(out.rglob("*.tmp"))


# Conversions


def test_conversions_killed_at_random(images: Path, undisturbed: Path, tmp_path: Path, chance: random.Random) -> None:
    """The program alone or with its workers; the next run continues at once, whatever workers are left."""
    full = finish(images, tmp_path / "timed")
    kills = 0
    for attempt in range(10 * KILLS):
        out = tmp_path / f"out{attempt}"
        while kills < KILLS:
            with convert(images, out) as run:
                time.sleep(chance.uniform(0.1, 1.1) * full)
                if run.process.poll() is not None:
                    break
                (os.killpg if chance.random() < 0.5 else os.kill)(run.process.pid, signal.SIGKILL)
                run.wait(TIMEOUT)
                kills += 1
                assert not run.gone_within(10)
            assert_refused_or_whole(out, undisturbed)
        finish(images, out)
        assert_same(out, undisturbed)
        if kills == KILLS:
            return
    pytest.fail(f"only {kills} runs were killed before they ended")


def test_conversions_killed_at_every_stage(images: Path, tmp_path: Path) -> None:
    """Before each renaming, removal and wait for the disk."""
    root = tmp_path / "few"
    for i in range(30):
        (root / f"train/c{i % 3}").mkdir(parents=True, exist_ok=True)
        os.link(images / f"train/c{i % 20:02d}/{i}.JPEG", root / f"train/c{i % 3}/{i}.JPEG")
    flags = ("--shard-samples", "15", "--workers", "1")
    dying = str(ROOT / "tests" / "dying_prepare.py")
    finish(root, tmp_path / "undisturbed", *flags)
    for stage in range(1, 200):
        out, counter = tmp_path / f"out{stage}", tmp_path / f"operations{stage}"
        with convert(root, out, *flags, program=dying, OPERATIONS=str(counter), DIE_AT=str(stage)) as run:
            status = run.wait(TIMEOUT)
        if status == 0:
            break
        assert status == -signal.SIGKILL, run.text
        assert_refused_or_whole(out, tmp_path / "undisturbed")
        finish(root, out, *flags)
        assert_same(out, tmp_path / "undisturbed")
        shutil.rmtree(out)
    assert stage > 20
    assert_same(out, tmp_path / "undisturbed")


def to_program(run: Watched, number: int) -> None:
    run.process.send_signal(number)


def to_group(run: Watched, number: int) -> None:
    os.killpg(run.process.pid, number)


def to_a_worker(run: Watched, number: int) -> None:
    workers = [pid for pid in run.processes() if pid != run.process.pid]
    for pid in workers[-1:]:  # the last is no helper of multiprocessing's
        os.kill(pid, number)


@pytest.mark.parametrize("to", [to_program, to_group, to_a_worker])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_signals_to_conversions(
    images: Path,
    undisturbed: Path,
    tmp_path: Path,
    chance: random.Random,
    to: Callable[[Watched, int], None],
    name: str,
) -> None:
    """Nothing is left running, and what there is can be continued."""
    for attempt in range(2):
        out = tmp_path / str(attempt)
        with convert(images, out) as run:
            end = time.monotonic() + TIMEOUT
            while not list(out.glob("*.tar")) and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
            to(run, getattr(signal, name))
            status = run.wait(TIMEOUT)
            assert not run.gone_within(10)
        assert "Traceback" not in run.out
        if status == 0:  # too late, or a worker's own business
            assert_same(out, undisturbed)
        else:
            assert_refused_or_whole(out, undisturbed)
            finish(images, out)
            assert_same(out, undisturbed)


def test_a_worker_that_is_stopped_and_continued(images: Path, undisturbed: Path, tmp_path: Path) -> None:
    with convert(images, tmp_path / "out") as run:
        end = time.monotonic() + TIMEOUT
        while not list(tmp_path.glob("out/*.tar")) and time.monotonic() < end:
            time.sleep(0.01)
        to_a_worker(run, signal.SIGSTOP)
        time.sleep(2)
        to_a_worker(run, signal.SIGCONT)
        assert run.wait(TIMEOUT) == 0, run.text
    assert_same(tmp_path / "out", undisturbed)


def test_several_conversions_at_once(images: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Into one folder: one of them does it, and the others say so."""
    out = tmp_path / "out"
    runs = [convert(images, out) for _ in range(4)]
    statuses = sorted(run.wait(TIMEOUT) for run in runs)
    assert statuses[0] == 0
    for run in runs:
        assert run.process.returncode == 0 or "another vimfast-prepare is writing to" in run.err, run.text
    assert_same(out, undisturbed)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "zeros", "longer"])
def test_any_file_damaged_at_random_is_made_again(
    images: Path, undisturbed: Path, tmp_path: Path, chance: random.Random, damage: str
) -> None:
    """Manifest, indexes, tars, records and plan; what the trainer or check_data makes of it is a sentence."""
    for attempt in range(8):
        out = Path(shutil.copytree(undisturbed, tmp_path / str(attempt)))
        files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != "lock")
        tars = [path for path in files if path.suffix == ".tar"]
        path = chance.choice(tars if attempt < 2 else [path for path in files if path not in tars[3:]])
        data = bytearray(path.read_bytes())
        at = chance.randrange(len(data))
        if damage == "flip":
            data[at] ^= 1 << chance.randrange(8)
        elif damage == "cut":
            del data[at:]
        elif damage == "empty":
            data.clear()
        elif damage == "zeros":
            data[at:] = bytes(len(data) - at)
        else:
            data += bytes(at)
        path.unlink() if damage == "gone" else path.write_bytes(data)
        what = f"{damage} of {path.relative_to(out)} at byte {at} of {len(data)}"
        with suppress(UserError):
            source = open_source(out, "train")
            source.read(source.labels[:0].astype(int))
        shown = checking.check(out, CheckOptions())
        noticed = not shown.fit or path.parent != out
        with convert(images, out) as run:
            status = run.wait(TIMEOUT)
        if status == 2 and path.name in ("plan.json", MANIFEST) and "--overwrite" in run.err:
            continue  # nothing says any more what these shards are of
        assert status == 0, what + run.text
        assert "Traceback" not in run.text, what
        assert visible(out) == visible(undisturbed), what
        assert noticed or "is complete already" in run.out, what
        shutil.rmtree(out)


# Disks that fill

SMALL_DISK = """
mount -t tmpfs -o size="$1" none "$2" || exit 77
shift 2
exec "$@"
"""
ON_SMALL_DISK = '''
import os, subprocess, sys
from pathlib import Path
disk, ballast, *words, target = sys.argv[1:]
prepare = """
from vimfast.prepare import main
from vimfast.shards import convert
convert._check_space = lambda *args: None  # it would refuse at once, and disks are mostly filled by somebody else
main()
"""
with open(f"{disk}/ballast", "wb") as file:
    file.write(bytes(int(ballast)))
command = [sys.executable, "-c", prepare, *words, "--out", f"{disk}/out"]
done = subprocess.run(command, capture_output=True, text=True)
assert done.returncode == 2, done.stdout + done.stderr
print(done.stderr.splitlines()[-1])
assert "Traceback" not in done.stderr, done.stderr
assert not (Path(disk) / "out/manifest.json").exists()
assert not list(Path(disk).rglob("*.tmp")), list(Path(disk).rglob("*.tmp"))
os.remove(f"{disk}/ballast")
subprocess.run(command, check=True, capture_output=True)
subprocess.run(["cp", "-r", f"{disk}/out", target], check=True)
'''


def small_disk(size: int, folder: Path, *command: str) -> str:
    """Run a command beside a disk of so many bytes at `folder`; what it prints."""
    folder.mkdir()
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, "sh", str(size), str(folder)]
    env = {**os.environ, **environment()}
    try:
        done = subprocess.run([*words, *command], capture_output=True, text=True, env=env, check=False)
    except FileNotFoundError:
        pytest.skip("unshare, which gives a small disk, is not installed")
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"no small disk may be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_conversions_onto_a_disk_that_fills(
    images: Path, undisturbed: Path, tmp_path: Path, chance: random.Random
) -> None:
    """At any moment, down to the manifest: one sentence, and the rest once there is space."""
    page = os.sysconf("SC_PAGE_SIZE")
    needed = sum(-(-path.stat().st_size // page) * page for path in undisturbed.rglob("*") if path.is_file())
    size = 2 * needed + (4 << 20)
    lacking = [page, 3 * page, 8 * page, *(chance.randrange(page, needed) for _ in range(7))]
    for attempt, lack in enumerate(lacking):
        words = [str(images), "--resize", "64", "--shard-samples", "100", "--workers", "2"]
        disk, out = tmp_path / f"disk{attempt}", tmp_path / f"out{attempt}"
        script = [sys.executable, "-c", ON_SMALL_DISK, str(disk), str(size - needed + lack), *words, str(out)]
        said = small_disk(size, disk, *script)
        assert "No space left on device" in said, said
        assert_same(out, undisturbed)


# Trainings

RECIPE = {
    **TINY,
    "data": {"batch_size": 8, "num_workers": 1},
    "schedule": {"epochs": 6, "warmup_epochs": 0},
    "run": {"device": "cpu", "log_every": 10, "save_every": 7},
}


@pytest.fixture(scope="module")
def flags(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    shards = ("--data-path", str(undisturbed))
    return ("--config", str(recipe), *shards, "--eval-steps", "2", "--resume", "auto", "--output_dir")


def test_trainings_killed_at_random(flags: tuple[str, ...], tmp_path: Path, chance: random.Random) -> None:
    """A tenth of them before the first step, the others within what a seventh of the run takes from there."""
    with start("vimfast.train", *flags, str(tmp_path / "undisturbed"), fresh=True) as run:
        first = run.wait_for("^first step", TIMEOUT)
        begun = next(line.at for line in run.lines if line.text.startswith(first[0]))
        assert run.wait(TIMEOUT) == 0, run.text
        assert run.ended is not None
        start_up, stretch = begun - run.begin, (run.ended - begun) / 7
    kills = 0
    for attempt in range(10 * KILLS):
        folder = tmp_path / str(attempt)
        status: int | None = None
        while status is None:
            with start("vimfast.train", *flags, str(folder), fresh=True) as run:
                if kills < KILLS:
                    if chance.random() < 0.1:
                        time.sleep(chance.uniform(0, start_up))
                    else:
                        with suppress(RuntimeError):
                            run.wait_for("^first step", TIMEOUT)
                        time.sleep(chance.uniform(0, stretch))
                    if run.process.poll() is None:
                        run.process.send_signal(signal.SIGKILL)
                        run.wait(TIMEOUT)
                        kills += 1
                        continue
                status = run.wait(TIMEOUT)
                assert status == 0, run.text
        assert differences(folder, tmp_path / "undisturbed") == []
        assert records(folder) == records(tmp_path / "undisturbed")
        if kills == KILLS:
            return
    pytest.fail(f"only {kills} runs were killed before they ended")


TRAINS_ON_SMALL_DISK = """
import os, subprocess, sys
disk, target, *words = sys.argv[1:]
command = [sys.executable, "-m", "vimfast.train", *words, f"{disk}/run"]
done = subprocess.run(command, capture_output=True, text=True)
print(done.stdout + done.stderr)
assert "Traceback" not in done.stderr, done.stderr
assert done.returncode == 2, done.returncode
subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
subprocess.run(command, check=True, capture_output=True)
subprocess.run(["cp", "-r", f"{disk}/run", target], check=True)
"""


def test_trainings_onto_a_disk_that_fills(flags: tuple[str, ...], tmp_path: Path, chance: random.Random) -> None:
    """It ends with one sentence, whatever there was space for; with more of it, it is resumed to the same bits."""
    flags = ("--epochs", "2", "--steps-per-epoch", "25", *flags)
    with start("vimfast.train", *flags, str(tmp_path / "undisturbed"), fresh=True) as run:
        assert run.wait(TIMEOUT) == 0, run.text
    held = sum(path.stat().st_size for path in (tmp_path / "undisturbed").rglob("*") if path.is_file())
    for attempt in range(5):
        disk, target = tmp_path / f"disk{attempt}", tmp_path / f"run{attempt}"
        size = chance.randrange(8 << 10, int(0.9 * held))
        said = small_disk(size, disk, sys.executable, "-c", TRAINS_ON_SMALL_DISK, str(disk), str(target), *flags)
        assert "No space left on device" in said, said
        assert differences(target, tmp_path / "undisturbed") == []


# Whatever bytes there are


@pytest.mark.parametrize("target", ["manifest", "index", "tar", "header", "record", "checkpoint"])
def test_no_input_that_a_fuzzer_finds_is_a_traceback(target: str, tmp_path: Path) -> None:
    """Twenty seconds each; ``tools/fuzz.py`` by itself looks for as long as one likes."""
    pytest.importorskip("atheris", reason="atheris is not installed; Hypothesis does its part in make test")
    words = [str(ROOT / "tools" / "fuzz.py"), target, "--seconds", "20", "--seed", "1", "--found", str(tmp_path)]
    env = {**os.environ, **environment()}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    assert not list(tmp_path.iterdir())

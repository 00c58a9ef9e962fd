"""The wheel holds the whole tree and works away from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import vimfast

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # a copy, so that building leaves nothing in the checkout
    source.mkdir()
    names = ("pyproject.toml", "README.md", "LICENSE", "configs", "vimfast", "kernels")
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(source)], check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_every_module(wheel: Path) -> None:
    tree = {str(p.relative_to(ROOT)) for p in (ROOT / "vimfast").rglob("*.py")}
    tree |= {str(p.relative_to(ROOT / "kernels")) for p in (ROOT / "kernels").rglob("*.py")}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    assert packed == tree


def test_wheel_holds_every_template(wheel: Path) -> None:
    tree = {str(p.relative_to(ROOT)) for kind in ("html", "css") for p in (ROOT / "vimfast").rglob(f"*.{kind}")}
    assert len(tree) >= 5
    assert tree <= set(zipfile.ZipFile(wheel).namelist())


def test_wheel_says_that_it_is_typed(wheel: Path) -> None:
    assert {"vimfast/py.typed", "vimfast/__init__.pyi", "vimfast_kernels/py.typed"} <= set(
        zipfile.ZipFile(wheel).namelist()
    )


def test_a_recipe_loads_by_name_where_only_the_wheel_is(wheel: Path, tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(site)
    folder.mkdir()
    code = (
        "from vimfast.config import load_config, recipes\n"
        "print(*recipes())\n"
        "print(load_config(['--config', 'vim_small']).model.model)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    ran = [sys.executable, "-c", code]
    names, model = subprocess.check_output(ran, cwd=folder, env=environment, text=True).splitlines()
    assert names.split() == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert model == "vim_small_patch16_224"


def test_installed_elsewhere_it_runs(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        return done.stdout

    code = "import vimfast, vimfast_kernels; print(vimfast.__file__, vimfast_kernels.__file__)"
    assert [p.startswith(str(site)) for p in run(sys.executable, "-c", code).split()] == [True, True]
    assert "--resize" in run(str(site / "bin" / "vimfast-prepare"), "--help")
    assert "--data-path" in run(sys.executable, "-m", "vimfast.train", "--help")


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = (ROOT / "CHANGELOG.md").read_text()
    first, latest = re.findall(r"^## (.*)$", changes, re.MULTILINE)[:2]
    assert first == "Unreleased"
    assert latest == f"{vimfast.__version__} ({citation['date-released']})"
    assert citation["version"] == vimfast.__version__


def test_the_table_of_versions_names_what_is_pinned_and_installed() -> None:
    """docs/kernels.md says what the kernels were seen to work with: this environment has to be in it."""
    rows = set(re.findall(r"^\| (\d+\.\d+) \| (\d+\.\d+) \|", (ROOT / "docs" / "kernels.md").read_text(), re.MULTILINE))
    pins = dict(re.findall(r"^(torch|triton)==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert (pins["torch"], pins["triton"]) in rows
    installed = tuple(".".join(version(name).split(".")[:2]) for name in ("torch", "triton"))
    assert installed in rows

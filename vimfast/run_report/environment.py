"""What a run ran on: versions of packages, and the commit of code that lies in a checkout."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import vimfast

_PACKAGES = ("torch", "triton", "timm", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "mamba-ssm")
_MORE = ("numpy", "pillow")
_SECONDS = 20.0  # that git may take on a slow disk


def software() -> list[tuple[str, str]]:
    """(what, which) of what is installed here and of the code that runs."""
    own, started_in = git_state(Path(vimfast.__file__)), git_state(Path.cwd())
    rows = [("vimfast", " · ".join(filter(None, [vimfast.__version__, own])))]
    if started_in and started_in != own:
        rows.append(("working folder", started_in))
    rows += [("Python", platform.python_version())]
    rows += [(name, version) for name in (*_PACKAGES, *_MORE) if (version := _version(name))]
    return [*rows, ("system", platform.platform())]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def git_state(path: Path) -> str:
    """The commit and branch of a file or folder in a git checkout, and how many files differ from that commit.

    Returns:
        such as ``"commit 1f3a5b7 of main, 2 files changed"``; empty where it is not part of a checkout.
    """
    folder = path if path.is_dir() else path.parent
    if not _git(folder, "ls-files", "--error-unmatch", *([] if path.is_dir() else ["--", path.name])):
        return ""  # installed below somebody's checkout, and not a part of it
    commit, branch = _git(folder, "rev-parse", "--short=10", "HEAD"), _git(folder, "branch", "--show-current")
    if not commit:
        return ""
    changed = len(_git(folder, "status", "--porcelain", "--untracked-files=no").splitlines())
    changes = f"{changed} file{'s' * (changed != 1)} changed" if changed else "unchanged"
    return f"commit {commit}{branch and f' of {branch}'}, {changes}"


def _git(folder: Path, *words: str) -> str:
    """What git says; empty where it does not answer."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

"""The house stays a house: imports go downwards only, and the heavy ones stay in their rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    ("vimfast_kernels", "vimfast.errors", "vimfast.files", "vimfast.hub"),
    ("vimfast.cli", "vimfast.original"),
    ("vimfast.config", "vimfast.affinity", *(f"vimfast.shards.{m}" for m in ("format", "jpeg", "tree"))),
    (
        *(
            "vimfast.dist",
            "vimfast.optim",
            "vimfast.gradients",
            "vimfast.checkpoint",
            "vimfast.models.mixer",
            "vimfast.models.pos_embed",
            "vimfast.models.hub",
        ),
        *(f"vimfast.data.{m}" for m in ("source", "sampler", "augment", "pipeline", "mixup", "randaugment")),
        "vimfast.data.hardware",
        "vimfast.shards.plan",
    ),
    (
        "vimfast.step",
        "vimfast.models.embedding",
        "vimfast.data.erasing",
        "vimfast.data.exchange",
        "vimfast.data.reader",
        "vimfast.shards.writer",
    ),
    ("vimfast.data.recipe", "vimfast.models.timm_api", "vimfast.shards.workers"),
    (
        "vimfast.metrics",
        "vimfast.control",
        "vimfast.finetune",
        "vimfast.data.loader",
        "vimfast.models.vision_mamba",
        "vimfast.shards.convert",
    ),
    ("vimfast.models.registry",),
    ("vimfast.models",),
    ("vimfast.evaluate", "vimfast.losses", "vimfast.checks"),
    ("vimfast.trainer",),
    ("vimfast.train", "vimfast.check_data", "vimfast.prepare"),
)
PACKAGES = ("vimfast_kernels.", "vimfast.checks.")  # one floor for all that is in them
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    found = {}
    for base in (ROOT, ROOT / "kernels"):
        for path in sorted(base.glob("vimfast*/**/*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path
    return found


def floor(name: str) -> int | None:
    while name:
        if name in FLOOR:
            return FLOOR[name]
        name = name.rpartition(".")[0] if name.startswith(PACKAGES) else ""
    return None


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_go_downwards() -> None:
    for name, path in modules().items():
        if name in ("vimfast", "vimfast.data", "vimfast.shards"):
            continue
        own = floor(name)
        assert own is not None, f"{name} stands on no floor; give it one in {__file__}"
        for other in imports(path):
            level = floor(other)
            if level is None or any(f"{name}.".startswith(p) and f"{other}.".startswith(p) for p in PACKAGES):
                continue
            assert level < own, f"{name} imports {other}, which is not below it"


def test_no_import_circle_in_the_kernels() -> None:
    """They share a floor. Imports inside functions count too."""
    found = {name: imports(path) for name, path in modules().items() if name.startswith("vimfast_kernels.")}
    found.pop("vimfast_kernels.augment")  # imports both modules that carry out its plans, and they import it
    TopologicalSorter({name: others & found.keys() for name, others in found.items()}).prepare()


def test_data_and_models_do_not_know_each_other() -> None:
    for name, path in modules().items():
        for mine, theirs in (("vimfast.data", "vimfast.models"), ("vimfast.models", "vimfast.data")):
            if name.startswith(mine):
                assert not [n for n in imports(path) if n.startswith(theirs)], name


def test_only_the_pipeline_imports_dali() -> None:
    importers = {name for name, path in modules().items() if any(n.startswith("nvidia") for n in imports(path))}
    assert importers == {"vimfast.data.pipeline"}


@pytest.mark.parametrize("module", ["vimfast", "vimfast.config", "vimfast.prepare"])
def test_light_modules_stay_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'nvidia.dali', 'timm') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"

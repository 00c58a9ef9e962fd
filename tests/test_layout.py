"""The house stays a house: imports go downwards only, and the heavy ones stay in their rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vimfast
from vimfast.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
FLOORS = (
    (
        *("vimfast_kernels", "vimfast.errors", "vimfast.files", "vimfast.image_size", "vimfast.limits"),
        *("vimfast.augment.draws", "vimfast.augment.plan", "vimfast.config.choices"),
    ),
    (
        *("vimfast.cli", "vimfast.class_names", "vimfast.pages", "vimfast.sheet", "vimfast.stores"),
        *("vimfast.augment.crops", "vimfast.augment.randaugment"),  # crops and policies check themselves
    ),
    ("vimfast.config", "vimfast.affinity", "vimfast.shards"),
    (
        "vimfast.augment",
        "vimfast.models",
        "vimfast.dist",
        "vimfast.checkpoint",
        "vimfast.formats",
        "vimfast.run_report",
    ),
    ("vimfast.data", "vimfast.processes"),
    ("vimfast.train", "vimfast.doctor"),
    ("vimfast.inference", "vimfast.samples", "vimfast.speed"),
    ("vimfast.checks", "vimfast.exporting"),
    ("vimfast.check_data", "vimfast.export", "vimfast.prepare", "vimfast.timm", "vimfast.commands"),
    ("vimfast.__main__",),
)
EXPORTED = {f"vimfast.{name}" for name in vimfast.__all__ if name != "__version__"}  # for other people's code
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    found = {}
    for base in (ROOT, ROOT / "kernels"):
        for path in sorted(base.glob("vimfast*/**/*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path
    return found


def room(name: str) -> str:
    """The entry of FLOORS that a module belongs to."""
    while name and name not in FLOOR:
        name = name.rpartition(".")[0]
    return name


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
    """From room to room; inside a room, only circles are forbidden."""
    for name, path in modules().items():
        if name == "vimfast":
            continue
        own = room(name)
        assert own, f"{name} stands on no floor; give it one in {__file__}"
        for other in imports(path):
            assert other not in EXPORTED, f"{name} imports {other}; import it from the room that has it"
            theirs = room(other)
            if theirs and theirs != own:
                assert FLOOR[theirs] < FLOOR[own], f"{name} imports {other}, which is not below it"


def test_no_import_circle() -> None:
    """Imports inside functions count too."""
    found = {name: imports(path) - {name} for name, path in modules().items()}
    TopologicalSorter({name: others & found.keys() for name, others in found.items()}).prepare()


def test_data_and_models_do_not_know_each_other() -> None:
    for name, path in modules().items():
        for mine, theirs in (("vimfast.data", "vimfast.models"), ("vimfast.models", "vimfast.data")):
            if name.startswith(mine):
                assert not [n for n in imports(path) if n.startswith(theirs)], name


def test_only_one_module_imports_dali() -> None:
    importers = {name for name, path in modules().items() if any(n.startswith("nvidia") for n in imports(path))}
    assert importers == {"vimfast.data.decoding"}


def test_only_one_room_imports_llvm() -> None:
    """And no sooner than it compiles: llvmlite is optional, and large."""
    importers = {name for name, path in modules().items() if any(n.startswith("llvmlite") for n in imports(path))}
    assert importers == {"vimfast_kernels.llvm.language", "vimfast_kernels.llvm.machine"}
    code = "import sys, vimfast_kernels; vimfast_kernels.check_backend('auto'); print('llvmlite' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_only_one_room_imports_the_clients_of_stores() -> None:
    """And no sooner than a URL is opened: they are optional."""
    clients = ("obstore", "fsspec", "botocore")
    importers = {name for name, path in modules().items() if any(n.startswith(clients) for n in imports(path))}
    assert importers == {"vimfast.stores.objects", "vimfast.stores.filesystems"}
    code = "import sys, vimfast.stores; print([m for m in ('obstore', 'fsspec', 'botocore') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


COMMAND_MODULES = sorted({command.function.partition(":")[0] for command in COMMANDS.values()})


@pytest.mark.parametrize(
    "module",
    ["vimfast", "vimfast.config", "vimfast.prepare", "vimfast.train.__main__", "vimfast.timm", *COMMAND_MODULES],
)
def test_light_modules_stay_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'nvidia.dali', 'timm') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


MOST_PARAMETERS = 12
MOST_LINES = 300  # of a class
# Device code and registered ops have the parameters that their kernels have.
DECORATORS = ("triton.jit", "gluon.jit", ".custom_op", ".register_fake")


def test_parameters_and_classes_are_few_and_short() -> None:
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= MOST_LINES, f"{name}.{node.name} has {lines} lines; give it parts"
            elif isinstance(node, ast.FunctionDef):
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                if any(word in decorator for word in DECORATORS for decorator in decorators):
                    continue
                known = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len(known) - (known[:1] in (["self"], ["cls"]))
                assert count <= MOST_PARAMETERS, f"{name}.{node.name} has {count} parameters; group them"

"""``vimfast``: one command for everything, a subcommand for each thing.

    vimfast prepare imagenet_data/ --out shards/
    vimfast train --config vim_tiny --data-path shards/ --output_dir runs/tiny

A subcommand is imported when it is asked for, so ``vimfast --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple, NoReturn

from vimfast import __version__
from vimfast.cli import end_process, print_out, run_main
from vimfast.errors import UserError, did_you_mean


class Command(NamedTuple):
    """A subcommand: the function that does it, reading ``sys.argv``; what it does, and how its process ends.

    The function's module has a function ``parser`` too, of its command line.
    """

    function: str
    does: str
    end: Callable[[int], NoReturn] = sys.exit


COMMANDS = {
    "prepare": Command("vimfast.prepare:run", "turn a folder of images into shards"),
    "check": Command("vimfast.check_data:main", "say whether a folder of images, or shards, are fit to train on"),
    "train": Command("vimfast.commands.train:main", "train or evaluate a model", end_process),
    "show": Command("vimfast.commands.show:main", "draw what the model gets: images, augmented and mixed", end_process),
    "report": Command("vimfast.commands.report:main", "write report.html of a run folder again"),
    "predict": Command("vimfast.commands.predict:main", "say what a trained model sees in images", end_process),
    "embed": Command("vimfast.commands.embed:main", "write the features of images, a vector for each"),
    "doctor": Command("vimfast.commands.doctor:main", "look for what is missing, broken or slow on this machine"),
    "bench": Command("vimfast.commands.bench:main", "measure training, inference and loading here", end_process),
    "export": Command("vimfast.export:main", "write a checkpoint for timm, torch.export or ONNX"),
}


def main() -> None:
    """The console script."""
    words = sys.argv[1:]
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        run_main(lambda: print_out(usage()))
    elif name in ("-V", "--version"):
        run_main(lambda: print_out(f"vimfast {__version__}"))
    elif name.split("=")[0] == "--completion":
        run_main(lambda: _complete(name.partition("=")[2] or " ".join(words[1:])))
    else:
        run_main(lambda: _run(name, words[1:]), COMMANDS[name].end if name in COMMANDS else sys.exit)


def _run(name: str, words: list[str]) -> int | None:
    if name not in COMMANDS:
        raise UserError(f"vimfast has no command {name!r}{did_you_mean(name, COMMANDS)}", "vimfast --help lists them")
    sys.argv = [f"vimfast {name}", *words]
    module, _, function = COMMANDS[name].function.partition(":")
    status: int | None = getattr(import_module(module), function)()
    return status


def _complete(shell: str) -> None:
    """Print the script that completes in this shell."""
    from vimfast.commands.completion import SHELLS, script

    if shell not in SHELLS:
        raise UserError(f"--completion is {shell!r}", f"it must be one of {', '.join(SHELLS)}")
    modules = {name: import_module(command.function.partition(":")[0]) for name, command in COMMANDS.items()}
    print_out(script(shell, [(name, COMMANDS[name].does, module.parser()) for name, module in modules.items()]))


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{command.does}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vimfast COMMAND [FLAGS]",
            "",
            "ImageNet in, a trained Vision Mamba out.",
            "",
            *lines,
            "",
            "vimfast COMMAND --help explains a command; vimfast --version says which version",
            "this is; vimfast --completion bash (or zsh, fish) prints a script for TAB.",
            "example: vimfast prepare imagenet_data/ --out shards/",
        ]
    )


if __name__ == "__main__":
    main()

"""The recipes that come with the package; their originals are the files of configs/ at the top of the repository."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vimfast.errors import UserError, did_you_mean

RECIPES = Path(__file__).parent.parent / "recipes"


def recipes() -> dict[str, Path]:
    """The recipes' files, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def find_recipe(word: str) -> Path:
    """The file that ``--config`` means: a recipe's name, or a path, which has a slash or an extension.

    Raises:
        UserError: there is no such recipe or no such file.
    """
    path, known = Path(word).expanduser(), recipes()
    if word not in (".", "..") and "/" not in word and not path.suffix and (word in known or not path.is_file()):
        if word not in known:
            raise UserError(f"there is no recipe {word!r}{did_you_mean(word, known)}", _known(known))
        return known[word]
    if not path.exists():
        own = f"the recipe of that name is --config {path.stem}" if path.stem in known else _known(known)
        raise UserError(f"{path} does not exist", own)
    return path


def _known(names: Iterable[str]) -> str:
    return f"the recipes are {', '.join(names)}; any other YAML file goes by its path"

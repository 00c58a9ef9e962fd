"""Weights brought into a model that may differ from the one they were trained in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn

from vimfast.errors import UserError
from vimfast.image_size import SizeLike


class OtherModel(UserError):
    """Weights have other names or shapes than those of the model they are loaded into."""


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    origin: str,
    *,
    resample: str | None = None,
    img_size: SizeLike | None = None,
    fix: str = "give the --model, --model-kwargs, --num-classes and --input-size it was trained with",
) -> list[str]:
    """Load a state dict strictly.

    Args:
        resample: how a position embedding of another grid is brought to the model's, one of
            :data:`vimfast.models.pos_embed.RESAMPLE`; None: it is an error.
        img_size: of the images that the weights are of; None: it is not known, and the grid taken for a square
            unless the weights say which it is.
        fix: what a user can do where they are of another model.

    Returns:
        lines that say what was changed on the way.

    Raises:
        OtherModel: names or shapes differ, with the first of them.
    """
    weights, notes = _fitted(model, weights, resample, img_size)
    shapes, missing, unknown = _differences(model, weights)
    trouble = (
        shapes + [f"{name} is missing there" for name in missing] + [f"{name} is unknown here" for name in unknown]
    )
    if trouble:
        more = f" (and {len(trouble) - 1} more)" if len(trouble) > 1 else ""
        raise OtherModel(f"{origin} is of another model: {trouble[0]}{more}", fix)
    model.load_state_dict(weights)
    return notes


def load_for_finetuning(
    model: nn.Module,
    weights: dict[str, Tensor],
    origin: str,
    *,
    resample: str,
    img_size: SizeLike | None = None,
) -> list[str]:
    """Load what fits into a model with, perhaps, another head; a head of other classes keeps its initial values.

    Args:
        resample, img_size: as in :func:`load_weights`.

    Returns:
        lines that say what was resampled, what was not loaded, and why.

    Raises:
        OtherModel: a shape outside the head differs.
        UserError: nothing but the head would be loaded.
    """
    weights, notes = _fitted(model, weights, resample, img_size)
    own = model.state_dict()
    heads = head_names(model)
    fresh: list[str] = []
    for head in heads:
        new, old = own.get(f"{head}.weight"), weights.get(f"{head}.weight")
        if new is not None and old is not None and new.shape != old.shape:
            fresh += [f"{head}.weight", f"{head}.bias"]
            notes.append(
                f"{head} has {len(new)} classes here and {len(old)} in {origin}: it starts from initial values"
            )
    weights = {name: value for name, value in weights.items() if name not in fresh}
    notes += _fit_channels(model, weights)
    shapes, missing, unknown = _differences(model, weights)
    if shapes:
        raise OtherModel(f"{origin} is of another model: {shapes[0]}", "give the --model and --model-kwargs it is of")
    if not [name for name in own.keys() & weights.keys() if name.rpartition(".")[0] not in heads]:
        first = next(iter(weights), "nothing")
        raise UserError(f"{origin} has no weight of this model (its first is {first}); give the --model it is of")
    missing = [name for name in missing if name not in fresh]
    if missing:
        notes.append(f"not in {origin}, so as initialized: {', '.join(missing)}")
    if unknown:
        notes.append(f"in {origin} and not loaded, for the model has none: {', '.join(unknown)}")
    model.load_state_dict({**own, **{name: value for name, value in weights.items() if name in own}})
    return notes


def _fitted(
    model: nn.Module, weights: dict[str, Tensor], resample: str | None, img_size: SizeLike | None
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights with the position embedding of the model's grid, and a line if it was another's."""
    fit: Any = getattr(model, "fit_pos_embed", None)
    if fit is None or resample is None:
        return weights, []
    fitted: dict[str, Tensor] = fit(weights, resample, img_size)
    before, after = weights.get("pos_embed"), fitted.get("pos_embed")
    if before is None or after is None or before is after:
        return fitted, []
    how = " as the original does" if resample == "original" else ""
    grid: Any = model.pos_embed_grid
    assumed = ", taken for a square grid of patches" if grid(weights, img_size) is None else ""
    return fitted, [f"position embedding resampled{how} from {before.shape[1]} to {after.shape[1]} positions{assumed}"]


def _fit_channels(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Bring the first convolution, in place, to a model of other channels; a line for each that was.

    As timm does it: of one channel, its weights are the sums of those for red, green and blue.
    """
    names = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()
    own, notes = model.state_dict(), []
    for conv in (names,) if isinstance(names, str) else names:
        name = f"{conv}.weight"
        new, old = own.get(name), weights.get(name)
        if new is None or old is None or new.ndim != 4 or old.ndim != 4 or new.shape[1] != 1 or old.shape[1] != 3:
            continue
        weights[name] = adapt_input_conv(1, old)
        notes.append(f"{name} is summed over red, green and blue: the model sees grey images")
    return notes


def _differences(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """(sentences on shapes, names missing in the weights, names unknown to the model)."""
    own = model.state_dict()
    shapes = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(value.shape)} here"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    return shapes, [name for name in own if name not in weights], [name for name in weights if name not in own]


def head_names(model: nn.Module) -> tuple[str, ...]:
    """The classifier's module names, as timm's models give them."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)

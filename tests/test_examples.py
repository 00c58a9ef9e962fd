"""The examples at work: a run that is interrupted in mid-epoch continues as if it had not been."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vimfast import AugmentConfig, Loader, create_model, training_loader

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "stride": 8, "embed_dim": 32, "depth": 1}
STEPS, EPOCHS, INTERRUPTED = 4, 2, 6  # of 8 images; the step in which it is interrupted


class Interrupted(Exception):
    pass


class Watched:
    """A model that notes the images it is trained on, and may be interrupted."""

    def __init__(self, at: int | None = None) -> None:
        torch.manual_seed(0)
        self.model = create_model("vim_tiny_patch16_224", num_classes=3, drop_path_rate=0.0, **SMALL)
        self.seen: list[Tensor] = []
        self._at = at
        self.model.register_forward_pre_hook(self._note)

    def _note(self, model: nn.Module, given: tuple[Tensor, ...]) -> None:
        if not model.training:
            return
        if len(self.seen) == self._at:
            raise Interrupted
        self.seen.append(given[0])


def check_that_it_resumes(fit: Callable[[nn.Module, Path], None], folder: Path) -> None:
    """`fit` trains to the end of EPOCHS from what is at a place on the disk, saving after each step."""
    straight, before, after = Watched(), Watched(INTERRUPTED), Watched()
    fit(straight.model, folder / "straight")
    assert len(straight.seen) == EPOCHS * STEPS
    with pytest.raises(Interrupted):
        fit(before.model, folder / "interrupted")
    fit(after.model, folder / "interrupted")
    seen = before.seen + after.seen
    assert len(seen) == EPOCHS * STEPS
    assert all(map(torch.equal, seen, straight.seen))
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, after.model.state_dict()[name]), name


def open_loader(tree: Path) -> Loader:
    return training_loader(tree, 8, size=32, augmentation=AugmentConfig(), device="cpu")


def test_plain_torch(tree: Path, tmp_path: Path) -> None:
    example = runpy.run_path(str(EXAMPLES / "plain_torch.py"))

    def fit(model: nn.Module, place: Path) -> None:
        with open_loader(tree) as loader:
            example["train"](model, loader, place, EPOCHS, save_every=1)

    check_that_it_resumes(fit, tmp_path)


def test_accelerate(tree: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    example = runpy.run_path(str(EXAMPLES / "with_accelerate.py"))

    def fit(model: nn.Module, place: Path) -> None:
        with open_loader(tree) as loader:
            example["train"](Accelerator(cpu=True), model, loader, place, EPOCHS, save_every=1)

    check_that_it_resumes(fit, tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_lightning(tree: Path, tmp_path: Path) -> None:
    example = runpy.run_path(str(EXAMPLES / "with_lightning.py"))
    tops: list[float] = []

    def fit(model: nn.Module, place: Path) -> None:
        options = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_model_summary": False}
        trainer = example["trainer"](place, EPOCHS, save_every=1, **options)
        images = example["Images"](tree, batch_size=8, size=32)
        saved = place / "last.ckpt"
        trainer.fit(example["Classification"](model), datamodule=images, ckpt_path=saved if saved.exists() else None)
        tops.append(float(trainer.callback_metrics["top1"]))

    check_that_it_resumes(fit, tmp_path)
    assert tops[0] == tops[1]


def test_segmentation_on_feature_maps() -> None:
    """Digits that it has not seen, at both sizes of its training: their ink, and which of two they are."""
    example = runpy.run_path(str(EXAMPLES / "segment.py"))
    torch.manual_seed(0)
    model, digits, sizes = example["build"](32), (0, 1), (32, 48)
    unseen = [example["Canvases"](validation=True, digits=digits).draw(32, size, seed=0) for size in sizes]
    before = [example["intersection_over_union"](model, batch) for batch in unseen]
    example["train"](model, example["Canvases"](validation=False, digits=digits), sizes, steps=60, batch=6)
    for batch, untrained in zip(unseen, before, strict=True):
        assert model(batch.images).shape == (32, 11, *batch.images.shape[2:])
        found = example["intersection_over_union"](model, batch)
        assert found[0] > 0.85  # the background
        assert found[1:3].mean() > 0.2 + untrained[1:3].nan_to_num().mean()


def test_intersection_over_union() -> None:
    """By hand, with a model that always answers the same."""
    example = runpy.run_path(str(EXAMPLES / "segment.py"))
    answer = torch.tensor([[[[0, 1], [1, 2]]]])
    batch = example["Batch"](torch.zeros(1, 3, 2, 2), torch.tensor([[[0, 1], [0, 1]]]))
    model = Always(nn.functional.one_hot(answer[:, 0], 4).movedim(-1, 1).float())
    found = example["intersection_over_union"](model, batch, classes=4)
    assert found[:3].tolist() == pytest.approx([1 / 2, 1 / 3, 0])
    assert found[3].isnan()


class Always(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits

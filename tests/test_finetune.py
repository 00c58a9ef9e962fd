"""Starting from other weights: other sizes and strides, frozen layers, teachers, and the losses they teach by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimfast.checkpoint import described, load_checkpoint, load_for_finetuning, load_weights, save_checkpoint
from vimfast.config import DistillConfig, FinetuneConfig, OptimConfig
from vimfast.errors import UserError
from vimfast.inference import load_classifier
from vimfast.models import VisionMamba, create_model
from vimfast.models.hub import save_for_hub
from vimfast.train.freezing import freeze
from vimfast.train.losses import Objective, build_teacher
from vimfast.train.optim import build_optimizer

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 3, "num_classes": 5}


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [
        ("vim_tiny_patch16_384_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2", {}, 24),
        ("vim_small_patch16_stride8_224", {}, 27),
        ("vim_tiny_patch16_224", {"img_size": 384}, 24),
        ("vim_tiny_patch16_224", {"img_size": 512}, 32),
        ("vim_tiny_patch16_224", {"img_size": 1248}, 78),
    ],
)
def test_the_published_sizes_take_a_checkpoint_of_224(name: str, options: dict[str, Any], side: int) -> None:
    model = create_model(name, depth=1, embed_dim=8, **options)
    ramp = torch.linspace(0, 1, 14)[:, None].expand(14, 14)  # from top to bottom
    embedding = torch.zeros(1, 197, 8)
    embedding[0, [i for i in range(197) if i != 98]] = ramp.reshape(196, 1).expand(196, 8)
    embedding[0, 98] = 5
    got = model.fit_pos_embed({"pos_embed": embedding})["pos_embed"]
    middle = side * side // 2
    assert (got.shape, model.class_places(side * side)) == ((1, side * side + 1, 8), (middle,))
    assert (got[0, middle] == 5).all()
    patches = torch.cat([got[0, :middle], got[0, middle + 1 :]])[:, 0].view(side, side)
    assert (patches[1:] >= patches[:-1] - 0.01).all()
    torch.testing.assert_close(patches, patches[:, :1].expand(side, side))


@pytest.mark.parametrize("double", [False, True])
def test_the_originals_resampling_takes_class_tokens_for_the_first(double: bool) -> None:
    new = VisionMamba(**{**SMALL, "img_size": 48, "use_double_cls_token": double})
    tokens = 2 if double else 1
    embedding = torch.randn(1, 16 + tokens, 16)
    grid = embedding[0, tokens:].reshape(4, 4, 16).permute(2, 0, 1)[None]
    want = F.interpolate(grid, (6, 6), mode="bicubic")[0].permute(1, 2, 0).reshape(36, 16)
    got = new.fit_pos_embed({"pos_embed": embedding}, "original")["pos_embed"][0]
    torch.testing.assert_close(got, torch.cat([embedding[0, :tokens], want]))
    assert not torch.equal(got, new.fit_pos_embed({"pos_embed": embedding})["pos_embed"][0])
    with pytest.raises(UserError, match="by 'orginal'; it must be patches or original"):
        new.fit_pos_embed({"pos_embed": embedding}, "orginal")


def vim_of(img_size: int | tuple[int, int]) -> VisionMamba:
    return timm.create_model(
        "vim_tiny_patch16_224", img_size=img_size, patch_size=8, stride=8, depth=1, embed_dim=16, num_classes=3
    )


def smooth(grid: tuple[int, int], model: VisionMamba) -> Tensor:
    """An embedding that is a function of the place in the image; the class token's is 7."""
    rows, columns = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in grid), indexing="ij")
    patches = torch.stack([rows, columns, rows * columns, (3 * rows).sin()], -1).flatten(0, 1).repeat(1, 4)
    (place,) = model.class_places(len(patches))
    return torch.cat([patches[:place], torch.full((1, 16), 7.0), patches[place:]])[None]


SIZES = pytest.mark.parametrize(
    ("before", "after"),
    [
        ((64, 144), (128, 288)),
        ((32, 128), (64, 64)),
        ((128, 32), (32, 128)),
        ((64, 64), (32, 128)),
        ((48, 80), (80, 48)),
    ],
)


@SIZES
@pytest.mark.parametrize("way", ["state dict", "file", "checkpoint", "hub", "timm", "copy"])
def test_positions_of_images_that_are_not_square(
    before: tuple[int, int], after: tuple[int, int], way: str, tmp_path: Path
) -> None:
    """8 x 18, 4 x 16 and 16 x 4 patches are square numbers, and the second and third as many as 8 x 8."""
    old, new = vim_of(before), vim_of(after)
    with torch.no_grad():
        old.pos_embed.copy_(smooth(old.patch_embed.grid_size, old))
    notes: list[str] = []
    if way == "state dict":
        new.load_state_dict(new.fit_pos_embed(old.state_dict()))
    elif way == "file":
        torch.save(old.state_dict(), tmp_path / "weights.pth")
        weights = load_checkpoint(tmp_path / "weights.pth")["model"]
        notes = load_weights(new, weights, "weights.pth", resample="patches")
    elif way == "checkpoint":  # as torchrun's DDP names them
        torch.save({"state_dict": nn.ModuleDict({"module": old}).state_dict()}, tmp_path / "weights.pth")
        weights = load_checkpoint(tmp_path / "weights.pth")["model"]
        notes = load_for_finetuning(new, weights, "weights.pth", resample="patches")
    elif way == "hub":
        save_for_hub(old, tmp_path)
        state = load_checkpoint(tmp_path)
        size = described(state).img_size
        assert size == before
        notes = load_weights(new, state["model"], "hub", resample="patches", img_size=size)
    elif way == "timm":
        save_for_hub(old, tmp_path)
        new = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=after)
    else:
        notes = load_weights(new, dict(old.state_dict()), "copy", resample="patches", img_size=before)
    assert not any("taken for" in note for note in notes)
    assert len(notes) == (way not in ("state dict", "timm"))
    want = smooth(new.patch_embed.grid_size, new)
    assert (new.pos_embed - want).abs().max() < 0.15  # 0.12 at the edges; taken for a square, 0.46 to 0.66
    (place,) = new.class_places(want.shape[1] - 1)
    assert (new.pos_embed[0, place] == 7).all()


def test_a_grid_that_nothing_tells_is_taken_for_a_square_and_said_to_be() -> None:
    old, new = vim_of((32, 32)), vim_of((64, 64))
    notes = load_weights(new, dict(old.state_dict()), "w.pth", resample="patches")
    assert notes == ["position embedding resampled from 17 to 65 positions, taken for a square grid of patches"]
    with pytest.raises(UserError, match="61 entries, which is not a square grid of patches and 1 class tokens"):
        new.fit_pos_embed(dict(vim_of((48, 80)).state_dict()))
    for nonsense in ({"": {"pos_embed_grid": "8x8"}}, {"": {"pos_embed_grid": [3, 5]}}, {"": {}}):
        state = old.state_dict()
        state._metadata = nonsense  # type: ignore[attr-defined]
        assert new.pos_embed_grid(state) is None


def test_a_model_of_images_that_are_not_square_may_be_asked_about_squares(tmp_path: Path) -> None:
    save_for_hub(vim_of((32, 64)), tmp_path)
    assert load_classifier(tmp_path).view.size_in(0) == (32, 64)
    resampled = load_classifier(tmp_path, input_size=64)
    assert resampled.notes == ["position embedding resampled from 33 to 65 positions"]


def trained_names(model: nn.Module, **settings: Any) -> set[str]:
    before = {name: p.clone() for name, p in model.named_parameters()}
    freeze(model, FinetuneConfig(**settings))
    torch.manual_seed(0)  # in 5 of 300 seeds, stochastic depth drops the last block for both images
    optimizer = build_optimizer(OptimConfig(weight_decay=0.5), model, 0.1)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_frozen_layers_stay_as_they_are(frozen: int) -> None:
    model = VisionMamba(**SMALL)
    names = [name for name, _ in model.named_parameters()]
    kept = tuple(f"layers.{i}." for i in range(frozen, 3))
    last = () if frozen == 3 else ("norm_f.",)
    assert trained_names(model, freeze_layers=frozen) == {n for n in names if n.startswith((*kept, *last, "head."))}


def test_attn_only_trains_the_mixers() -> None:
    moved = trained_names(VisionMamba(**SMALL), attn_only=True)
    want = {n for n, _ in VisionMamba(**SMALL).named_parameters() if ".mixer." in n or n.startswith(("head", "pos"))}
    assert moved == want
    moved = trained_names(create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=5), attn_only=True)
    assert "blocks.0.attn.qkv.weight" in moved
    assert not any("mlp" in name or "norm" in name for name in moved)
    line = freeze(model := VisionMamba(**SMALL), FinetuneConfig(freeze_layers=3))
    total, head = sum(p.numel() for p in model.parameters()), 16 * 5 + 5
    assert line == f"{head} of {total:,} parameters are trained, the others stay as they are"
    assert freeze(VisionMamba(**SMALL), FinetuneConfig()) == ""


def test_what_cannot_be_frozen_is_reported() -> None:
    with pytest.raises(UserError, match="--freeze-layers is 4 and the model has 3 layers before its head"):
        freeze(VisionMamba(**SMALL), FinetuneConfig(freeze_layers=4))
    with pytest.raises(UserError, match="--attn-only trains mixers or attention"):
        freeze(create_model("resnet18"), FinetuneConfig(attn_only=True))
    with pytest.raises(UserError, match="group_matcher"):
        freeze(nn.Linear(2, 2), FinetuneConfig(freeze_layers=1))


def softmax(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum(1, keepdim=True)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_checkpoint(tmp_path / "teacher.pth", {"model": create_model("resnet10t", num_classes=5).state_dict()})
    return tmp_path / "teacher.pth"


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("bce", [False, True])
def test_distillation(teacher: Path, kind: str, bce: bool) -> None:
    cfg = DistillConfig(kind, "resnet10t", str(teacher), distillation_alpha=0.3, distillation_tau=2.5)
    model = build_teacher(cfg, 5, 64)
    assert model is not None
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    objective = Objective(cfg, bce, model.double())
    images, targets = torch.randn(4, 3, 64, 64).double(), torch.eye(5)[[0, 1, 2, 4]].double()
    logits = torch.randn(4, 5).double().requires_grad_()
    got = objective(objective.prepare(images), logits, targets)
    opinion = model(images)
    if kind == "soft":
        p, q = softmax(opinion / 2.5), softmax(logits / 2.5)
        lesson = (p * (p / q).log()).sum() * 2.5**2 / 20
    else:
        lesson = -softmax(logits).log()[range(4), opinion.argmax(1)].mean()
    base = -(targets * softmax(logits).log()).sum(1).mean()
    if bce:
        q = 1 / (1 + (-logits).exp())
        base = -(targets * q.log() + (1 - targets) * (1 - q).log()).mean()
    want = 0.7 * base + 0.3 * lesson
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(want, logits))


def test_cosub() -> None:
    objective = Objective(DistillConfig(cosub=True), bce=False)
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(objective.prepare(images), torch.cat([images, images]))
    logits, targets = torch.randn(6, 5).double().requires_grad_(), torch.rand(3, 5).double()

    def bce(x: Tensor, target: Tensor) -> Tensor:
        q = 1 / (1 + (-x).exp())
        return -(target * q.log() + (1 - target) * (1 - q).log()).mean()

    a, b = logits[:3], logits[3:]
    taught = [1 / (1 + (-x.detach()).exp()) for x in (a, b)]
    want = 0.25 * (bce(a, targets) + bce(b, targets) + bce(a, taught[1]) + bce(b, taught[0]))
    got = objective(images, logits, targets)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(want, logits))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"distillation_type": "hard"}, "needs a teacher; give its --teacher-path"),
        ({"distillation_type": "soft", "cosub": True}, "two losses; choose one"),
        ({"distillation_type": "soft", "teacher_path": "t", "distillation_tau": 0.0}, "the temperature above 0"),
        ({"distillation_type": "soft", "teacher_path": "t", "distillation_alpha": 2.0}, "share must be at most 1"),
        ({"distillation_type": "soft", "teacher_path": "nowhere.pth"}, "--teacher-path: nowhere.pth does not exist"),
        ({"distillation_type": "hard", "teacher_model": "resnet1", "teacher_path": "t"}, "no model named 'resnet1'"),
    ],
)
def test_mistakes_about_teachers_are_reported(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        build_teacher(DistillConfig(**settings), 5, 224)
    assert sentence in str(error.value)


def test_a_teacher_of_other_classes_is_reported(teacher: Path) -> None:
    with pytest.raises(UserError, match=r"--teacher-path: .*fc.weight is \(5, 512\) there and \(7, 512\) here"):
        build_teacher(DistillConfig("hard", "resnet10t", str(teacher)), 7, 64)

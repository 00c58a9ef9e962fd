"""Vision Mamba as timm's users know a model: feature maps for detection and segmentation, saving, loading."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from vimfast.checkpoint import described, load_checkpoint, load_weights
from vimfast.config import ModelConfig
from vimfast.errors import UserError
from vimfast.inference import load_classifier, rebuild
from vimfast.models import VisionMamba, create_model
from vimfast.models.hub import save_for_hub

NAME = "vim_tiny_patch16_224"
SMALL: dict[str, Any] = {"img_size": (24, 32), "patch_size": 8, "stride": 6, "embed_dim": 20, "depth": 4}


def named(**options: Any) -> VisionMamba:
    torch.manual_seed(0)
    model = timm.create_model(NAME, **{**SMALL, "num_classes": 5, **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def random_images() -> Tensor:
    return torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("options", "class_places"),
    [
        ({}, [7]),
        ({"use_middle_cls_token": False}, [0]),
        ({"use_double_cls_token": True}, [0, 16]),
        ({"if_cls_token": False}, []),
    ],
)
def test_maps_are_the_sums_of_the_blocks_without_the_class_tokens(
    options: dict[str, Any], class_places: list[int]
) -> None:
    model = named(**options)
    outputs: list[Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda m, args: outputs.append(args[0]))
    for block in model.layers:
        block.register_forward_hook(lambda m, args, out: outputs.append(out[0]))
    maps = model.forward_intermediates(random_images(), intermediates_only=True)
    patches = [i for i in range(15 + len(class_places)) if i not in class_places]
    for i, got in enumerate(maps):
        want = torch.stack(outputs[: i + 2]).sum(0)[:, patches]  # the embedding and what blocks 0 .. i add
        torch.testing.assert_close(got, want.view(2, 3, 5, 20).permute(0, 3, 1, 2))
    final, (last,) = model.forward_intermediates(random_images(), [-1], norm=True, output_fmt="NLC")
    torch.testing.assert_close(final, model.forward_features(random_images()))
    torch.testing.assert_close(last, final[:, patches])


def test_maps_lie_as_the_image_does_whatever_the_order() -> None:
    """Blocks that add nothing leave the embedding, which must not be shuffled or reversed."""
    model = named(if_random_token_rank=True, flip_img_sequences_ratio=1.0).train()
    with torch.no_grad():
        for block in model.layers:
            block.mixer.out_proj.weight.zero_()
    embedding = model.patch_embed(random_images()) + torch.cat([model.pos_embed[:, :7], model.pos_embed[:, 8:]], 1)
    for got in model.forward_intermediates(random_images(), output_fmt="NLC", intermediates_only=True):
        torch.testing.assert_close(got, embedding)


def test_alternating_directions_count_in_pairs() -> None:
    model = named(if_bidirectional=True)
    maps = model.forward_intermediates(random_images(), norm=True, output_fmt="NLC", intermediates_only=True)
    assert [info["module"] for info in model.feature_info] == ["layers.1", "layers.3"]
    assert len(maps) == 2
    final = model.forward_features(random_images())
    torch.testing.assert_close(maps[1], final[:, [i for i in range(16) if i != 7]])


@pytest.mark.parametrize("out_indices", [(1, 3), (0, 2), (-3,), 2])
def test_features_only(out_indices: Any) -> None:
    whole = named()
    backbone = timm.create_model(NAME, features_only=True, out_indices=out_indices, **SMALL)
    assert isinstance(backbone.model, VisionMamba)
    taken = backbone.out_indices
    assert len(backbone.model.layers) == max(taken) + 1
    missing = backbone.model.load_state_dict(whole.state_dict(), strict=False).missing_keys
    assert not missing
    maps = backbone.eval()(random_images())
    assert backbone.feature_info.channels() == [20] * len(taken)
    assert backbone.feature_info.reduction() == [6] * len(taken)
    want = whole.forward_intermediates(random_images(), taken, intermediates_only=True)
    for got, there in zip(maps, want, strict=True):
        assert got.shape == (2, 20, 3, 5)
        torch.testing.assert_close(got, there)
    backbone.train()
    sum(m.square().mean() for m in backbone(random_images())).backward()
    assert all(p.grad is not None for p in backbone.parameters())  # else DDP would wait for some


@pytest.mark.parametrize("options", [{}, {"use_double_cls_token": True}, {"if_bidirectional": True}])
def test_maps_of_the_first_blocks_alone(options: dict[str, Any]) -> None:
    model = named(drop_path_rate=0.0, **options)
    runs: list[int] = []
    for block in model.layers:
        block.register_forward_hook(lambda m, args, out: runs.append(1))
    want = model.forward_intermediates(random_images(), [0, 1], norm=True, intermediates_only=True)
    runs.clear()
    got = model.forward_intermediates(
        random_images(), [0], norm=True, stop_early=True, return_prefix_tokens=True, intermediates_only=True
    )
    assert len(runs) == (2 if "if_bidirectional" in options else 1)
    ((patches, tokens),) = got
    torch.testing.assert_close(patches, want[0])
    assert tokens.shape == (2, 2 if "use_double_cls_token" in options else 1, 20)
    whole = model.forward_features(random_images())
    _, last = model.forward_intermediates(
        random_images(), [-1], norm=True, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )[0]
    torch.testing.assert_close(last, whole[:, list(model.class_places(15))])
    layers = model.get_intermediate_layers(random_images(), 2, reshape=True, norm=True)
    every = model.forward_intermediates(random_images(), norm=True, intermediates_only=True)
    assert all(map(torch.equal, layers, every[-2:]))
    assert model.get_intermediate_layers(random_images(), [0])[0].shape == (2, 15, 20)


@pytest.mark.parametrize("tokens", [1, 2, 0])
def test_pools_by_their_names_in_timm(tokens: int, tmp_path: Path) -> None:
    options = [{"if_cls_token": False, "final_pool_type": "none"}, {}, {"use_double_cls_token": True}][tokens]
    model = named(**options)
    features, places = model.forward_features(random_images()), list(model.class_places(15))
    patches = features[:, [i for i in range(15 + tokens) if i not in places]]
    want = {"avg": patches.mean(1), "": features, **({"token": features[:, places].mean(1)} if tokens else {})}
    for pool, read in want.items():
        torch.testing.assert_close(named(**options, global_pool=pool).forward_head(features, pre_logits=True), read)
        model.reset_classifier(3, pool)
        torch.testing.assert_close(model(random_images()), model.head(read))
        model.reset_classifier(0, pool)
        torch.testing.assert_close(model(random_images()), read)
    # As it is saved, it is built again.
    model.reset_classifier(3, "avg")
    save_for_hub(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(random_images()), model(random_images()))
    model.reset_classifier(3, "mean")
    assert model.global_pool is None
    with pytest.raises(UserError, match=r"global_pool is 'catavgmax'; it must be one of '', 'token', 'avg'"):
        named(global_pool="catavgmax")
    if not tokens:
        with pytest.raises(UserError, match="and the model has no class token; take 'avg' or ''"):
            model.reset_classifier(3, "token")
        with pytest.raises(UserError, match="if_cls_token=False leaves none; take 'avg' or ''"):
            named(**options, global_pool="token")


@pytest.mark.parametrize("options", [{}, {"if_rope": True}, {"if_abs_pos_embed": False, "stride": 8}])
def test_another_input_size(options: dict[str, Any], tmp_path: Path) -> None:
    """As if it had been built for it, with positions resampled as for finetuning; and it is saved as that."""
    model = named(**options)
    built = timm.create_model(NAME, **{**SMALL, "num_classes": 5, **options, "img_size": (40, 30)}).eval()
    built.load_state_dict(built.fit_pos_embed(model.state_dict()))
    model.set_input_size((40, 30))
    images = torch.randn(2, 3, 40, 30)
    assert torch.equal(model(images), built(images))
    assert model.state_dict().keys() == built.state_dict().keys()
    with pytest.raises(UserError, match="24 x 32"):
        model(random_images())
    save_for_hub(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images), model(images))
    model.set_input_size(32)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("kind", ["v2", "v1", "none"])
@pytest.mark.parametrize("stride", [6, 8])
def test_a_batch_of_no_images(kind: str, stride: int) -> None:
    model = named(bimamba_type=kind, stride=stride).train()
    logits = model(random_images()[:0])
    assert logits.shape == (0, 5)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert model.eval()(random_images()[:0]).shape == (0, 5)


@pytest.mark.parametrize("options", [{}, {"if_rope": True, "dynamic_img_size": True}])
def test_built_on_the_meta_device(options: dict[str, Any]) -> None:
    """Shapes without memory, then memory and weights, as large models are loaded."""
    model = named(**options)
    with torch.device("meta"):
        empty = timm.create_model(NAME, **{**SMALL, "num_classes": 5, **options}).eval()
        assert empty(torch.empty(2, 3, 24, 32)).shape == (2, 5)
        if "dynamic_img_size" in options:
            assert empty(torch.empty(2, 3, 30, 40)).shape == (2, 5)
    assert all(p.is_meta for p in empty.parameters())
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    assert torch.equal(filled(random_images()), model(random_images()))


def test_default_maps_are_four_quarters_of_the_depth() -> None:
    assert timm.create_model(NAME, features_only=True, device="meta").out_indices == [5, 11, 17, 23]
    assert timm.create_model(NAME, features_only=True, depth=2, device="meta").out_indices == [0, 1]
    with pytest.raises(UserError, match=r"out_indices is \(4,\), and there are maps 0 to 3"):
        timm.create_model(NAME, features_only=True, out_indices=(4,), **SMALL)


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        ({}, ["a", "b", "c", "d", "e"]),
        ({"if_cls_token": False, "final_pool_type": "mean", "num_classes": 0}, []),
        ({"ssm_cfg": {"d_conv": 3}, "in_chans": 1, "scan_backend": "reference", "drop_path_rate": 0.3}, []),
    ],
)
def test_saved_for_the_hub_and_loaded_by_timm(tmp_path: Path, options: dict[str, Any], classes: list[str]) -> None:
    options = {**options, "img_size": 30}
    model = named(**options)
    save_for_hub(model, tmp_path / "model", classes=classes)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.safetensors", "config.json"}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config.get("label_names", []) == classes
    assert "scan_backend" not in config["model_args"]
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    images = torch.randn(2, model.patch_embed.channels, 30, 30)
    assert torch.equal(again(images), model(images))
    data = resolve_data_config({}, model=again)
    assert (tuple(data["input_size"]), data["crop_pct"]) == ((len(images[0]), 30, 30), 0.875)
    assert (tuple(data["mean"]), data["interpolation"]) == (timm.data.IMAGENET_DEFAULT_MEAN, "bicubic")
    # Into another size and another head, as timm's users do; and by our own loader.
    larger = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, img_size=36, num_classes=3)
    assert larger(torch.zeros(2, len(images[0]), 36, 36)).shape == (2, 3)
    own = named(**options)
    own.load_state_dict({name: torch.zeros_like(value) for name, value in own.state_dict().items()})
    load_weights(own, load_checkpoint(tmp_path / "model")["model"], "model")
    assert torch.equal(own(images), model(images))


def test_a_saved_folder_is_a_model_of_transformers(tmp_path: Path) -> None:
    """It passes the number of classes beside ``model_args``, so they must not have it too."""
    from transformers import TimmWrapperForImageClassification  # 2 s

    model = named(final_pool_type="none")
    save_for_hub(model, tmp_path / "ours", classes=["a", "b", "c", "d", "e"])
    theirs = TimmWrapperForImageClassification.from_pretrained(str(tmp_path / "ours")).eval()
    images = random_images()
    with torch.no_grad():
        assert torch.equal(theirs(images).logits, model(images))
    assert theirs.config.id2label[4] == "e"
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = load_classifier(tmp_path / "theirs", device="cpu")
    assert (again.classes, again.model.final_pool_type) == (["a", "b", "c", "d", "e"], "none")
    with torch.no_grad():
        assert torch.equal(again.model(images), model(images))


def test_features_without_a_head_are_saved_and_read(tmp_path: Path) -> None:
    save_for_hub(named(num_classes=0), tmp_path)
    assert rebuild(described(state := load_checkpoint(tmp_path)), state["model"], "it").num_classes == 0


def test_what_cannot_be_saved_for_the_hub_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without a name"):
        save_for_hub(VisionMamba(**SMALL), tmp_path)
    with pytest.raises(UserError, match="2 class names for a head of 5 classes"):
        save_for_hub(named(), tmp_path, classes=["a", "b"])
    with pytest.raises(UserError, match="cannot be written as JSON"):
        save_for_hub(named(), tmp_path, model_args={"dtype": torch.float32})
    assert not list(tmp_path.iterdir())


def test_another_timm_model_is_saved_too(tmp_path: Path) -> None:
    model = create_model("resnet18", num_classes=3).eval()
    save_for_hub(model, tmp_path, model_args={})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(images), model(images))


def export(*flags: str) -> None:
    script = runpy.run_path(str(Path(__file__).parent.parent / "tools" / "export_model.py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export_model.py", *flags])
        script["main"]()


def test_a_checkpoint_exported(tmp_path: Path) -> None:
    raw, average = named(**{**SMALL, "img_size": 30}), named(**{**SMALL, "img_size": 30})
    with torch.no_grad():
        average.head.bias.add_(1)
    kwargs = {name: value for name, value in SMALL.items() if name != "img_size"}
    cfg = ModelConfig(model=NAME, model_kwargs=kwargs, input_size=30, random_cls_token_position=True)
    state = {"model": raw.state_dict(), "model_ema": average.state_dict()}
    ours = {**state, "config": {"model": {**vars(cfg), "from_the_future": 1}}, "classes": ["a", "b", "c", "d", "e"]}
    torch.save(ours, tmp_path / "ours.pth")
    images = torch.randn(2, 3, 30, 30)
    for weights, model in (("raw", raw), ("ema", average)):
        export(str(tmp_path / "ours.pth"), "--out", str(tmp_path / weights), "--weights", weights)
        again = timm.create_model(f"local-dir:{tmp_path / weights}", pretrained=True).eval()
        assert torch.equal(again.head.bias, model.head.bias)
        model.sequence = replace(
            model.sequence, use_middle_cls_token=False
        )  # where --if_random_cls_token_position leaves it for evaluation
        assert torch.equal(again(images), model(images))
        assert json.loads((tmp_path / weights / "config.json").read_text())["label_names"] == ours["classes"]
    tiny = create_model(NAME, num_classes=2)
    torch.save({"model": tiny.state_dict(), "args": argparse.Namespace(model=NAME)}, tmp_path / "vim.pth")
    export(str(tmp_path / "vim.pth"), "--out", str(tmp_path / "vim"))
    assert timm.create_model(f"local-dir:{tmp_path / 'vim'}", pretrained=True).num_classes == 2
    with pytest.raises(UserError, match="holds no averaged weights"):
        export(str(tmp_path / "vim.pth"), "--out", str(tmp_path / "vim"), "--weights", "ema")
    export(str(tmp_path / "raw"), "--out", str(tmp_path / "again"))
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "raw" / "config.json").read_text()
    torch.save({"model": raw.state_dict()}, tmp_path / "nameless.pth")
    with pytest.raises(UserError, match="does not say which model it is of; give its --model"):
        export(str(tmp_path / "nameless.pth"), "--out", str(tmp_path / "again"))


def test_layer_decay_knows_the_depth() -> None:
    model = named()
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.patch_embed.proj.weight)] == 0.5**5
    assert [scale[id(block.mixer.A_log)] for block in model.layers] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert isinstance(model.head, nn.Linear)
    assert scale[id(model.head.weight)] == 1

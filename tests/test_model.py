"""Vision Mamba: against an independent float64 computation, its names, counts, keys, options and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import vim_float64
from torch import Tensor, nn

from vimfast.errors import UserError
from vimfast.models import VisionMamba, create_model
from vimfast.models.embedding import PatchEmbed
from vimfast.models.mixer import drop_path
from vimfast.models.options import PatchOptions
from vimfast.models.pos_embed import resample_pos_embed, resize_pos_embed
from vimfast.models.registry import MODELS

SMALL: dict[str, Any] = {
    "img_size": (24, 32),
    "patch_size": 8,
    "stride": 6,
    "embed_dim": 20,
    "num_classes": 5,
    "depth": 3,
}


def small(**options: Any) -> VisionMamba:
    """A model of 3 x 5 patches, every parameter away from its initial value."""
    torch.manual_seed(0)
    model = VisionMamba(**{**SMALL, **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def random_images(count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 24, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)


FIRST = {"use_middle_cls_token": False}
DOUBLE = {"use_double_cls_token": True}
NO_TOKEN = {"if_cls_token": False}
SHUFFLED = [5, 2, 9, 0, 15, 7, 1, 14, 3, 8, 12, 4, 13, 6, 11, 10]


@pytest.mark.parametrize(
    ("options", "description"),
    [
        ({}, {}),
        ({"if_divide_out": False, "stride": 8}, {"halve": False, "stride": 8}),
        ({"bimamba_type": "v1"}, {"kind": "v1"}),
        ({"if_bimamba": True, **FIRST}, {"kind": "v1", "token": "first"}),
        ({"bimamba_type": "none", "rms_norm": False}, {"kind": "none"}),
        ({"rms_norm": False, "if_abs_pos_embed": False}, {}),
        (FIRST, {"token": "first"}),
        (DOUBLE, {"token": "double"}),
        (NO_TOKEN, {"token": "none"}),
        ({**NO_TOKEN, "bimamba_type": "none"}, {"kind": "none", "token": "none"}),
        ({**NO_TOKEN, "final_pool_type": "mean"}, {"token": "none", "pool": "mean"}),
        ({**NO_TOKEN, "final_pool_type": "max"}, {"token": "none", "pool": "max"}),
        ({**NO_TOKEN, "final_pool_type": "all"}, {"token": "none", "pool": "all"}),
        ({"final_pool_type": "max"}, {}),
        ({"init_layer_scale": 0.1, "d_state": 5}, {}),
        ({"ssm_cfg": {"bias": True, "conv_bias": False, "d_conv": 3, "expand": 3, "dt_rank": 4}}, {}),
        ({"if_bidirectional": True, "bimamba_type": "none", "depth": 4}, {"alternate": True, "kind": "none"}),
        ({"flip_img_sequences_ratio": 1.0, "bimamba_type": "none"}, {"flip": True, "kind": "none"}),
        ({"flip_img_sequences_ratio": 1.0, **DOUBLE}, {"flip": True, "token": "double"}),
        ({"if_rope": True}, {"rope": True}),
        ({"if_rope": True, "if_rope_residual": True, **FIRST}, {"rope": True, "rope_residual": True, "token": "first"}),
        (
            {"if_rope": True, "flip_img_sequences_ratio": 1.0, "pt_hw_seq_len": 3, **NO_TOKEN},
            {"rope": True, "flip": True, "side": 3, "token": "none"},
        ),
        (
            {"if_rope": True, "if_rope_residual": True, "if_bidirectional": True, "depth": 2},
            {"rope": True, "rope_residual": True, "alternate": True},
        ),
        ({"norm_epsilon": 0.1}, {"eps": 0.1}),
        ({"if_random_token_rank": True, "bimamba_type": "none"}, {"order": SHUFFLED, "kind": "none"}),
        (
            {"if_random_token_rank": True, **DOUBLE, "if_rope": True},
            {"order": [*SHUFFLED, 16], "token": "double", "rope": True},
        ),
        (
            {"if_random_cls_token_position": True, "if_random_token_rank": True, **FIRST},
            {"place": 9, "order": SHUFFLED, "token": "first"},
        ),
    ],
)
def test_agrees_with_the_description(
    options: dict[str, Any], description: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and the gradients of all parameters and of the images."""
    tolerance = 1e-5 if "rope" in description else 1e-9  # rotary tables are kept in fp32
    model = small(drop_path_rate=0.0, **options).double().train()
    images = random_images(dtype=torch.float64).requires_grad_()
    if "order" in description:
        monkeypatch.setattr(model, "_draw_order", lambda length: description["order"])
    if "place" in description:
        monkeypatch.setattr(torch, "randint", lambda *a, **k: torch.tensor(description["place"]))
    parameters = dict(model.named_parameters())
    state = {**parameters, **dict(model.named_buffers())}
    want = vim_float64.vision_mamba(images, state, **{"stride": 6, **description})
    got = model(images)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    loss = torch.sin(torch.arange(want.numel())).double().view(want.shape)
    leaves = [images, *parameters.values()]
    for name, a, b in zip(
        ["images", *parameters],
        torch.autograd.grad((got * loss).sum(), leaves),
        torch.autograd.grad((want * loss).sum(), leaves),
        strict=True,
    ):
        assert (a - b).norm() <= 10 * tolerance * b.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("size", [(24, 32), (29, 39)])
@pytest.mark.parametrize("amp", [False, True])
def test_patches_that_do_not_overlap_are_a_convolution(size: tuple[int, int], amp: bool) -> None:
    """Pixels that fill no patch are left out; under autocast images are cast as a convolution would."""
    torch.manual_seed(0)
    embed = PatchEmbed(PatchOptions(size, patch_size=8, stride=8), 20)
    images = torch.randn(2, 3, *size).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        got, want = embed(images), embed.proj(images).flatten(2).transpose(1, 2)
    assert (got.dtype, got.shape) == (want.dtype, (2, 12, 20))
    leaves = [images, *embed.parameters()]
    grads = [torch.autograd.grad(y.float().square().sum(), leaves) for y in (got, want)]
    tolerance = 2e-2 if amp else 1e-6
    for a, b in zip((got, *grads[0]), (want, *grads[1]), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_a_block_is_its_norm_and_its_mixer() -> None:
    block = small(init_layer_scale=0.1).double().layers[1]
    x, residual = (torch.randn(2, 7, 20, dtype=torch.float64) for _ in range(2))
    out, total = block(x, residual)
    normed, want = block.norm(x, residual)
    assert torch.equal(total, want)
    torch.testing.assert_close(out, block.mixer(normed))


@pytest.mark.parametrize(("size", "count"), [("tiny", 7_148_008), ("small", 25_796_584), ("base", 97_598_440)])
def test_parameter_counts(size: str, count: int) -> None:
    assert sum(p.numel() for p in create_model(f"vim_{size}_patch16_224", device="meta").parameters()) == count


def test_state_dict_is_the_originals() -> None:
    """Names, shapes and, for optimizer states, order."""
    mixer = {
        "A_log": (384, 16),
        "D": (384,),
        "A_b_log": (384, 16),
        "D_b": (384,),
        "in_proj.weight": (768, 192),
        "conv1d.weight": (384, 1, 4),
        "conv1d.bias": (384,),
        "x_proj.weight": (44, 384),
        "dt_proj.weight": (384, 12),
        "dt_proj.bias": (384,),
        "conv1d_b.weight": (384, 1, 4),
        "conv1d_b.bias": (384,),
        "x_proj_b.weight": (44, 384),
        "dt_proj_b.weight": (384, 12),
        "dt_proj_b.bias": (384,),
        "out_proj.weight": (192, 384),
    }
    want: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 192),
        "pos_embed": (1, 197, 192),
        "patch_embed.proj.weight": (192, 3, 16, 16),
        "patch_embed.proj.bias": (192,),
        "head.weight": (1000, 192),
        "head.bias": (1000,),
    }
    for i in range(24):
        want |= {f"layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
        want[f"layers.{i}.norm.weight"] = (192,)
    want["norm_f.weight"] = (192,)
    model = create_model("vim_tiny_patch16_224", device="meta")
    assert [(name, tuple(x.shape)) for name, x in model.state_dict().items()] == list(want.items())


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = VisionMamba(img_size=64, embed_dim=192, depth=4, initializer_cfg={"n_residuals_per_layer": 4})
    mixer = model.layers[1].mixer
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17).expand(384, 16))
    assert torch.equal(mixer.A_log, mixer.A_b_log)
    assert mixer.A_log.data_ptr() != mixer.A_b_log.data_ptr()
    steps = nn.functional.softplus(mixer.dt_proj.bias).log()
    assert math.log(0.99e-3) < steps.min() < math.log(2e-3)
    assert math.log(5e-2) < steps.max() < math.log(0.101)
    assert abs(steps.mean() - math.log(1e-2)) < 0.3  # log-uniform: its mean lies in the middle
    assert mixer.dt_proj.weight.abs().max() <= 12**-0.5
    for zero in (model.head.bias, model.patch_embed.proj.bias, mixer.dt_proj_b.bias):
        assert not zero.any()
    bound = 1 / math.sqrt(384) / math.sqrt(4 * 4)  # kaiming uniform (a = sqrt 5) over sqrt(residuals in all)
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
    for name in ("cls_token", "pos_embed"):
        assert 0.017 < getattr(model, name).std() < 0.023
    # hustvl/Vim's timm 0.4.12: not cut off at two deviations, though widened by 1 / 0.88 as if it were
    patches = model.patch_embed.proj.weight * math.sqrt(768)
    assert abs(patches.std() - 1 / 0.8796) < 0.02
    assert patches.abs().max() > 4
    assert torch.equal(mixer.D, torch.ones(384))
    low = VisionMamba(**SMALL, dtype=torch.bfloat16)
    assert {n.split(".")[-1] for n, p in low.named_parameters() if p.dtype == torch.float32} == {
        "A_log",
        "A_b_log",
        "D",
        "D_b",
    }
    assert low(random_images(dtype=torch.bfloat16)).dtype == torch.bfloat16
    usual = torch.get_default_dtype()
    try:  # as transformers builds a model to be loaded in bf16
        torch.set_default_dtype(torch.bfloat16)
        built = VisionMamba(**SMALL)
    finally:
        torch.set_default_dtype(usual)
    assert torch.equal(built.layers[0].mixer.A_log, low.layers[0].mixer.A_log)
    assert built.head.weight.dtype == torch.bfloat16


def test_drop_path_is_shifted_by_one_block() -> None:
    model = VisionMamba(**{**SMALL, "depth": 4}, drop_path_rate=0.3)
    rates = [block.drop_path_rate for block in model.layers]
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.2])
    assert model.drop_path_rate == 0.3
    model = small(depth=1, drop_path_rate=1.0).train()  # the last output is always dropped
    logits = model(random_images())
    with torch.no_grad():
        model.layers[-1].mixer.out_proj.weight.zero_()
    assert torch.equal(model(random_images()), logits)


@pytest.mark.parametrize("kind", ["v2", "none"])
def test_drop_path_keeps_the_mean_of_each_sample(kind: str) -> None:
    """Whole samples lose a block's output, the others have it scaled up; evaluation drops nothing."""
    model = small(depth=1, drop_path_rate=0.25, bimamba_type=kind).train()
    x = random_images(1).expand(400, -1, -1, -1)
    stream, residual, noise = model._mix(model.patch_embed(x), None)
    kept = drop_path(stream, noise, 0.25)
    dropped = (kept == 0).flatten(1).all(1)
    assert 60 < dropped.sum() < 140
    torch.testing.assert_close(kept[~dropped], stream[~dropped] / 0.75)
    total = model.norm_f(stream, residual, noise, 0.25)[1]
    torch.testing.assert_close(total, residual + kept)
    state = torch.get_rng_state()
    model.eval()(x[:2])
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_follows_the_position_embedding() -> None:
    model = small(drop_rate=0.5, drop_path_rate=0.0).train()
    assert not torch.equal(model(random_images()), model(random_images()))
    assert small(drop_rate=0.5, if_abs_pos_embed=False).pos_drop.p == 0


def test_autocast_keeps_scan_and_residual_in_fp32() -> None:
    model = small().eval()
    seen: dict[str, torch.dtype] = {}
    model.layers[1].register_forward_hook(lambda m, i, o: seen.update(output=o[0].dtype, residual=o[1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(random_images())
    assert seen == {"output": torch.bfloat16, "residual": torch.float32}
    assert logits.dtype == torch.bfloat16
    exact = model(random_images())
    assert (logits.float() - exact).norm() < 0.03 * exact.norm()
    logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"if_random_token_rank": True},
        {"if_random_token_rank": True, **DOUBLE},
        {"flip_img_sequences_ratio": 1.0},
        {"flip_img_sequences_ratio": 0.5, "if_random_token_rank": True, **FIRST},
        {"if_random_cls_token_position": True, "if_abs_pos_embed": False, **FIRST},
    ],
)
def test_the_head_finds_the_class_token_wherever_it_goes(options: dict[str, Any]) -> None:
    """Without blocks nothing but the token that is read decides, and that must not change."""
    model = small(depth=0, **options).train()
    model.drop_path_rate = 0.0
    plain = small(depth=0, **{k: v for k, v in options.items() if k.startswith("use") or k == "if_abs_pos_embed"})
    plain.load_state_dict(model.state_dict())
    want = plain.eval()(random_images())
    for _ in range(5):
        torch.testing.assert_close(model(random_images()), want)


@pytest.mark.parametrize("options", [{"if_random_token_rank": True}, {"if_random_cls_token_position": True, **FIRST}])
def test_random_orders_are_for_training(options: dict[str, Any]) -> None:
    model = small(drop_path_rate=0.0, **options).train()
    assert len({tuple(model(random_images()).flatten().tolist()) for _ in range(6)}) > 1
    model.eval()
    assert torch.equal(model(random_images()), model(random_images()))


def test_activation_checkpointing_changes_nothing_but_memory() -> None:
    model = small(drop_path_rate=0.3).train()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        loss = model(random_images()).square().sum()
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(map(torch.equal, *results))


def test_compiled_whole() -> None:
    model = small().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, want = compiled(random_images()), model(random_images())
    torch.testing.assert_close(got, want)
    leaves = list(model.parameters())
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        compiled(random_images(3)), model(random_images(3))
    )  # the last batch of an evaluation is shorter


def test_scan_backend_reaches_the_mixers() -> None:
    model = small(scan_backend="reference").eval()
    assert {block.mixer.scan_backend for block in model.layers} == {"reference"}
    assert torch.equal(model(random_images()), small().eval()(random_images()))


@pytest.mark.parametrize("options", [{}, DOUBLE, {**NO_TOKEN, "final_pool_type": "max"}])
def test_features_and_head_as_in_timm(options: dict[str, Any]) -> None:
    model = small(**options).eval()
    images = random_images()
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 15 + len(model.class_places(15)), 20)
    assert torch.equal(model.forward_head(tokens), model(images))
    features = model.forward_head(tokens, pre_logits=True)
    assert model.get_classifier() is model.head
    model.reset_classifier(0)
    want = features if model.sequence.if_cls_token else features.amax(1)
    assert torch.equal(model(images), want)
    model.reset_classifier(7)
    assert (model(images).shape, model.num_classes) == ((2, 7), 7)
    assert VisionMamba(**{**SMALL, "num_classes": 0})(images).shape == (2, 20)


def test_no_weight_decay() -> None:
    assert small().no_weight_decay() == {"pos_embed", "cls_token"}
    assert small(**DOUBLE).no_weight_decay() == {"pos_embed", "cls_token_head", "cls_token_tail"}


def test_names_in_timm() -> None:
    assert set(timm.list_models("vim_*")) == set(MODELS)
    assert len(MODELS) == 18
    for name in (
        "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
        "vim_small_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
        "vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2",
        "vim_tiny_patch16_384",
    ):
        assert name in MODELS
    stride8 = timm.create_model("vim_tiny_patch16_stride8_224", device="meta", depth=1)
    assert (stride8.patch_embed.num_patches, stride8.class_places(729)) == (729, (364,))
    assert timm.create_model("vim_tiny_patch16_384", device="meta", depth=1).pos_embed.shape == (1, 577, 192)
    model = timm.create_model("vim_tiny_patch16_224", depth=1, num_classes=3, in_chans=1, img_size=32)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 3)
    data = timm.data.resolve_data_config({}, model=timm.create_model("vim_tiny_patch16_384", device="meta", depth=1))
    assert data["mean"] == (0.485, 0.456, 0.406)
    assert data["std"] == (0.229, 0.224, 0.225)
    assert (data["crop_pct"], data["interpolation"], data["input_size"]) == (0.875, "bicubic", (3, 384, 384))


def test_other_models_on_the_same_rails() -> None:
    model = create_model("deit_tiny_patch16_224", img_size=64, num_classes=4)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 4)
    assert isinstance(create_model("resnet18", img_size=64, drop_path_rate=0.1), nn.Module)  # of any size: no complaint


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("vim_tny_patch16_224", {}, "no model named 'vim_tny_patch16_224'; did you mean 'vim_tiny_patch16_224'"),
        ("vim_tny", {}, "no model named 'vim_tny'; did you mean 'vim_tiny_patch16_224' or 'vim_tiny_patch16_384'"),
        ("vim_tiny_patch16_224", {"if_devide_out": True}, "no option 'if_devide_out'; did you mean 'if_divide_out'?"),
        ("vim_tiny_patch16_224", {"ssm_cfg": {"d_con": 3}}, "no option 'd_con'; did you mean 'd_conv'?"),
        (
            "vim_tiny_patch16_224",
            {"initializer_cfg": {"n_residual_per_layer": 2}},
            "initializer_cfg has no option 'n_residual_per_layer'; did you mean 'n_residuals_per_layer'?",
        ),
        ("vim_tiny_patch16_224", {"d_conv": 3}, "no option 'd_conv'"),  # of ssm_cfg, as in hustvl/Vim
        ("vim_tiny_patch16_224", {"pretrained": True}, "no published weights"),
        ("vim_tiny_patch16_224", {"scan_backend": "fast"}, "unknown scan backend 'fast'"),
        ("vim_tiny_patch16_224", {"bimamba_type": "v3"}, "bimamba_type is 'v3'; it must be one of none, v1, v2"),
        ("vim_tiny_patch16_224", {"final_pool_type": "men"}, "final_pool_type is 'men'"),
        ("vim_tiny_patch16_224", {"img_size": 8}, "does not fit an image of 8 x 8"),
        ("vim_tiny_patch16_224", {"if_bidirectional": True, "depth": 3}, "depth 3 is odd"),
        ("vim_tiny_patch16_224", {"if_random_cls_token_position": True}, "use_middle_cls_token=False"),
        ("vim_tiny_patch16_224", {"if_rope": True, "embed_dim": 18}, "multiple of 4"),
        ("vim_tiny_patch16_224", {"ssm_cfg": {"dt_init": "zero"}}, "dt_init is 'zero'"),
        ("vim_tiny_patch16_224", {"depth": "two"}, "option depth is 'two'; it must be an integer >= 0"),
        ("vim_tiny_patch16_224", {"depth": 0}, "option depth is 0; a named model has at least 1 block"),
        ("vim_tiny_patch16_224", {"depth": -1}, "option depth is -1; it must be an integer >= 0"),
        ("vim_tiny_patch16_224", {"embed_dim": 0.5}, "option embed_dim is 0.5; it must be an integer >= 1"),
        ("vim_tiny_patch16_224", {"num_classes": -1}, "option num_classes is -1; it must be an integer >= 0"),
        ("vim_tiny_patch16_224", {"drop_rate": "much"}, "option drop_rate is 'much'; it must be a number"),
        ("vim_tiny_patch16_224", {"rms_norm": 1}, "option rms_norm is 1; it must be true or false"),
        ("vim_tiny_patch16_224", {"ssm_cfg": {"expand": "x"}}, "option expand is 'x'; it must be an integer >= 1"),
        ("vim_tiny_patch16_224", {"ssm_cfg": {"dt_rank": "x"}}, "cannot be built with these options ("),
        ("deit_tiny_patch16_224", {"depth": "two"}, "cannot be built with these options ("),
        ("resnet18", {"scan_backend": "mamba_ssm"}, "has no selective scan"),
        ("resnet18", {"depht": 3}, "resnet18 has no option 'depht'"),
    ],
)
def test_mistakes_are_reported(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        create_model(name, **options)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_images_of_another_size_are_reported() -> None:
    with pytest.raises(UserError, match=r"3 x 32 x 32 .* built for 3 x 24 x 32"):
        small()(torch.zeros(2, 3, 32, 32))


def test_an_image_without_a_batch_is_reported() -> None:
    model, image = small(), random_images()[0]
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(
            UserError, match=r"shape \(3, 24, 32\), and .* a batch.*; give a single image as image\[None\]"
        ):
            call(image)
    with pytest.raises(UserError, match=r"shape \(1, 2, 3, 24, 32\).*; give it four dimensions"):
        model(random_images()[None])


@pytest.mark.parametrize("options", [{}, FIRST, DOUBLE, NO_TOKEN])
def test_position_embedding_resampled_around_the_class_tokens(options: dict[str, Any]) -> None:
    """4 x 4 to 6 x 8 patches: a linear ramp stays one away from the edges, class tokens move untouched."""
    old = VisionMamba(img_size=32, patch_size=8, stride=8, embed_dim=4, depth=1, **options)
    new = VisionMamba(img_size=(48, 64), patch_size=8, stride=8, embed_dim=4, depth=1, **options)
    places, moved = list(old.class_places(16)), list(new.class_places(48))
    rows, columns = (torch.arange(4) + 0.5).repeat_interleave(4), (torch.arange(4) + 0.5).repeat(4)
    patches = torch.stack([rows, columns, rows + columns, torch.ones(16)], 1)
    embedding = torch.full((1, 16 + len(places), 4), 1000.0)
    embedding[0, [i for i in range(16 + len(places)) if i not in places]] = patches
    state = new.fit_pos_embed({**old.state_dict(), "pos_embed": embedding})
    new.load_state_dict(state)
    assert (new.pos_embed[0, moved] == 1000).all()
    got = new.pos_embed[0, [i for i in range(48 + len(places)) if i not in moved]].view(6, 8, 4).detach()
    row, column = (torch.arange(6) + 0.5) * 4 / 6, (torch.arange(8) + 0.5) * 4 / 8
    want = torch.stack([*torch.meshgrid(row, column, indexing="ij")], -1)
    torch.testing.assert_close(got[1:-1, 1:-1, :2], want[1:-1, 1:-1], rtol=0, atol=0.13)  # cubic with a = -0.75
    torch.testing.assert_close(got[..., 2], got[..., 0] + got[..., 1])
    torch.testing.assert_close(got[..., 3], torch.ones(6, 8))


def test_position_embedding_of_its_own_size_is_untouched() -> None:
    model = small()
    assert model.fit_pos_embed(model.state_dict())["pos_embed"].data_ptr() == model.pos_embed.data_ptr()
    assert "pos_embed" not in model.fit_pos_embed({})
    with pytest.raises(UserError, match="not a square grid"):
        resample_pos_embed(torch.zeros(1, 16, 4), (2, 2), model.class_places)


@pytest.mark.parametrize("options", [{}, FIRST, DOUBLE, NO_TOKEN])
def test_position_embedding_resized_in_a_pass_is_the_resampled_one(options: dict[str, Any]) -> None:
    """Larger and smaller, with its gradient; and of a grid that is not square."""
    torch.manual_seed(0)
    places = VisionMamba(**{**SMALL, "depth": 0}, **options).class_places
    own = torch.randn(1, 16 + len(places(16)), 3, dtype=torch.float64, requires_grad=True)
    for grid in ((6, 8), (3, 2), (4, 4)):
        got = resize_pos_embed(own, (4, 4), grid, places)
        want = resample_pos_embed(own, grid, places) if grid != (4, 4) else own
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # weights are resampled in fp32
        seed = torch.randn_like(got)
        grads = [torch.autograd.grad((y * seed).sum(), own)[0] for y in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    low = resize_pos_embed(own.bfloat16(), (4, 4), (6, 8), places)
    assert low.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        full = resize_pos_embed(own.float(), (4, 4), (6, 8), places)
    torch.testing.assert_close(full, resize_pos_embed(own, (4, 4), (6, 8), places).float())
    wide = torch.randn(1, 10, 3, dtype=torch.float64)  # 2 x 5
    turned = resize_pos_embed(wide.view(2, 5, 3).transpose(0, 1).reshape(1, 10, 3), (5, 2), (7, 4), lambda patches: ())
    want = resize_pos_embed(wide, (2, 5), (4, 7), lambda patches: ()).view(4, 7, 3).transpose(0, 1)
    torch.testing.assert_close(turned.view(7, 4, 3), want)


@pytest.mark.parametrize(
    "options", [{}, {**DOUBLE, "stride": 8}, {**NO_TOKEN, "if_rope": True}, {"if_abs_pos_embed": False}]
)
def test_images_of_any_size(options: dict[str, Any]) -> None:
    """The model is then the one built for that size, with positions resampled as for fine-tuning."""
    model = small(**{"img_size": 32, **options}, dynamic_img_size=True).eval()
    for size in ((48, 40), (20, 26), (32, 32)):
        built = small(**{"img_size": size, **options}).eval()
        built.load_state_dict(built.fit_pos_embed(model.state_dict()))
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(model(images), built(images))
        maps = [m.forward_intermediates(images, [2], intermediates_only=True)[0] for m in (model, built)]
        torch.testing.assert_close(*maps)
    with pytest.raises(UserError, match="does not fit an image of 7 x 32"):
        model(torch.zeros(1, 3, 7, 32))
    with pytest.raises(UserError, match="4 x 32 x 32"):
        model(torch.zeros(1, 4, 32, 32))


def test_other_models_of_any_size() -> None:
    for name in ("vim_tiny_patch16_224", "deit_tiny_patch16_224", "resnet18"):
        model = create_model(name, img_size=64, dynamic_img_size=True, num_classes=4)
        assert model(torch.zeros(2, 3, 96, 96)).shape == (2, 4)
    with pytest.raises(UserError, match="mixer_s16_224 has no option 'dynamic_img_size'"):
        create_model("mixer_s16_224", img_size=64, dynamic_img_size=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["v2", "v1", "none"])
@pytest.mark.parametrize("amp", [False, True])
def test_fast_kernels_give_the_reference(kind: str, amp: bool) -> None:
    """Logits and every gradient of a small model, as far from float64 as the reference is, up to twice."""
    torch.manual_seed(0)
    options = {"img_size": 48, "patch_size": 8, "stride": 8, "depth": 3, "embed_dim": 64, "bimamba_type": kind}
    images = torch.randn(3, 3, 48, 48, device="cuda")
    models = [
        VisionMamba(**options, num_classes=7, drop_path_rate=0.0, scan_backend=backend).cuda()
        for backend in ("reference", "reference", "gluon")
    ]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    models[0].double()

    def run(model: VisionMamba, x: torch.Tensor, amp: bool) -> list[torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            logits = model(x)
        (logits.double() ** 2).sum().backward()
        return [logits, *(p.grad for p in model.parameters())]

    exact = run(models[0], images.double(), False)
    plain, fast = (run(model, images, amp) for model in models[1:])
    floor = 4e-3 if amp else 1e-6
    for e, p, f in zip(exact, plain, fast, strict=True):
        error = [(g.double() - e).norm() / e.norm() for g in (p, f)]
        assert error[1] <= 2 * error[0] + floor

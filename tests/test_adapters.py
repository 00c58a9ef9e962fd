"""Adapters, hooks, parametrizations and replaced modules act in a Vision Mamba as they do anywhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_model import random_images, small
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from vimfast.models import VisionMamba, mixer
from vimfast.models.mixer import Block
from vimfast.models.plain import is_plain

LINEARS = ("in_proj", "x_proj", "dt_proj", "x_proj_b", "dt_proj_b", "out_proj")
CONVOLUTIONS = ("conv1d", "conv1d_b")
KINDS = pytest.mark.parametrize("kind", ["v2", "v1", "none"])


def model(kind: str = "v2", **options: Any) -> VisionMamba:
    return small(bimamba_type=kind, drop_path_rate=0.0, **options).double().eval()


def images() -> Tensor:
    return random_images(dtype=torch.float64)


def inner(whole: nn.Module, names: tuple[str, ...]) -> list[tuple[nn.Module, str, nn.Module]]:
    """(mixer, name, module) of all that are there: v1 and none have one direction."""
    mixers = [block.mixer for block in whole.layers]
    return [(m, name, getattr(m, name)) for m in mixers for name in names if hasattr(m, name)]


def fused(whole: VisionMamba) -> list[bool]:
    return [block.mixer.fused for block in whole.layers]


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


class Called(nn.Module):
    """Another module around one, which does what it does; its weights are out of reach."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inside = module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inside(x)
        return out


@pytest.mark.parametrize(
    ("kind", "names"),
    [(kind, LINEARS + CONVOLUTIONS) for kind in ("v2", "v1", "none")]
    + [("v2", (name,)) for name in LINEARS + CONVOLUTIONS]
    + [("v1", ("dt_proj",)), ("none", ("conv1d",))],
)
def test_called_one_by_one_it_is_the_same(kind: str, names: tuple[str, ...]) -> None:
    """Logits and every gradient."""
    whole = model(kind)
    found = inner(whole, names)
    want = whole(images())
    parameters = dict(whole.named_parameters())
    want_grads = torch.autograd.grad(want.sin().sum(), list(parameters.values()))
    for owner, name, module in found:
        setattr(owner, name, Called(module))
    got = whole(images())
    assert_same(got, want)
    for name, a, b in zip(
        parameters, torch.autograd.grad(got.sin().sum(), list(parameters.values())), want_grads, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)


def test_only_what_was_touched_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model()
    runs: list[int] = []
    fast = mixer.bidirectional_block
    monkeypatch.setattr(mixer, "bidirectional_block", lambda *a, **k: (runs.append(1), fast(*a, **k))[1])
    assert fused(whole) == [True] * 3
    whole(images())
    assert len(runs) == 3
    whole.layers[1].mixer.x_proj = Called(whole.layers[1].mixer.x_proj)
    assert fused(whole) == [True, False, True]
    whole(images())
    assert len(runs) == 5


@KINDS
def test_lora(kind: str) -> None:
    """With peft: the output moves, every adapter learns, and merged they are what they were."""
    from peft import LoraConfig, get_peft_model

    whole = model(kind)
    before = whole(images())
    adapted = get_peft_model(whole, LoraConfig(r=2, lora_alpha=8, target_modules=list(LINEARS))).double()
    assert_same(adapted(images()), before)  # as long as the second factor is zero
    factors = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(factors) == 2 * len(inner(whole, LINEARS))
    torch.manual_seed(1)
    for p in factors.values():
        nn.init.normal_(p, std=0.1)
    moved = adapted(images())
    assert (moved - before).abs().max() > 0.01
    moved.square().sum().backward()
    for name, p in factors.items():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    merged = adapted.merge_and_unload()
    assert fused(merged) == [kind == "v2"] * 3
    assert_same(merged(images()), moved)


def test_lora_of_convolutions_and_patches() -> None:
    from peft import LoraConfig, get_peft_model

    whole = model(stride=8)  # patches that do not overlap are a product otherwise
    targets = ["patch_embed.proj", "head"]
    adapted = get_peft_model(whole, LoraConfig(r=2, target_modules=targets)).double()
    before = adapted(images())
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.1)
    moved = adapted(images())
    assert (moved - before).abs().max() > 0.01
    assert_same(adapted.merge_and_unload()(images()), moved)


@KINDS
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "pruned", "old weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_parametrizations(kind: str, how: str) -> None:
    """The same as a model that has the resulting weights; gradients reach what they are made of."""
    whole = model(kind)
    for _, _, module in inner(whole, LINEARS + CONVOLUTIONS):
        if how == "weight_norm":
            parametrizations.weight_norm(module)
            module.parametrizations.weight.original0.data.mul_(1.5)
        elif how == "spectral_norm":
            parametrizations.spectral_norm(module)
        elif how == "pruned":
            prune.random_unstructured(module, "weight", 0.4)
        else:
            nn.utils.weight_norm(module)
            module.weight_g.data.mul_(1.5)
    got = whole(images())
    grown = [p for name, p in whole.named_parameters() if "original" in name or "weight_" in name]
    assert len(grown) >= len(inner(whole, LINEARS + CONVOLUTIONS))
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(got.sin().sum(), grown))
    want = model(kind)
    for (_, _, module), (_, _, ours) in zip(
        inner(whole, LINEARS + CONVOLUTIONS), inner(want, LINEARS + CONVOLUTIONS), strict=True
    ):
        ours.weight.data.copy_(module.weight.detach())
    assert_same(got, want(images()))
    assert (got - model(kind)(images())).abs().max() > 1e-3
    if how.startswith(("weight", "spectral")):
        for _, _, module in inner(whole, LINEARS + CONVOLUTIONS):
            parametrize.remove_parametrizations(module, "weight")
        assert fused(whole) == [kind == "v2"] * 3


@KINDS
def test_hooks_fire_and_count(kind: str) -> None:
    whole = model(kind)
    want = whole(images())
    seen: list[str] = []
    watched = inner(whole, LINEARS + CONVOLUTIONS) + [
        (block, name, getattr(block, name)) for block in whole.layers for name in ("mixer", "norm")
    ]
    handles = [
        module.register_forward_hook(lambda m, given, out, name=name: seen.append(name)) for _, name, module in watched
    ]
    assert_same(whole(images()), want)
    assert len(seen) == len(watched)
    for handle in handles:
        handle.remove()
    assert_same(whole(images()), want)
    assert len(seen) == len(watched)
    # What a hook returns is what comes out; one before it changes what goes in.
    block = whole.layers[1]
    with block.mixer.out_proj.register_forward_hook(lambda m, given, out: 0 * out):
        assert not block(*(torch.randn(2, 7, 20, dtype=torch.float64) for _ in range(2)))[0].any()
    with block.mixer.x_proj.register_forward_pre_hook(lambda m, given: (2 * given[0],)):
        assert (whole(images()) - want).abs().max() > 1e-3
    grads: list[Tensor] = []
    with block.mixer.dt_proj.register_full_backward_hook(lambda m, into, out: grads.append(out[0])):
        whole(images()).sum().backward()
    assert len(grads) == 1
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize("options", [{}, {"use_double_cls_token": True}, {"if_abs_pos_embed": False}])
def test_hooks_see_whole_patches_and_all_tokens(options: dict[str, Any]) -> None:
    """Unwatched, the patches' bias joins the positions and the last norm is of the class tokens alone."""
    whole = model("v2", patch_size=8, stride=8, **options)
    parameters = dict(whole.named_parameters())
    want = whole(images())
    want_grads = torch.autograd.grad(want.sin().sum(), list(parameters.values()))
    seen: dict[str, Tensor] = {}
    with (
        whole.patch_embed.register_forward_hook(lambda m, given, out: seen.update(patches=out)),
        whole.norm_f.register_forward_hook(lambda m, given, out: seen.update(tokens=out[0])),
    ):
        got = whole(images())
    count = whole.patch_embed.num_patches
    assert_same(seen["patches"], whole.patch_embed(images()))
    assert seen["tokens"].shape[1] == count + len(whole.class_places(count))
    assert_same(got, want)
    for name, a, b in zip(
        parameters, torch.autograd.grad(got.sin().sum(), list(parameters.values())), want_grads, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)


class WeightOnly(nn.Module):
    """int8 weights with a scale for each row: what quantizers put in a Linear's place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("levels", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.levels * self.scale, self.bias)


@KINDS
def test_weight_only_quantization(kind: str) -> None:
    whole = model(kind)
    want = whole(images())
    for owner, name, module in inner(whole, LINEARS):
        setattr(owner, name, WeightOnly(module))
    got = whole(images())
    assert 0 < (got - want).norm() / want.norm() < 0.02
    assert not any(fused(whole))


class Halved(Tensor):
    """A weight that computes itself: a linear layer of it is half of one."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = (*args, None)[:3]
            return F.linear(x, weight.as_subclass(Tensor) / 2, bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_that_compute_themselves() -> None:
    """As torchao's: the module is a Linear like any other."""
    whole, want = model(), model()
    for (_, _, module), (_, _, ours) in zip(inner(whole, LINEARS), inner(want, LINEARS), strict=True):
        ours.weight.data.div_(2)
        module.weight = nn.Parameter(module.weight.detach().as_subclass(Halved), requires_grad=False)
        assert not is_plain(module, nn.Linear)
    assert_same(whole(images()), want(images()))


def test_a_forward_pass_that_was_put_in_place() -> None:
    """As accelerate does, to bring weights when they are needed."""
    whole = model()
    linear = whole.layers[0].mixer.out_proj
    own = linear.forward
    linear.forward = lambda x: 0 * own(x)
    assert fused(whole) == [False, True, True]
    assert not whole.layers[0](torch.randn(2, 7, 20, dtype=torch.float64), None)[0].any()


def test_autocast_and_the_compiler() -> None:
    whole = small(drop_path_rate=0.0, depth=1).eval()
    wrapped = copy.deepcopy(whole)
    for owner, name, module in inner(wrapped, LINEARS + CONVOLUTIONS):
        setattr(owner, name, Called(module))
    x = random_images()
    want = whole(x)
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(m(x).float() - want).norm() / want.norm() for m in (whole, wrapped)]
    assert errors[1] < 2 * errors[0] + 0.01
    compiled = torch.compile(wrapped, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-5)


def overwriting(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Has the CPU reuse memory as the GPU's kernels do; notes which blocks were allowed to."""
    allowed: list[bool] = []
    block = mixer.bidirectional_block

    def run(x: Tensor, residual: Tensor | None, *rest: Any, overwrite: bool, **options: Any) -> tuple[Tensor, Tensor]:
        allowed.append(overwrite)
        out, total = block(x, residual, *rest, **options)
        return out, (x if residual is None else residual).copy_(total) if overwrite else total

    monkeypatch.setattr(mixer, "bidirectional_block", run)
    return allowed


@pytest.mark.parametrize("watched", ["layers.0", "layers.2", "layers.1.norm", "layers.0.mixer", "pos_drop", "nothing"])
def test_what_a_hook_keeps_stays_as_it_was(watched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small().eval()
    allowed = overwriting(monkeypatch)
    kept: list[Tensor] = []
    copies: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], out: Any) -> None:
        tensors = [t for t in (*given, *(out if isinstance(out, tuple) else (out,))) if isinstance(t, Tensor)]
        kept.extend(tensors)
        copies.extend(t.clone() for t in tensors)

    if watched != "nothing":
        whole.get_submodule(watched).register_forward_hook(keep)
    with torch.inference_mode():
        got = whole(random_images())
    assert all(allowed) == (watched == "nothing")
    assert all(map(torch.equal, kept, copies))
    assert len(kept) >= 2 * (watched != "nothing")
    torch.testing.assert_close(got, small().eval()(random_images()), rtol=1e-5, atol=1e-5)  # by other kernels


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["v2", "v1", "none"])
@pytest.mark.parametrize("amp", [False, True])
def test_on_the_kernels_of_a_gpu(kind: str, amp: bool) -> None:
    options = {"embed_dim": 64, "bimamba_type": kind, "drop_path_rate": 0.0}
    plain, wrapped, exact = (small(**options, scan_backend=b).cuda() for b in ("gluon", "gluon", "reference"))
    exact.double()
    for owner, name, module in inner(wrapped, LINEARS + CONVOLUTIONS):
        setattr(owner, name, Called(module))
    x = random_images().cuda()
    results = []
    for m, given in ((exact, x.double()), (plain, x), (wrapped, x)):
        with torch.autocast("cuda", torch.bfloat16, enabled=amp and m is not exact):
            out = m(given)
        out.double().sin().sum().backward()
        results.append([out.double(), *(p.grad.double() for p in m.parameters())])
    for e, p, w in zip(*results, strict=True):
        errors = [(got - e).norm() / e.norm() for got in (p, w)]
        assert errors[1] <= 2 * errors[0] + (0.02 if amp else 1e-5)


@pytest.mark.gpu
def test_on_a_gpu_what_a_hook_keeps_stays_as_it_was() -> None:
    whole = small(embed_dim=64).cuda().eval()
    kept: list[tuple[Tensor, Tensor]] = []
    for block in whole.layers:
        assert isinstance(block, Block)
        block.register_forward_hook(lambda m, given, out: kept.append((out[1], out[1].clone())))
    with torch.inference_mode():
        whole(random_images().cuda())
    assert len(kept) == 3
    assert all(torch.equal(*pair) for pair in kept)

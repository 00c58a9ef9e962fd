"""fp32 products on the tensor cores against float64: error at most twice that of cuBLAS on the CUDA cores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison_gpu")]
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from vimfast_kernels.product import launch  # noqa: E402
from vimfast_kernels.product.launch import multiply, splits  # noqa: E402

if not splits(torch.empty(1, device="cuda")):
    pytest.skip("these products are cuBLAS's on this GPU", allow_module_level=True)

ROWS = 197
# (columns, entries of a sum) of Tiny's, Small's and Base's products, and of odd ones.
SHAPES = (
    (768, 192), (192, 768), (192, 384), (48, 384), (384, 48), (384, 16), (16, 384),
    (1536, 384), (56, 768), (768, 24), (3072, 768), (80, 1536), (1536, 48),
    (44, 33), (1, 19), (250, 100),
)  # fmt: skip


def draw(*shape: int, mixed: bool) -> Tensor:
    """Normal values; mixed: times 1e-3 to 1e3 each."""
    x = torch.randn(shape, device="cuda")
    return x * torch.empty_like(x).uniform_(-6.9, 6.9).exp() if mixed else x


def errors(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Of x as a b: of all entries together, and the largest, each over what the magnitudes of its terms add up to."""
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    off = x.double() - exact
    return torch.stack([off.norm() / exact.norm(), (off.abs() / size).max()])


def check(ours: Tensor, torchs: Tensor, a: Tensor, b: Tensor) -> None:
    assert (errors(ours, a, b) <= 2 * errors(torchs, a, b) + 5e-8).all()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_product(n: int, k: int, mixed: bool) -> None:
    """Weights either way round; rows that are part of longer ones; a bias; added to what is there."""
    torch.manual_seed(0)
    a = draw(2, ROWS, k + 8, mixed=mixed)[..., :k]
    w = draw(2, n, k, mixed=mixed).transpose(1, 2)
    plain = torch.bmm(a, w)
    wide = torch.full((2, ROWS, n + 8), 7.0, device="cuda")
    out = multiply(a, w, out=wide[..., :n])
    check(out, plain, a, w)
    assert (wide[..., n:] == 7).all()
    assert torch.equal(out, multiply(a, w))
    assert torch.equal(out, multiply(a, w.contiguous()))
    assert torch.equal(out + out, multiply(a, w, out=out.clone(), add=True))
    bias = draw(n, mixed=mixed)
    assert torch.equal(out[0] + bias, multiply(a[0], w[0], bias))


def test_what_is_not_finite_stays_so() -> None:
    """Infinities may become NaN: their second part is."""
    torch.manual_seed(0)
    a, w = torch.randn(8, 384, device="cuda"), torch.randn(384, 192, device="cuda")
    a[0, 3], a[1, 5], a[2, 7] = torch.inf, torch.nan, -torch.inf
    a.view(torch.int32)[3, 9] = 0x7FFFFFFF  # a NaN all of whose bits are ones
    a.view(torch.int32)[4, 9] = 0x7F800001  # one whose upper bits are those of an infinity
    got = multiply(a, w)
    assert not got[:5].isfinite().any()
    assert got[5:].isfinite().all()


def test_tiny_values() -> None:
    """The smallest tf32 number is 2^-136: below 1e-34 a value is off by up to half of that."""
    torch.manual_seed(0)
    a, w = torch.randn(64, 384, device="cuda"), torch.randn(384, 192, device="cuda")
    check(multiply(a * 1e-30, w), (a * 1e-30) @ w, a * 1e-30, w)
    for size in (1e-36, 1e-38, 1e-41):
        off = multiply(a * size, w).double() - (a * size).double() @ w.double()
        assert (off.abs() <= 2.0**-135 * w.double().abs().sum(0) + 2.0**-148).all()


def test_a_user_who_allows_tf32_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("split")

    monkeypatch.setattr(launch, "tile_of", refuse)
    a, before = torch.randn(64, 64, device="cuda"), torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert torch.equal(multiply(a, a), a @ a)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before

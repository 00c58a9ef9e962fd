"""torch.func on the models: a gradient for each image, as differential privacy and influence functions need it."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

import vimfast.models  # noqa: F401, registers them

SMALL: dict[str, Any] = {
    "img_size": (24, 32),
    "patch_size": 8,
    "stride": 8,
    "embed_dim": 20,
    "depth": 2,
    "num_classes": 5,
    "drop_path_rate": 0.0,
}


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"scan_backend": "reference"}, {"bimamba_type": "v1"}, {"bimamba_type": "none"}),
        *({"if_rope": True, "rms_norm": False}, {"if_cls_token": False}, {"if_bidirectional": True}),
    ],
)
def test_vmap_of_gradients(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny_patch16_224", **SMALL, **options).double().train()
    weights = dict(model.named_parameters())
    images, labels = torch.randn(3, 3, 24, 32, dtype=torch.float64), torch.tensor([0, 3, 3])

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (image[None],)), label[None])

    got = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images, labels)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        model.zero_grad()
        F.cross_entropy(model(image[None]), label[None]).backward()  # by the backward passes of the ops themselves
        for name, p in weights.items():
            torch.testing.assert_close(got[name][i], p.grad, msg=name, rtol=1e-5, atol=1e-9)


def test_forward_derivatives() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny_patch16_224", **SMALL).double().eval()
    image, direction = torch.randn(2, 1, 3, 24, 32, dtype=torch.float64)
    _, slope = jvp(model, (image,), (direction,))
    step = 1e-5
    ends = model(image + step * direction), model(image - step * direction)
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-6)

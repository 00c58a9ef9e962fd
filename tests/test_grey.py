"""Models of one channel: what they see, weights from colour models, and what timm is told of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import write_image
from PIL import Image
from runs import RECIPE, refused, train
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from vimfast import export
from vimfast.augment.colours import IMAGENET_MEAN, IMAGENET_STD
from vimfast.checkpoint import load_checkpoint
from vimfast.inference import embed, load_classifier, predict
from vimfast.models.grey import Grey

FEW = ("--epochs", "1", "--steps-per-epoch", "2", "--model-ema-decay", "0.5")


def test_grey_is_pillows(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 1)
    image = Image.open(tmp_path / "a.png").convert("RGB")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    colour = ((to_tensor(image) - mean) / std)[None]
    wanted = (to_tensor(image.convert("L")) - 0.449) / 0.226
    assert (Grey()(colour)[0] - wanted).abs().max() < 0.6 / 255 / 0.226  # Pillow rounds to 8 bits
    plain = Grey((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(colour)[0]
    assert (plain - to_tensor(image.convert("L"))).abs().max() < 0.6 / 255


def test_a_model_of_one_channel(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finetuned from one of three, evaluated, asked, exported, and used by timm."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    flags = ("--config", str(tmp_path / "recipe.yaml"), "--data-path", str(tree), *FEW)
    train(*flags, "--output_dir", str(tmp_path / "colour"))
    colour = load_checkpoint(tmp_path / "colour" / "checkpoint.pth")["model"]
    seen: list[Tensor] = []
    run = train(*flags, "--in-chans", "1", "--lr", "0", "--finetune", str(tmp_path / "colour" / "checkpoint.pth"),
                "--output_dir", str(tmp_path / "grey"))  # fmt: skip
    assert "patch_embed.proj.weight is summed over red, green and blue" in capsys.readouterr().out
    state = load_checkpoint(tmp_path / "grey" / "checkpoint.pth")
    torch.testing.assert_close(
        state["model"]["patch_embed.proj.weight"],
        colour["patch_embed.proj.weight"].sum(1, keepdim=True),
        atol=1e-4,  # --min-lr is not 0
        rtol=0,
    )
    # The average of the weights is evaluated on grey images too.
    for model in run.evaluated.models.values():
        model.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            model.eval()(torch.randn(2, 3, 32, 32))
    assert [tuple(images.shape) for images in seen] == [(2, 1, 32, 32)] * 2
    resumed = train(*flags, "--config", str(tmp_path / "grey" / "config.yaml"), "--eval", "--output_dir", "",
                    "--resume", str(tmp_path / "grey" / "checkpoint.pth"))  # fmt: skip
    (raw, _) = resumed.evaluated.models.values()
    paths = sorted((tree / "val" / "n02").iterdir())
    classifier = load_classifier(tmp_path / "grey" / "checkpoint.pth", weights="raw", device="cpu")
    batch = next(iter(classifier.loader(paths).epoch(0))).images
    with torch.no_grad():
        wanted = raw.eval()(batch).softmax(1)
    got = probabilities(classifier, paths)
    torch.testing.assert_close(got, wanted)
    assert embed(classifier, paths).features.shape == (5, 32)

    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "grey" / "checkpoint.pth"), "--out", str(tmp_path / "out")])
    export.main()
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    config = timm.data.resolve_data_config(model=model)
    assert config["input_size"] == (1, 32, 32)
    transform = timm.data.create_transform(**config)
    with torch.no_grad():
        theirs = model(torch.stack([transform(Image.open(path).convert("L")) for path in paths])).softmax(1)
    torch.testing.assert_close(got, theirs, atol=5e-3, rtol=0)
    torch.testing.assert_close(probabilities(load_classifier(tmp_path / "out", device="cpu"), paths), got)
    assert "--in-chans is 2; it must be 3, or 1 for grey images" in refused(*flags, "--in-chans", "2")


def probabilities(classifier: object, paths: list[Path]) -> Tensor:
    seen = predict(classifier, paths, top=3).images  # type: ignore[arg-type]
    return torch.tensor([[g.probability for g in sorted(s.guesses, key=lambda g: g.number)] for s in seen])

"""Checkpoint files: atomic, strict, and unable to run code."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import pickletools
import resource
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import same
from safetensors.torch import save_file
from torch import nn

from vimfast import export
from vimfast.checkpoint import (
    DamagedCheckpoint,
    described,
    kept_checkpoints,
    load_checkpoint,
    load_for_finetuning,
    load_found,
    load_last,
    load_optimizer,
    load_weights,
    save_checkpoint,
    save_last,
    set_aside,
    weights_held,
)
from vimfast.config import OptimConfig
from vimfast.errors import UserError
from vimfast.inference import load_classifier
from vimfast.models import VisionMamba
from vimfast.train.optim import build_optimizer


class Evil:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch hacked",))


def test_round_trip_and_the_original_layout(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    model = nn.Linear(3, 2)
    save_checkpoint(
        path,
        {"model": model.state_dict(), "args": argparse.Namespace(lr=5e-4, model="vim"), "scaler": "none"},
    )
    state = load_checkpoint(path)
    assert state["args"].lr == 5e-4
    other = nn.Linear(3, 2)
    load_weights(other, state["model"], str(path))
    assert torch.equal(other.weight, model.weight)
    assert list(tmp_path.iterdir()) == [path]


def test_a_bare_state_dict_is_weights(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "w.pth")
    assert set(load_checkpoint(tmp_path / "w.pth")) == {"model"}


@pytest.mark.parametrize(("raw", "averaged"), [("model", "model_ema"), ("state_dict", "state_dict_ema")])
@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "model.", "model.backbone."],
)
def test_names_of_others_and_of_wrappers(tmp_path: Path, raw: str, averaged: str, prefix: str) -> None:
    model, average = nn.Linear(3, 2), nn.Linear(3, 2)
    state = {
        name: {f"{prefix}{key}": value for key, value in m.state_dict().items()}
        for name, m in ((raw, model), (averaged, average))
    }
    torch.save({**state, "epoch": 3}, tmp_path / "c.pth")
    got = load_checkpoint(tmp_path / "c.pth")
    assert weights_held(got) == "weights and their moving average (EMA)"
    other = nn.Linear(3, 2)
    for name, want in (("model", model), ("model_ema", average)):
        assert load_weights(other, got[name], "c.pth") == []
        assert torch.equal(other.weight, want.weight)
    assert got["epoch"] == 3
    torch.save({**state, averaged: None}, tmp_path / "c.pth")
    assert weights_held(load_checkpoint(tmp_path / "c.pth")) == "weights"


def test_a_checkpoint_of_lightning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is an attribute of a module, which may have other weights, such as those of a loss."""
    model = timm.create_model("resnet10t", num_classes=3, in_chans=3)
    module = nn.ModuleDict({"model": model, "criterion": nn.Linear(2, 1)})
    about = {"pytorch-lightning_version": "2.5.0", "epoch": 3, "optimizer_states": [], "hyper_parameters": {"lr": 0.1}}
    path = tmp_path / "last.ckpt"
    torch.save({**about, "state_dict": module.state_dict()}, path)
    line = f"{path} holds weights beside the model's, which are left out: criterion.weight and 1 more"
    loaded = load_found(path, best=True)
    assert loaded.notes == [line]
    assert same(loaded.state["model"], model.state_dict())
    classifier = load_classifier(path, model="resnet10t", input_size=64)
    assert line in classifier.notes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", str(path), "--model", "resnet10t", "--out", str(tmp_path / "out")])
        export.main()
    assert line in capsys.readouterr().err
    assert same(load_checkpoint(tmp_path / "out")["model"], model.state_dict())
    # No wrapper: a model whose smaller part is called so.
    torch.save({"model": {"backbone.a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}}, path)
    assert set(load_checkpoint(path)["model"]) == {"backbone.a", "b", "c"}


@pytest.mark.parametrize("config", ["resnet.yaml", ["a"], {"lr": 0.1}, {"model": "resnet"}, {"optim": {"lr": 0.1}}])
def test_what_others_call_their_settings_is_not_taken_for_ours(tmp_path: Path, config: Any) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "config": config, "epoch": 3}, tmp_path / "c.pth")
    state = load_checkpoint(tmp_path / "c.pth")
    assert described(state).model == ""
    assert isinstance(state.get("config", {}).get("optim", {}), dict)


def test_safetensors_and_the_folder_of_one(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path / "model.safetensors", tmp_path):
        state = load_checkpoint(path)
        assert list(state) == ["model"]
        assert torch.equal(state["model"]["weight"], model.weight)
    (tmp_path / "model.safetensors").write_bytes(b"not so safe")
    with pytest.raises(UserError, match="no safetensors file, or a damaged one"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "other.safetensors")


def test_an_address_is_no_path() -> None:
    with pytest.raises(UserError, match="is an address; download the file"):
        load_checkpoint(Path("https://example.org/vim_t.pth"))


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pth"
    save_checkpoint(path, {"model": {"a": torch.ones(2)}})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(path, {"model": {"a": torch.zeros(2)}})
    assert load_checkpoint(path)["model"]["a"].tolist() == [1, 1]
    assert list(tmp_path.iterdir()) == [path]


def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = {"model": {"w": torch.ones(1)}, "args": argparse.Namespace(lr=5e-4, hook=Evil())}
    torch.save(evil, tmp_path / "zip.pth")
    torch.save(evil, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(evil["args"], protocol=2))
    for name in ("zip.pth", "old.pth"):
        with pytest.raises(UserError, match=r"holds posix\.system, which could run code .*; do not load it elsewhere"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match=r"could run code|no checkpoint"):
        load_checkpoint(tmp_path / "plain.pth")
    assert not (tmp_path / "hacked").exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())  # and it would have
    assert (tmp_path / "hacked").exists()


class WindowsPath:
    """pathlib's, which cannot be made here."""

    __module__ = "pathlib"

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return WindowsPath, ("c:\\", "x.pth")


def test_plain_values_in_classes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch refuses most often: a best accuracy of numpy's, and paths among the settings."""
    monkeypatch.setattr(pathlib, "WindowsPath", WindowsPath)
    args = argparse.Namespace(output_dir=Path("runs/a"), resume=WindowsPath())
    best = {
        "acc": np.float64(76.1),
        "epoch": np.int32(-3),
        "loss": np.float16(0.5),
        "done": np.True_,
        "of": np.str_("top-1 é"),
    }
    torch.save({"model": {"w": torch.ones(1)}, "args": args, "best": best}, tmp_path / "c.pth")
    state = load_checkpoint(tmp_path / "c.pth")
    assert state["best"] == best
    assert [type(value) for value in state["best"].values()] == [float, int, float, bool, str]
    assert (str(state["args"].output_dir), str(state["args"].resume)) == ("runs/a", "c:\\x.pth")


def test_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    values = {
        "fractions.Fraction": Fraction(1, 2),
        "numpy._core.multiarray._reconstruct": np.arange(3),
        "numpy.dtype('M8')": np.datetime64("2026-01-01"),
    }
    for name, value in values.items():
        torch.save({"model": {"w": torch.ones(1)}, "x": value}, path)
        with pytest.raises(UserError) as error:
            load_checkpoint(path)
        fix = 'torch.save(torch.load("c.pth", weights_only=False)["model"], "weights.pth")'
        sentence = f"{path} holds {name}, which could run code and is refused; if you trust it, save its weights alone:"
        assert str(error.value) == f"{sentence} {fix}"


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"])
def test_rubbish_is_reported(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(UserError, match="no checkpoint, or a damaged one"):
        load_checkpoint(tmp_path / "c.pth")


OPCODES = [code.code.encode("latin-1") for code in pickletools.opcodes]


@given(st.lists(st.sampled_from([*OPCODES, b"\0", b"\1"]), max_size=6))
def test_any_pickle_is_read_or_refused(codes: list[bytes]) -> None:
    """In a format without checksums; torch's reader raises nearly anything."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.pth"
        path.write_bytes(b"\x80\2" + b"".join(codes) + b".")
        with pytest.raises(UserError):
            load_checkpoint(path)


def test_too_little_memory_is_no_damage(tmp_path: Path) -> None:
    """Or a good checkpoint would be passed over for the one before."""
    for size in (10, 25_000_000):
        save_last(tmp_path, {"model": {"a": torch.zeros(size)}}, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000, hard))
    try:
        with pytest.raises(UserError, match=r"too little memory to read .*checkpoint\.pth; free some") as caught:
            load_last(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert not isinstance(caught.value, DamagedCheckpoint)
    found = load_last(tmp_path)
    assert found is not None
    assert found.path == tmp_path / "checkpoint.pth"


def test_a_torn_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    save_checkpoint(path, {"model": {"a": torch.ones(1000)}})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, ["weight is (2, 4) there and (2, 3) here"]),
        ({"weight": torch.ones(2, 3)}, ["bias is missing there"]),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "x": torch.ones(1)}, ["x is unknown here"]),
    ],
)
def test_another_model_is_reported_by_name_and_shape(weights: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_weights(nn.Linear(3, 2), weights, "c.pth")
    assert all(word in str(error.value) for word in words)


def vim(**options: Any) -> VisionMamba:
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 2, "num_classes": 5}
    return VisionMamba(**{**small, "drop_path_rate": 0.0, **options})


def originals_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """As timm 0.4.12's create_optimizer makes it for the original's main.py."""
    skip = {"pos_embed", "cls_token", "dist_token", "cls_token_head", "cls_token_tail"}
    no_decay, decay = [], []
    for name, p in model.named_parameters():
        (no_decay if len(p.shape) == 1 or name.endswith(".bias") or name in skip else decay).append(p)
    groups = [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.05}]
    return torch.optim.AdamW(groups, lr=1e-3, eps=1e-8, weight_decay=0.0, foreach=False)


def originals_file(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    schedule = {"base_values": [1e-3, 1e-3], "noise_range_t": None, "param_group_field": "lr", "t_initial": 300}
    args = argparse.Namespace(model="vim_tiny_patch16_224", lr=1e-3, opt_betas=None, aa="rand-m9-mstd0.5-inc1", gpu=0)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule,
        "epoch": 4,
        "model_ema": model.state_dict(),
        "scaler": "none",
        "args": args,
    }
    torch.save(state, path)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.tensor([step % 5, 1, 2, 3])).backward()
        optimizer.step()


@pytest.mark.parametrize("decay_a_log", [True, False])
def test_training_continues_from_hustvls_file(tmp_path: Path, decay_a_log: bool) -> None:
    """To the weights of an uninterrupted run; decay_a_log=False moves A_log into the other group, out of order."""
    options = {"init_layer_scale": 0.5, "use_double_cls_token": True}
    model = vim(**options)
    optimizer = originals_optimizer(model)
    train(model, optimizer, range(3))
    originals_file(tmp_path / "c.pth", model, optimizer)
    if not decay_a_log:
        rates = {id(p) for name, p in model.named_parameters() if name.endswith(("A_log", "A_b_log"))}
        groups = optimizer.param_groups
        groups[0]["params"] += [p for p in groups[1]["params"] if id(p) in rates]
        groups[1]["params"] = [p for p in groups[1]["params"] if id(p) not in rates]
    train(model, optimizer, range(3, 6))

    state = load_checkpoint(tmp_path / "c.pth")
    assert state["args"].aa == "rand-m9-mstd0.5-inc1"
    ours = vim(**options)
    load_weights(ours, state["model"], "c.pth")
    resumed = build_optimizer(OptimConfig(lr=7.0, decay_a_log=decay_a_log), ours, 1e-3)
    fused = resumed.param_groups[0]["fused"]
    load_optimizer(resumed, ours, state)
    assert [group["fused"] for group in resumed.param_groups] == [fused, fused]
    train(ours, resumed, range(3, 6))
    for name, want in model.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], want, rtol=1e-5, atol=1e-6, msg=name)


def test_an_optimizer_of_another_model_is_reported(tmp_path: Path) -> None:
    model = vim()
    optimizer = originals_optimizer(model)
    train(model, optimizer, range(1))
    for other in (vim(depth=3), vim(embed_dim=24)):
        with pytest.raises(ValueError, match=r"it moves 41 parameters and the model trains|there and .* here"):
            load_optimizer(
                build_optimizer(OptimConfig(), other, 1e-3),
                other,
                {"optimizer": optimizer.state_dict(), "lr_scheduler": {}},
            )


def test_finetuning_at_another_size_with_another_head(tmp_path: Path) -> None:
    old = vim()
    new = vim(img_size=48, num_classes=3)
    head = new.head.weight.clone()
    with torch.no_grad():
        old.pos_embed[:, 8] = 7.0  # the class token's
    notes = load_for_finetuning(new, old.state_dict(), "c.pth", resample="patches")
    assert notes == [
        "position embedding resampled from 17 to 37 positions",
        "head has 3 classes here and 5 in c.pth: it starts from initial values",
    ]
    assert torch.equal(new.head.weight, head)
    assert torch.equal(new.layers[1].mixer.D, old.layers[1].mixer.D)
    assert (new.pos_embed[:, 18] == 7).all()
    extra = {name: value for name, value in old.state_dict().items() if name != "norm_f.weight"}
    notes = load_for_finetuning(vim(), {**extra, "neck.weight": torch.ones(1)}, "c.pth", resample="patches")
    assert notes == [
        "not in c.pth, so as initialized: norm_f.weight",
        "in c.pth and not loaded, for the model has none: neck.weight",
    ]
    with pytest.raises(UserError, match=r"of another model: .* is \(1, 17, 16\) there and \(1, 17, 24\) here"):
        load_for_finetuning(vim(embed_dim=24), {"pos_embed": old.pos_embed}, "c.pth", resample="patches")
    with pytest.raises(UserError, match=r"no weight of this model \(its first is fc.weight\)"):
        load_for_finetuning(vim(), {"fc.weight": torch.ones(2, 2)}, "c.pth", resample="patches")


def test_evaluation_at_another_size_and_at_its_own() -> None:
    old, new = vim(), vim(img_size=48)
    state = {name: value.clone() for name, value in old.state_dict().items()}
    line = "position embedding resampled from 17 to 37 positions"
    assert load_weights(new, state, "c.pth", resample="patches") == [f"{line}, taken for a square grid of patches"]
    assert load_weights(new, old.state_dict(), "c.pth", resample="patches") == [line]
    assert load_weights(new, state, "c.pth", resample="patches", img_size=32) == [line]
    with pytest.raises(UserError, match="there and"):
        load_weights(new, state, "c.pth")
    other = vim()
    with torch.no_grad():
        other.pos_embed.zero_()
    for how in ("patches", "original"):
        assert load_weights(other, state, "c.pth", resample=how) == []
        assert all(torch.equal(state[name], value) for name, value in other.state_dict().items())


def a_state(size: int = 1000) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"model": {f"w{i}": torch.randn(size, generator=generator) for i in range(5)}, "epoch": 3}


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_no_flipped_bit_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    save_checkpoint(path, a_state(20))
    sound = path.read_bytes()
    random = np.random.default_rng(0)
    ends = [*range(64), *range(8 * len(sound) - 600, 8 * len(sound))]  # the first header, and all of the checksum
    for bit in [*ends, *random.integers(0, 8 * len(sound), 200).tolist()]:
        path.write_bytes(sound)
        flip(path, bit)
        with pytest.raises(DamagedCheckpoint, match="no checkpoint, or a damaged one"):
            load_checkpoint(path)
    for length in (1, len(sound) // 2, len(sound) - 8, len(sound) - 25):
        path.write_bytes(sound[:length])
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(path)


def test_weights_of_files_without_our_checksum_are_verified_too(tmp_path: Path) -> None:
    """torch.save writes a CRC for each record."""
    path = tmp_path / "c.pth"
    torch.save(a_state(), path)
    assert load_checkpoint(path)["epoch"] == 3
    at = path.read_bytes().index(a_state()["model"]["w2"].numpy().tobytes())
    flip(path, 8 * at + 3)
    with pytest.raises(DamagedCheckpoint, match=r"the checksum of .* does not match"):
        load_checkpoint(path)


def test_any_reader_of_torchs_files_reads_ours(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    save_checkpoint(path, a_state())
    for options in ({}, {"mmap": True}):
        read = torch.load(path, weights_only=True, **options)
        assert torch.equal(read["model"]["w4"], a_state()["model"]["w4"])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    """torch.save raises its own RuntimeError instead of what the disk said."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        with pytest.raises(UserError, match=r"c.pth cannot be written \(File too large\)"):
            save_checkpoint(tmp_path / "c.pth", a_state(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert list(tmp_path.iterdir()) == []


def epochs(folder: Path) -> dict[str, int]:
    return {path.name: load_checkpoint(path)["epoch"] for path in sorted(folder.iterdir())}


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    for epoch in range(4):
        save_last(tmp_path, {**a_state(), "epoch": epoch}, 3)
    assert epochs(tmp_path) == {"checkpoint.1.pth": 2, "checkpoint.2.pth": 1, "checkpoint.pth": 3}
    save_last(tmp_path, {**a_state(), "epoch": 4}, 1)
    assert epochs(tmp_path) == {"checkpoint.1.pth": 2, "checkpoint.2.pth": 1, "checkpoint.pth": 4}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("count", [2, 3])
def test_a_kill_at_any_moment_leaves_a_sound_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool, count: int
) -> None:
    """And the save after it works, whatever was left."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    for epoch in range(3):
        save_last(tmp_path, {**a_state(), "epoch": epoch}, count)
    calls = [0]
    for call in range(6):
        with monkeypatch.context() as patch:
            for name in ("replace", "link"):
                patch.setattr(os, name, killed(getattr(os, name), calls, call))
            calls[0] = 0
            with suppress(KeyboardInterrupt):
                save_last(tmp_path, {**a_state(), "epoch": 10 + call}, count)
        found = load_last(tmp_path)
        assert found is not None
        assert found[1]["epoch"] >= 2
        save_last(tmp_path, {**a_state(), "epoch": 10 + call}, count)
        kept = kept_checkpoints(tmp_path)
        assert 2 <= len(kept) <= count
        assert load_checkpoint(kept[0])["epoch"] == 10 + call


def killed(function: Callable[..., None], calls: list[int], at: int) -> Callable[..., None]:
    def wrapped(*arguments: Any) -> None:
        if calls[0] == at:
            raise KeyboardInterrupt
        calls[0] += 1
        function(*arguments)

    return wrapped


def test_the_last_sound_one_is_loaded_and_never_overwritten_by_a_damaged_one(tmp_path: Path) -> None:
    for epoch in range(2):
        save_last(tmp_path, {**a_state(), "epoch": epoch}, 2)
    flip(tmp_path / "checkpoint.pth", 4000)
    found = load_last(tmp_path)
    assert found is not None
    path, state, damaged = found
    assert (path.name, state["epoch"], len(damaged)) == ("checkpoint.1.pth", 0, 1)
    assert [p.name for p in set_aside(tmp_path, path)] == ["checkpoint.pth"]
    assert [p.name for p in kept_checkpoints(tmp_path)] == ["checkpoint.1.pth"]
    save_last(tmp_path, {**a_state(), "epoch": 5}, 2)
    (tmp_path / "checkpoint.aside.pth").unlink()
    assert epochs(tmp_path) == {"checkpoint.1.pth": 0, "checkpoint.pth": 5}
    for path in kept_checkpoints(tmp_path):
        flip(path, 4000)
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint.pth .*; .*checkpoint.1.pth .*begin again"):
        load_last(tmp_path)

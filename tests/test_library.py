"""vimfast as other people's code uses it: the names of the package, the loader in any loop, the page that shows it."""

from __future__ import annotations

import ast
import concurrent.futures.thread
import copy
import gc
import multiprocessing
import os
import pickle
import re
import threading
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_image
from forked import run_forked
from object_servers import wait_for

import vimfast
from vimfast import Loader, UserError, evaluation_loader, open_source, training_loader
from vimfast.data.dropping import closer
from vimfast.data.loader import LoaderSettings
from vimfast.data.views import Batch

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "library.md").read_text()
# On the page are the sizes that people use; here, those that take seconds.
SMALLER = {
    'create_model("vim_tiny_patch16_224", ': 'create_model("vim_tiny_patch16_224", img_size=32, depth=2, ',
    "batch_size=128)": "batch_size=4, size=32)",
    "batch_size=128,": "batch_size=4, size=32,",
    "Order(len(source), batch_size=4, size=32, ": "Order(len(source), batch_size=4, ",
}


def open_training(tree: Path, batch_size: int = 4, **options: Any) -> Loader:
    return training_loader(tree, batch_size, size=32, device="cpu", **options)


@pytest.fixture
def loader(tree: Path) -> Iterator[Loader]:
    with open_training(tree) as loader:
        yield loader


def same(ours: Batch, theirs: Batch) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_type_checkers_see_the_names_that_there_are() -> None:
    stub = ast.parse((ROOT / "vimfast" / "__init__.pyi").read_text())
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {"__version__", *seen} == set(vimfast.__all__)
    for name, origin in seen.items():
        home, _, own = origin.rpartition(".")
        assert getattr(vimfast, name) is getattr(__import__(home, fromlist=[own]), own)
    assert set(vimfast.__all__) <= set(dir(vimfast))
    with pytest.raises(AttributeError, match="no attribute 'open_sauce'"):
        vimfast.open_sauce  # noqa: B018


def test_each_loop_is_an_epoch(loader: Loader) -> None:
    assert len(loader) == 9
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == 9
    for epoch, batches in enumerate((first, second)):
        with open_training(Path(loader.source.name(0)).parents[2]) as explicit:
            assert all(map(same, batches, explicit.epoch(epoch)))
    assert not same(first[0], second[0])


def test_a_loop_that_ends_early_is_an_epoch_too(loader: Loader) -> None:
    _ = [next(iter(loader)) for _ in range(2)]
    assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (1, 1)
    third = next(iter(loader))
    assert same(third, next(loader.epoch(2)))


def test_a_dropped_loader_takes_its_threads_along(tree: Path) -> None:
    """As in a notebook whose cells are run again and again."""
    closer(os.getpid())  # which stays
    before = set(threading.enumerate())
    loader = open_training(tree)
    next(iter(loader))
    began = set(threading.enumerate()) - before
    assert began
    seen = weakref.ref(loader)
    del loader
    gc.collect()
    for thread in began:
        thread.join(30)
        assert not thread.is_alive(), thread.name
    wait_for(lambda: seen() is None)


def drop_one_where_a_lock_is_held(tree: Path) -> None:
    """Whoever starts a thread for a pool holds it, and a collection may run there."""
    loader = open_training(tree, settings=LoaderSettings(threads=2))
    next(iter(loader))
    with concurrent.futures.thread._global_shutdown_lock, threading._active_limbo_lock:  # type: ignore[attr-defined]
        del loader
        gc.collect()
    print("dropped")


def test_a_loader_is_dropped_where_closing_it_would_wait(tree: Path) -> None:
    """It waited for a lock that its own thread held, for ever."""
    done = run_forked(drop_one_where_a_lock_is_held, tree, seconds=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "dropped\n", "")


def test_a_loader_stays_in_its_process(loader: Loader) -> None:
    """In a fork nobody would read for it, and a loop would wait for ever."""
    other = open_training(Path(loader.source.name(0)).parents[2])
    for each in (loader, other):
        next(iter(each))
    del each
    answers, answer = multiprocessing.get_context("fork").Pipe(duplex=False)

    def use_it() -> None:
        nonlocal other
        try:
            next(iter(loader))
        except UserError as error:
            del other
            gc.collect()
            answer.send(str(error))

    child = multiprocessing.get_context("fork").Process(target=use_it)
    child.start()
    try:
        assert answers.poll(60)
        assert "was opened in another process, whose threads" in answers.recv()
    finally:
        child.kill()
        child.join()
    for send in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(UserError, match=r"neither copied nor sent; open one in the process that uses it"):
            send(loader)


def test_an_evaluation_is_the_same_each_time(tree: Path) -> None:
    with evaluation_loader(tree, 4, size=32, device="cpu") as loader:
        first, second = list(loader), list(loader)
    assert [len(batch.labels) for batch in first] == [4, 4, 4, 3]
    assert torch.cat([batch.labels for batch in first]).tolist() == open_source(tree, "val").labels.tolist()
    assert all(map(same, first, second))


@pytest.mark.parametrize("done", [0, 5, 9, 12])
def test_a_new_loader_continues_at_the_saved_place(tree: Path, loader: Loader, done: int, tmp_path: Path) -> None:
    taken = (batch for _ in range(2) for batch in loader)
    assert len(list(islice(taken, done))) == done
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    left = [*taken]
    with open_training(tree) as other:
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert other.state_dict() == torch.load(tmp_path / "state.pt", weights_only=True)
        resumed = list(other)
    assert len(resumed) == 9 - done % 9
    assert all(map(same, resumed, left))


def test_in_mid_epoch_the_order_must_be_the_same(tree: Path, loader: Loader) -> None:
    next(iter(loader))
    state = loader.state_dict()
    for options, words in (({"seed": 1}, "seed was 0 and is 1"), ({"batch_size": 2}, "global_batch was 4 and is 2")):
        with open_training(tree, **options) as other:
            with pytest.raises(UserError, match=f"state is of epoch 0, step 1, and {words}: .*; keep that as it was"):
                other.load_state_dict(state)
            other.load_state_dict({**state, "step": 0})
    for nonsense in ({}, {"epoch": 1}, {"epoch": -1, "step": 0}, {"epoch": "1", "step": 0}):
        with pytest.raises(UserError, match="is not the state of a loader"):
            loader.load_state_dict(nonsense)


def test_what_cannot_be_opened_is_one_sentence(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="batch_size is 0; it must be at least 1"):
        open_training(tree, 0)
    with pytest.raises(UserError, match=r"36 training images do not fill one step of 1 x 64; lower .* to at most 36"):
        open_training(tree, 64)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="no process group yet: each would see all images; call "):
        open_training(tree)


def test_ranks_of_a_process_group_share_each_batch(tree: Path, tmp_path: Path) -> None:
    """One process says that it is either of two: the loader asks nothing else of the group."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with open_training(tree, 8) as loader, pytest.MonkeyPatch.context() as patch:
            whole = next(iter(loader))
            patch.setattr("torch.distributed.get_world_size", lambda: 2)
            for rank in (0, 1):
                patch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
                with open_training(tree) as share:
                    assert len(share) == 4
                    assert same(next(iter(share)), Batch(whole.images[rank::2], whole.labels[rank::2]))
    finally:
        torch.distributed.destroy_process_group()


def test_the_page_about_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for split, count in (("train", 8), ("val", 3)):
        for number, label in enumerate(("cat", "dog")):
            for i in range(count):
                write_image(tmp_path / "shards" / split / label / f"{i}.jpg", 10 * number + i)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
    for on_the_page, here in SMALLER.items():
        assert on_the_page in code
        code = code.replace(on_the_page, here)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/library.md", "exec"), names)
    names["loader"].close()
    assert re.search(r"epoch 1: loss \d\.\d\d\ntop-1 \d+\.\d %", capsys.readouterr().out)
    assert names["step"] == 1
    assert names["loader"].state_dict()["epoch"] == 4  # the loop that was resumed ended its epoch, LoRA's had another
    assert names["adapted"].peft_config
    assert all(block.mixer.fused for block in names["model"].layers)


def test_the_reference_has_every_name_and_no_others() -> None:
    """docs/api.md, read as its site reads it: by Griffe, from the files."""
    import griffe
    from docstring_links import DocstringLinks

    described = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert set(vimfast.__all__) - {"__version__"} <= {name.rpartition(".")[2] for name in described}
    paths, extensions = [ROOT, ROOT / "kernels"], griffe.Extensions(DocstringLinks())
    packages = {
        name: griffe.load(name, search_paths=paths, extensions=extensions, docstring_parser="google")
        for name in ("vimfast_kernels", "vimfast")
    }
    for name in described:
        package, _, path = name.partition(".")
        found = packages[package][path]
        assert found.docstring, name
        assert not re.search(r":\w+:`", found.docstring.value), name
    loader = packages["vimfast"]["data.epochs.Epochs"].docstring.value
    assert '<autoref identifier="vimfast.data.loader.Loader" optional><code>Loader</code></autoref>' in loader

"""Stores: the same answers from every kind of server, and one sentence for whatever goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from object_servers import BUCKET, EXPIRED, SLOW_DOWN, Proxy, Trouble, moto, s3

from vimfast.errors import UserError
from vimfast.stores import Entry, Missing, Store, is_url, open_object, open_store

__all__ = ["moto", "s3"]  # fixtures

CONTENT = bytes(range(256)) * 40


@pytest.fixture(params=["s3", "gs", "memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty folder of each kind. Google's API is S3's where it speaks XML, as obstore does."""
    if request.param in ("s3", "gs"):
        proxy: Proxy = request.getfixturevalue("s3")
        monkeypatch.setenv("GOOGLE_BASE_URL", proxy.url)
        monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "token")
        return open_store(f"{request.param}://{BUCKET}/{tmp_path.name}/", patience=5)
    return open_store(f"{request.param}://{tmp_path}/below")


def test_what_is_put_is_read(store: Store, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(CONTENT)
    store.put("a.bin", tmp_path / "local")
    store.put("deeper/b.bin", b"short")
    assert store.read("a.bin") == CONTENT
    assert store.read_range("a.bin", 1000, 300) == CONTENT[1000:1300]
    assert sorted(store.entries()) == [Entry("a.bin", len(CONTENT)), Entry("deeper/b.bin", 5)]
    assert list(store.entries("deeper")) == [Entry("deeper/b.bin", 5)]
    assert store.find("a.bin") == Entry("a.bin", len(CONTENT))
    store.put("a.bin", b"")
    assert store.read("a.bin") == b""
    store.remove("a.bin")
    store.remove("a.bin")
    assert store.find("a.bin") is None
    with pytest.raises(Missing, match=r"a\.bin does not exist"):
        store.read("a.bin")
    with pytest.raises(UserError, match=r"b\.bin is too short: it ends before byte 6"):
        store.read_range("deeper/b.bin", 2, 4)


def test_an_object_is_a_file(store: Store) -> None:
    store.put("a.bin", CONTENT)
    with open_object(store, "a.bin", buffer=1000) as file:
        assert file.read(1500) == CONTENT[:1500]
        file.seek(-10, 2)
        assert file.read() == CONTENT[-10:]
        file.seek(5000)
        assert file.read(3) == CONTENT[5000:5003]
    with pytest.raises(Missing, match=r"no.bin does not exist"):
        open_object(store, "no.bin")


def test_a_web_server_is_a_store_that_cannot_list(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    store = open_store(f"http://127.0.0.1:{server.server_address[1]}/", patience=1)
    assert store.read("a.bin") == CONTENT
    assert store.find("a.bin") == Entry("a.bin", len(CONTENT))
    assert store.find("b.bin") is None
    with pytest.raises(UserError, match="web server, which cannot list"):
        list(store.entries())
    with pytest.raises(UserError, match=r"a.bin cannot be read: its server does not answer requests for parts"):
        store.read_range("a.bin", 10, 10)
    server.shutdown()
    server.server_close()


def test_no_such_bucket(s3: Proxy) -> None:
    store = open_store("s3://elsewhere/shards")
    with pytest.raises(Missing, match=r"s3://elsewhere/shards/manifest.json cannot be read: there is no such bucket"):
        store.read("manifest.json")
    with pytest.raises(Missing, match="s3://elsewhere/shards cannot be read: there is no such bucket"):
        list(store.entries())


def test_throttling_and_broken_connections_pass(s3: Proxy) -> None:
    store = open_store(f"s3://{BUCKET}/passing")
    store.put("a.bin", CONTENT)
    s3.troubles = [
        Trouble("a.bin", 2, status=503, body=SLOW_DOWN),
        Trouble("a.bin", 1, status=429),
        Trouble("a.bin", 1, cut=100),
    ]
    assert store.read("a.bin") == CONTENT
    s3.troubles = [Trouble("a.bin", 1, cut=100)]
    assert store.read_range("a.bin", 500, 1000) == CONTENT[500:1500]


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        (Trouble(status=400, body=EXPIRED), "the credentials have expired or are not valid .400 ExpiredToken.; renew"),
        (Trouble(status=401), "the credentials have expired or are not valid .401.; renew them"),
        (Trouble(status=403), "access is denied .403.; set AWS_ACCESS_KEY_ID"),
        (Trouble(status=503, body=SLOW_DOWN), "the store has refused requests for 1 s .503 SlowDown.; run again"),
        (Trouble(status=301), "the bucket is in another region; set AWS_REGION"),
    ],
)
def test_what_does_not_pass_is_one_sentence(s3: Proxy, trouble: Trouble, sentence: str) -> None:
    store = open_store(f"s3://{BUCKET}/x", patience=1)
    s3.troubles = [trouble]
    for ask in (store.read, lambda name: store.read_range(name, 0, 5)):
        with pytest.raises(UserError, match=f"s3://{BUCKET}/x/a.tar cannot be read: {sentence}") as raised:
            ask("a.tar")
        assert "\n" not in str(raised.value)
        assert "Debug" not in str(raised.value)


def test_a_fork_is_refused_rather_than_hung(s3: Proxy) -> None:
    store = open_store(f"s3://{BUCKET}/forked")
    store.put("a.bin", b"x")
    child = os.fork()
    if not child:
        try:
            store.read("a.bin")
        except RuntimeError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_nobody_there(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"s3://bucket/x/a.tar cannot be read .*sending request.*; check the network"):
        open_store("s3://bucket/x", patience=0.5).read("a.tar")


def test_what_is_a_url() -> None:
    assert is_url("s3://bucket/shards")
    assert not is_url("shards/train")
    assert not is_url("/data/s3:/x")
    with pytest.raises(UserError, match="fsspec knows no file system 'nonsense'"):
        open_store("nonsense://x").read("a")


def test_without_the_client_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "from vimfast.stores import open_store\n"
        "try: open_store('s3://bucket/x')\n"
        "except Exception as error: print(error)"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said == (
        "s3://bucket/x is read by the package obstore, which is not installed; pip install 'vimfast[remote]'\n"
    )

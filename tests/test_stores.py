"""Stores: the same answers from every kind of server, and one sentence for whatever goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from object_servers import BUCKET, EXPIRED, SLOW_DOWN, Proxy, Trouble

from vimfast.errors import UserError
from vimfast.stores import Entry, Missing, Store, is_url, open_object, open_store

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


def refusal(code: str, more: str = "") -> bytes:
    """As S3's protocol writes it."""
    return f"<Error><Code>{code}</Code><Message>Why.</Message>{more}</Error>".encode()


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        (Trouble(status=400, body=EXPIRED), "the credentials have expired or are not valid .400 ExpiredToken.; renew"),
        (Trouble(status=401), "the credentials have expired or are not valid .401.; renew them"),
        (Trouble(status=403), "access is denied .403.; set AWS_ACCESS_KEY_ID"),
        (
            Trouble(status=403, body=refusal("AccessDenied")),
            "access is denied .403 AccessDenied.; use credentials that may, and check the URL",
        ),
        (
            Trouble(status=403, body=refusal("InvalidAccessKeyId")),
            "the store does not know the access key .403 InvalidAccessKeyId.; check AWS_ACCESS_KEY_ID and AWS_ENDPOINT",
        ),
        (
            Trouble(status=403, body=refusal("SignatureDoesNotMatch")),
            "the secret key is not that of the access key .403 SignatureDoesNotMatch.; check AWS_SECRET_ACCESS_KEY",
        ),
        (Trouble(status=403, body=refusal("RequestTimeTooSkewed")), "the clock of this machine is wrong .*; set it"),
        (Trouble(status=503, body=SLOW_DOWN), "the store has refused requests for 1 s .503 SlowDown.; run again"),
        (Trouble(status=500, body=refusal("InternalError")), "the store has failed for 1 s .500 InternalError.; run"),
        (Trouble(status=501), "its server does not know such requests .501.; check the address"),
        (Trouble(status=301), "the bucket is in another region; set AWS_REGION to its region"),
        (
            Trouble(status=400, body=refusal("AuthorizationHeaderMalformed", "<Region>eu-west-1</Region>")),
            "the bucket is in another region; set AWS_REGION=eu-west-1",
        ),
        (Trouble(status=400, body=refusal("Odd")), "the store refuses the request .400 Odd Why..; check the URL"),
    ],
)
def test_what_does_not_pass_is_one_sentence(s3: Proxy, trouble: Trouble, sentence: str) -> None:
    store = open_store(f"s3://{BUCKET}/x", patience=1)
    s3.troubles = [trouble]
    for ask in (store.read, lambda name: store.read_range(name, 0, 5)):
        with pytest.raises(UserError, match=f"s3://{BUCKET}/x/a.tar cannot be read: {sentence}") as raised:
            ask("a.tar")
        assert "\n" not in str(raised.value)
        assert "<" not in str(raised.value)
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


@pytest.mark.parametrize(
    ("endpoint", "sentence"),
    [
        ("http://127.0.0.1:9", r"http://127.0.0.1:9 has not answered for 0 s .Connection refused.; check the network"),
        ("http://nobody.invalid", r"http://nobody.invalid has not answered for 0 s .*; check .* AWS_ENDPOINT_URL"),
        ("https", "https://127.0.0.1:.* does not speak TLS; write http:// for https://"),
    ],
)
def test_nobody_there(s3: Proxy, monkeypatch: pytest.MonkeyPatch, endpoint: str, sentence: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url.replace("http", "https") if endpoint == "https" else endpoint)
    with pytest.raises(UserError, match=rf"s3://bucket/x/a.tar cannot be read: {sentence}"):
        open_store("s3://bucket/x", patience=0.4).read("a.tar")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "localhost", "http://", "http://127.0.0.1:port"])
def test_an_endpoint_that_is_no_address(s3: Proxy, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """obstore panics at it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UserError, match=rf"AWS_ENDPOINT_URL is '{endpoint}'; give the address of a server, such as"):
        open_store("s3://bucket/x").read("a.tar")


def test_a_wait_for_the_first_answer_is_told(
    s3: Proxy, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The address may be wrong, and three minutes without a word are long. Afterwards, the run has words of its own."""
    monkeypatch.setattr("vimfast.stores.objects.QUIET", 0.5)
    store = open_store(f"s3://{BUCKET}/waiting")
    store.put("a.bin", CONTENT)
    again = open_store(f"s3://{BUCKET}/waiting")
    s3.troubles = [Trouble("a.bin", 5, status=503, body=SLOW_DOWN)]
    assert again.read("a.bin") == CONTENT
    said = capfd.readouterr().err
    assert said == (
        f"warning: s3://{BUCKET}/waiting/a.bin cannot be read: the store has refused requests for 0 s (503 SlowDown); "
        "it is asked again for up to 180 s\n"
    )
    s3.troubles = [Trouble("a.bin", 5, status=503, body=SLOW_DOWN)]
    assert again.read("a.bin") == CONTENT
    assert not capfd.readouterr().err


def test_a_wait_for_a_file_system_is_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("vimfast.stores.filesystems.QUIET", 0.0)
    system = fsspec.filesystem("memory")
    monkeypatch.setattr(type(system), "cat_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(UserError, match=r"memory://waiting/a.bin cannot be read \(no route\); check the address"):
        open_store("memory://waiting", patience=0.5).read("a.bin")
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "warning: memory://waiting/a.bin cannot be read (no route); it is asked again for up to 0 s"


@pytest.fixture
def home(s3: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Of somebody without credentials in the environment, on a machine without a role."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    return tmp_path / ".aws"


def test_no_credentials_at_all(home: Path) -> None:
    with pytest.raises(UserError, match="s3://bucket/x cannot be read: no credentials were found; set AWS_ACCESS_KEY"):
        open_store("s3://bucket/x").read("a.tar")


@pytest.mark.parametrize(
    ("profile", "sentence"),
    [
        ("credential_process=/bin/false", "Error when retrieving credentials from custom-process"),
        ("aws_access_key_id=half", "Partial credentials found"),
        ("role_arn=arn:aws:iam::1:role/x\nsource_profile=gone", 'The source_profile "gone" .* does not exist'),
        ("sso_start_url=https://x.invalid\nsso_region=us-east-1\nsso_account_id=1\nsso_role_name=x", "SSO Token"),
        ("[broken", "Unable to parse config file"),
    ],
)
def test_a_profile_that_leads_to_no_credentials(
    home: Path, monkeypatch: pytest.MonkeyPatch, profile: str, sentence: str
) -> None:
    (home / "config").write_text(f"[profile mine]\n{profile}\n")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    with pytest.raises(UserError, match=f"s3://bucket/x cannot be read: .*{sentence}.*; log in again, or check"):
        open_store("s3://bucket/x").read("a.tar")


def test_a_profile_that_is_not_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "gone")
    with pytest.raises(UserError, match=r"s3://bucket/x cannot be read: .*profile \(gone\) could not be found; log in"):
        open_store("s3://bucket/x").read("a.tar")


def test_a_profile_has_credentials_region_and_endpoint(home: Path, s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the AWS tools take them; the environment wins."""
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    (home / "config").write_text(
        f"[profile mine]\naws_access_key_id=x\naws_secret_access_key=y\nregion=eu-west-3\nendpoint_url={s3.url}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "mine")
    store = open_store(f"s3://{BUCKET}/profile")
    store.put("a.bin", CONTENT)
    assert store.read("a.bin") == CONTENT
    assert all("/eu-west-3/" in signature for signature in s3.signatures)
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert open_store(f"s3://{BUCKET}/profile").read("a.bin") == CONTENT
    assert "/eu-north-1/" in s3.signatures[-1]


def test_what_is_a_url() -> None:
    assert is_url("s3://bucket/shards")
    assert not is_url("shards/train")
    assert not is_url("/data/s3:/x")
    with pytest.raises(UserError, match="fsspec knows no file system 'nonsense'"):
        open_store("nonsense://x").read("a")
    with pytest.raises(UserError, match="s3:// names no bucket; write it as s3://bucket/folder"):
        open_store("s3://")


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

"""S3, Google Cloud Storage, Azure and web servers, by the package obstore.

It repeats failed requests itself (500 to 599, 429, connections, time-outs) and sends requests of several threads at
once. It was chosen by measurement over fsspec's s3fs: docs/remote.md has the figures.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import obstore
import obstore.store
from obstore.exceptions import BaseError

from vimfast.errors import UserError
from vimfast.stores.store import Entry, Missing, missing, name_in

_CONNECT, _SILENCE, _WHOLE = timedelta(seconds=10), timedelta(seconds=30), timedelta(minutes=30)
_FIRST_PAUSE, _LONGEST_PAUSE, _MOST_RETRIES = timedelta(milliseconds=100), timedelta(seconds=15), 1000
_PARALLEL_BYTES = 16 << 20  # of a part of a large object that is written
_AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
_TOO_MANY = ("429", "503")
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, run aws configure, or set AWS_SKIP_SIGNATURE=true for a "
    "public bucket",
    "gs": "run gcloud auth application-default login, or set GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_USE_AZURE_CLI=true after az login",
    "ht": "check the address",
}


class ObjectStore:
    """A folder of a bucket, or below an address of a web server (which cannot list its files)."""

    def __init__(self, url: str, patience: float) -> None:
        self.url, self._patience = url, patience
        self.lists = not url.lower().startswith("http")
        self._fix = _CREDENTIALS.get(url[:2].lower(), _CREDENTIALS["az"])

    @cached_property
    def _store(self) -> Any:
        options: dict[str, Any] = {
            "client_options": {
                "allow_http": True,  # only where somebody names such a server
                "connect_timeout": _CONNECT,
                "read_timeout": _SILENCE,
                "timeout": _WHOLE,
            },
            "retry_config": {
                "max_retries": _MOST_RETRIES,
                "retry_timeout": timedelta(seconds=self._patience),
                "backoff": {"init_backoff": _FIRST_PAUSE, "max_backoff": _LONGEST_PAUSE},
            },
        }
        if self.url.lower().startswith("s3"):
            options |= _aws_options()
        try:
            return obstore.store.from_url(self.url, **options)
        except BaseError as error:
            raise UserError(
                f"{self.url} cannot be opened ({_first_line(error)})", f"check the URL; {self._fix}"
            ) from None

    def entries(self, under: str = "") -> Iterator[Entry]:
        """All objects below a folder; a web server has no way to say."""
        if not self.lists:
            raise UserError(
                f"{self.url} is on a web server, which cannot list its files", "give a bucket's URL instead"
            )
        with self._sentences(under):
            for batch in obstore.list(self._store, under or None):
                for found in batch:
                    yield Entry(found["path"], found["size"])

    def find(self, name: str) -> Entry | None:
        """The object of this name; None where there is none, or no bucket."""
        try:
            with self._sentences(name):
                return Entry(name, obstore.head(self._store, name)["size"])
        except Missing:
            return None

    def read(self, name: str) -> bytes:
        """All of an object."""
        with self._sentences(name):
            return obstore.get(self._store, name).bytes().to_bytes()

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Part of an object, in one request."""
        with self._sentences(name):
            data = obstore.get_range(self._store, name, start=offset, length=size).to_bytes() if size else b""
        if len(data) != size:
            raise _too_short(self, name, offset + size)
        return data

    def put(self, name: str, content: bytes | Path) -> None:
        """Write an object, a large one in parts; it appears once the last of them has arrived."""
        with self._sentences(name, "written"):
            obstore.put(self._store, name, content, chunk_size=_PARALLEL_BYTES)

    def remove(self, name: str) -> None:
        """Remove an object, if there is one."""
        try:
            with self._sentences(name, "removed"):
                obstore.delete(self._store, name)
        except Missing:
            return

    @contextmanager
    def _sentences(self, name: str, done: str = "read") -> Iterator[None]:
        _refuse_after_fork()
        try:
            yield
        except (BaseError, FileNotFoundError, PermissionError) as error:
            raise self._explained(error, name, done) from None

    def _explained(self, error: Exception, name: str, done: str) -> UserError:
        """What went wrong, from the answer that obstore quotes: its status, and S3's code for it."""
        where, text = name_in(self, name), _first_line(error)
        status = _found(r"status code: (\d+)", str(error))
        code = _found(r"<Code>(\w+)</Code>", str(error))
        said = " ".join(part for part in (status, code) if part)
        if code == "NoSuchBucket":
            return Missing(f"{where} cannot be {done}: there is no such bucket", "check the URL and the region")
        if isinstance(error, FileNotFoundError) or status == "404":
            return missing(self, name)
        if "Range request not supported" in text:
            return UserError(
                f"{where} cannot be {done}: its server does not answer requests for parts of a file",
                "use one that does, such as nginx",
            )
        if status == "416":
            return _too_short(self, name, None)
        if "Expired" in code or status == "401":
            return UserError(
                f"{where} cannot be {done}: the credentials have expired or are not valid ({said})",
                "renew them, then run again",
            )
        if status == "403" and "token request" not in text:
            return UserError(f"{where} cannot be {done}: access is denied ({said})", self._fix)
        if "token request" in text or "credential" in text.lower() or "metadata" in text:
            return UserError(f"{where} cannot be {done}: no credentials were found ({text})", self._fix)
        if "LOCATION" in text or status == "301":
            return UserError(
                f"{where} cannot be {done}: the bucket is in another region", "set AWS_REGION to its region"
            )
        if status in _TOO_MANY:
            return UserError(
                f"{where} cannot be {done}: the store has refused requests for {self._patience:.0f} s ({said})",
                "run again when it is less busy",
            )
        return UserError(f"{where} cannot be {done} ({text})", "check the network and the address, then run again")


_user: list[int] = []  # the process whose threads send the requests of all stores


def _refuse_after_fork() -> None:
    """A fork has none of its parent's threads, and would wait for them without end."""
    if not _user:
        _user.append(os.getpid())
    if _user[0] != os.getpid():
        raise RuntimeError("an object store was used before this process was forked; spawn it, or open stores later")


def _too_short(store: ObjectStore, name: str, end: int | None) -> UserError:
    which = "a byte that is wanted" if end is None else f"byte {end}"
    return UserError(f"{name_in(store, name)} is too short: it ends before {which}", "copy it to the store again")


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""


def _first_line(error: Exception) -> str:
    """What obstore says, without the tree of causes that follows it."""
    return str(error).partition("\n")[0].strip()


def _aws_options() -> dict[str, Any]:
    """Region and credentials as the AWS tools find them (profiles, SSO, roles), where boto3 is installed to ask and the
    environment has none, which obstore reads itself."""
    if any(os.environ.get(key) for key in _AWS_KEYS) or find_spec("boto3") is None:
        return {}
    import boto3

    session = boto3.session.Session()
    credentials = session.get_credentials()
    options = {"region": session.region_name} if session.region_name else {}
    if credentials is None:
        return options

    def current() -> dict[str, Any]:
        """They are asked for again before they expire, which boto3 renews them for."""
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": getattr(credentials, "_expiry_time", None),
        }

    return options | {"credential_provider": current}

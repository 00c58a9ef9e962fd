"""S3, Google Cloud Storage, Azure and web servers, by the package obstore.

It repeats failed requests itself (500 to 599, 429, connections, time-outs) and sends requests of several threads at
once. It was chosen by measurement over fsspec's s3fs: docs/remote.md has the figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import obstore
import obstore.store
from obstore.exceptions import BaseError

from vimfast.errors import UserError
from vimfast.stores.answers import Unanswered, check_endpoint, explained, first_line, no_credentials, too_short
from vimfast.stores.store import QUIET, Entry, Missing, missing, name_in, tell_of_waiting

_CONNECT, _SILENCE, _WHOLE = timedelta(seconds=10), timedelta(seconds=30), timedelta(minutes=30)
_FIRST_PAUSE, _LONGEST_PAUSE, _MOST_RETRIES = timedelta(milliseconds=100), timedelta(seconds=15), 1000
_PARALLEL_BYTES = 16 << 20  # of a part of a large object that is written
_AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
_AWS_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_Result = TypeVar("_Result")


class ObjectStore:
    """A folder of a bucket, or below an address of a web server (which cannot list its files)."""

    def __init__(self, url: str, patience: float) -> None:
        self.url, self._patience = url, patience
        self.lists = not url.lower().startswith("http")
        self._answered = False  # anything, as yet

    def entries(self, under: str = "") -> Iterator[Entry]:
        """All objects below a folder; a web server has no way to say."""
        if not self.lists:
            raise UserError(
                f"{self.url} is on a web server, which cannot list its files", "give a bucket's URL instead"
            )
        listing, batch = self._ask(under, lambda client: _begun(obstore.list(client, under or None)))
        while batch is not None:
            for found in batch:
                yield Entry(found["path"], found["size"])
            batch = self._ask(under, lambda _: next(listing, None))

    def find(self, name: str) -> Entry | None:
        """The object of this name; None where there is none, or no bucket."""
        try:
            return Entry(name, self._ask(name, lambda client: obstore.head(client, name)["size"]))
        except Missing:
            return None

    def read(self, name: str) -> bytes:
        """All of an object."""
        return self._ask(name, lambda client: obstore.get(client, name).bytes().to_bytes())

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Part of an object, in one request."""
        if not size:
            return b""
        data = self._ask(name, lambda client: obstore.get_range(client, name, start=offset, length=size).to_bytes())
        if len(data) != size:
            raise too_short(name_in(self, name), offset + size)
        return data

    def put(self, name: str, content: bytes | Path) -> None:
        """Write an object, a large one in parts; it appears once the last of them has arrived."""
        self._ask(name, lambda client: obstore.put(client, name, content, chunk_size=_PARALLEL_BYTES), "written")

    def remove(self, name: str) -> None:
        """Remove an object, if there is one."""
        try:
            self._ask(name, lambda client: obstore.delete(client, name), "removed")
        except Missing:
            return

    def _ask(self, name: str, ask: Callable[[Any], _Result], done: str = "read") -> _Result:
        """What the store answers."""
        _refuse_after_fork()
        if not self._answered and self._patience > QUIET:
            try:
                return self._answer(self._hasty_client, name, ask, done, QUIET)
            except Unanswered as error:
                tell_of_waiting(error.problem, self._patience)
        return self._answer(self._client, name, ask, done, self._patience)

    def _answer(self, client: Any, name: str, ask: Callable[[Any], _Result], done: str, seconds: float) -> _Result:
        where = name_in(self, name)
        try:
            result = ask(client)
        except (BaseError, FileNotFoundError, PermissionError) as error:
            said = str(error)
            if "status code: 416" in said:
                raise too_short(where, None) from None
            gone = isinstance(error, FileNotFoundError) or "status code: 404" in said
            if gone and "<Code>NoSuchBucket</Code>" not in said:
                self._answered = True
                raise missing(self, name) from None
            raise explained(error, where, done, self.url, seconds) from None
        self._answered = True
        return result

    @cached_property
    def _client(self) -> Any:
        return self._open(self._patience)

    @cached_property
    def _hasty_client(self) -> Any:
        return self._open(QUIET)

    def _open(self, patience: float) -> Any:
        options: dict[str, Any] = {
            "client_options": {
                "allow_http": True,  # only where somebody names such a server
                "connect_timeout": _CONNECT,
                "read_timeout": _SILENCE,
                "timeout": _WHOLE,
            },
            "retry_config": {
                "max_retries": _MOST_RETRIES,
                "retry_timeout": timedelta(seconds=patience),
                "backoff": {"init_backoff": _FIRST_PAUSE, "max_backoff": _LONGEST_PAUSE},
            },
        }
        try:
            return obstore.store.from_url(self.url, **(options | self._credentials))
        except BaseError as error:
            raise UserError(f"{self.url} cannot be opened ({first_line(error)})", "check the URL") from None

    @cached_property
    def _credentials(self) -> dict[str, Any]:
        """What obstore does not find by itself."""
        if not self.url.lower().startswith("s3"):
            return {}
        check_endpoint()
        return {} if find_spec("botocore") is None else _aws_options(self.url)


_user: list[int] = []  # the process whose threads send the requests of all stores


def _refuse_after_fork() -> None:
    """A fork has none of its parent's threads, and would wait for them without end."""
    if not _user:
        _user.append(os.getpid())
    if _user[0] != os.getpid():
        raise RuntimeError("an object store was used before this process was forked; spawn it, or open stores later")


def _begun(listing: Any) -> tuple[Any, Any]:
    """A listing with its first batch, None where there is none."""
    return listing, next(listing, None)


def _aws_options(url: str) -> dict[str, Any]:
    """Region, endpoint and credentials as the AWS tools find them: in profiles, by SSO, from roles. obstore reads the
    environment itself.

    Raises:
        UserError: a profile is not valid, or there are no credentials.
    """
    import botocore.session
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.exceptions import BotoCoreError

    options: dict[str, Any] = {}
    try:
        session = botocore.session.get_session()
        profile = session.get_scoped_config()
        if not any(map(os.environ.get, _AWS_REGIONS)) and (region := session.get_config_variable("region")):
            options["region"] = region
        if endpoint := ConfiguredEndpointProvider(session.full_config, profile, "s3").provide():
            options["endpoint"] = endpoint
        if any(map(os.environ.get, _AWS_KEYS)):
            return options
        credentials = session.get_credentials()
        if credentials is None:
            raise no_credentials(url, "read", url)
        credentials.get_frozen_credentials()  # now, so that a profile that has none any more is a sentence
    except BotoCoreError as error:
        raise UserError(
            f"{url} cannot be read: {error}", "log in again, or check AWS_PROFILE and ~/.aws/config"
        ) from None

    def current() -> dict[str, Any]:
        """They are asked for again before they expire, which botocore renews them for."""
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": getattr(credentials, "_expiry_time", None),
        }

    return options | {"credential_provider": current}

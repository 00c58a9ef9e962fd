"""From a URL to a store."""

from __future__ import annotations

import re

from vimfast.errors import UserError
from vimfast.stores.store import Store

# What obstore speaks; all else is fsspec's, which takes more of the processor's time, five times for images
# (tools/bench_remote.py).
OBJECT_STORES = ("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "http", "https")
PATIENCE = 180.0  # seconds


def is_url(place: str) -> bool:
    """Whether it names a store (``s3://bucket/folder``) rather than a folder of this machine."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def open_store(url: str, *, patience: float = PATIENCE) -> Store:
    """The folder at a URL. Nothing is requested yet.

    Args:
        url: ``s3://``, ``gs://``, ``az://container/``, ``http(s)://``, or any other that fsspec has a file
            system for (``hf://``, ``sftp://``, ``memory://``, ``file://``). Credentials come from the environment and
            the files of the provider's own tools.
        patience: how long a request that fails is repeated, in seconds.

    Raises:
        UserError: what reads such a URL is not installed, or it is not valid.
    """
    scheme, _, place = url.partition("://")
    scheme, url = scheme.lower(), url.rstrip("/")
    if scheme not in OBJECT_STORES:
        from vimfast.stores.filesystems import FilesystemStore  # here, for most runs need neither

        return FilesystemStore(url, patience)
    if not place.strip("/"):
        raise UserError(f"{scheme}:// names no bucket", f"write it as {scheme}://bucket/folder")
    try:
        from vimfast.stores.objects import ObjectStore
    except ModuleNotFoundError:
        problem = f"{url} is read by the package obstore, which is not installed"
        raise UserError(problem, "pip install 'vimfast[remote]'") from None
    return ObjectStore(url, patience)

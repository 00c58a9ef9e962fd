"""Folders in object stores: one small interface to S3, Google Cloud Storage, Azure, web servers and fsspec's rest."""

from vimfast.stores.opening import is_url, open_store
from vimfast.stores.store import Entry, Missing, Store, name_in, open_object

__all__ = ["Entry", "Missing", "Store", "is_url", "name_in", "open_object", "open_store"]

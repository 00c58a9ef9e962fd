"""Imported last by the process that :mod:`forked` forks: what it does once, so that no fork has to."""

import gc

import torch.distributed.run  # noqa: F401

from vimfast.data.decoding import import_dali

import_dali()
gc.collect()
gc.freeze()  # a collection in a fork would copy every page

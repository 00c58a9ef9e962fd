"""Imported last by the process that :mod:`forked` forks: what it does once, so that no fork has to."""

import gc

import torch
import torch.distributed.run

from vimfast import create_model
from vimfast.data.decoding import import_dali


def _compile() -> None:
    """The CPU's kernels for models as narrow as those of most tests: a second, in each process that evaluates one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of them would be missing in the forks
    with torch.inference_mode():
        model = create_model("vim_tiny_patch16_224", img_size=16, embed_dim=32, depth=2).eval()
        model(torch.zeros(1, 3, 16, 16))
    torch.set_num_threads(threads)


import_dali()
_compile()
gc.collect()
gc.freeze()  # a collection in a fork would copy every page

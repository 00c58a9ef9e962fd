"""A run of training or evaluation: ``python -m vimfast.train``.

:mod:`~vimfast.train.build` puts its parts together, :mod:`~vimfast.train.loop` orders its events, and
:mod:`~vimfast.train.hooks` act on them.
"""

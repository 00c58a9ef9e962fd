"""Subcommands of ``vimfast``; each has a ``main`` that reads ``sys.argv``."""

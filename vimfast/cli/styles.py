"""Styles of words on a terminal.

Its background may be light or dark. Yellow and cyan cannot be read on white, nor blue on black: what has to be read has
the terminal's own colour.
"""

GOOD, DOUBTFUL, BAD = "bold green", "bold black on yellow", "bold red"
ADVICE = "bold"

"""An error for the user: a problem and its fix, one sentence."""

from __future__ import annotations

import pickle

import pytest

from vimfast.errors import UserError


@pytest.mark.parametrize(("fix", "sentence"), [("use 1", "it is 0; a; use 1"), (None, "it is 0; a")])
def test_a_problem_and_its_fix(fix: str | None, sentence: str) -> None:
    error = UserError("it is 0; a", fix)
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert (each.problem, each.fix, str(each)) == ("it is 0; a", fix, sentence)

"""The Chinese pages say the same as the English ones: commands, code, figures, links and parts."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/quickstart.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)]*)\)")


def contents(text: str) -> dict[str, Counter[str]]:
    """What must be the same in two languages. Comments in code are prose; so are blocks marked as text."""
    blocks = [block for kind, block in BLOCK.findall(text) if kind != "text"]
    prose = BLOCK.sub("", text)
    words = re.sub(r"`[^`\n]*`", "", LINK.sub("", prose))
    lines = [re.sub(r"(^|\s+)#.*", "", line) for block in blocks for line in block.splitlines()]
    return {
        "lines of code": Counter(filter(None, lines)),
        "code in the text": Counter(set(re.findall(r"`([^`\n]*)`", prose))),
        "links": Counter({link.replace(".zh-CN.md", ".md") for link in LINK.findall(prose)}),
        "figures": Counter(re.findall(r"\d+(?:[.,]\d+)*", words)),
        "headings": Counter(re.findall(r"^(#+) ", prose, re.MULTILINE)),
        "rows of tables": Counter(re.findall(r"^\|", prose, re.MULTILINE)),
    }


def differences(english: str, chinese: str) -> list[str]:
    """What one text has and the other lacks."""
    found = []
    for (what, ours), theirs in zip(contents(english).items(), contents(chinese).values(), strict=True):
        found += [f"{what}: only in English: {item}" for item in (ours - theirs)]
        found += [f"{what}: only in Chinese: {item}" for item in (theirs - ours)]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_the_chinese_page_says_the_same(page: str) -> None:
    english, chinese = ROOT / page, ROOT / page.replace(".md", ".zh-CN.md")
    found = differences(english.read_text(), chinese.read_text())
    assert not found, "\n".join([f"{english.name} and {chinese.name} differ:", *found])
    assert f"]({chinese.name})" in english.read_text()
    assert f"]({english.name})" in chinese.read_text()


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("--config vim_tiny ", "--config vim_small "),
        ("1,075", "1,085"),
        ("`vimfast doctor shards/`", "`vimfast doctor`"),
        ("docs/several_gpus.md", "docs/stopping.md"),
        ("## 安装\n", ""),
        ("--resume auto", "--resume last"),
    ],
)
def test_a_page_that_drifts_is_noticed(was: str, now: str) -> None:
    english, chinese = (ROOT / "README.md").read_text(), (ROOT / "README.zh-CN.md").read_text()
    assert was in chinese
    assert differences(english, chinese.replace(was, now))

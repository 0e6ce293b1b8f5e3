"""What the README and the pages say is so: tables are compared, links lead somewhere, what is named exists.

Their blocks of code are run by tests/test_snippets.py.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from sse_trio.cli import main
from sse_trio.metrics import Metrics
from sse_trio.settings import Settings

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks" / "README.md"]


def test_the_settings_table_is_the_settings() -> None:
    table = (ROOT / "docs" / "operating.md").read_text().partition("<!-- settings")[2].partition("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (?:`([^`]*)`)? ?\|", table, flags=re.MULTILINE))

    def shown(value: Any) -> str:
        if value is None:
            return ""
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    real = {str(field.validation_alias): shown(field.default) for field in Settings.model_fields.values()}
    real["SSE_DIRECT_WRITES"] = "together"  # whatever this run was told to do without (conftest.py)
    assert told == real


def test_metrics_that_are_named_exist() -> None:
    source = Path(str(Metrics.__module__.replace(".", "/"))).with_suffix(".py")
    exist = set(re.findall(r'"(sse_trio_\w+)"', (ROOT / source).read_text()))
    for page in PAGES:
        for name in set(re.findall(r"\bsse_trio_[a-z_]+\b", page.read_text())) - {"sse_trio"}:
            base = re.sub(r"_(total|bucket|sum|count)$", "", name)
            assert base in exist or (ROOT / "sse_trio" / f"{name.removeprefix('sse_trio_')}.py").exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path) if path else page
        assert found.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", found.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\s-]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_inside_sentences_exist_with_their_options(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`([^`\n]+)`", prose):
        words = [word for word in span.split() if not re.match(r"[A-Z_]+=", word)]
        if words[:1] == ["make"] and words[1:]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), span
        elif words[:1] == ["sse-trio"] and words[1:]:
            options = {option for parameter in main.commands[words[1]].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, span
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), span
        elif words[:1] == ["pytest"]:
            assert (ROOT / words[-1]).exists(), span

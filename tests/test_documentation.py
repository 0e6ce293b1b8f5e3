"""What the README and the pages say is so: commands are run, tables are compared, links lead somewhere."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from support import NatsServer, eventually, listen, payload, run_server

from sse_trio.metrics import Metrics
from sse_trio.settings import Settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(page.read_text()) if name == language]


def shape(text: str) -> str:
    """A text with what differs from run to run taken out."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text)
    text = re.sub(r"^retry: \d+$", "retry: N", text, flags=re.MULTILINE)
    return re.sub(r"^id: [a-z0-9]+-\d+$", "id: ID", text, flags=re.MULTILINE).strip()


async def test_the_readmes_curl_commands_print_what_it_says(nats: NatsServer, tmp_path: Path) -> None:
    stream, resource = blocks(ROOT / "README.md", "console")
    async with run_server(tmp_path, nats_url=nats.url) as server, listen(server.port) as witness:
        await witness.next("connected")
        command, _, expected = stream.partition("\n")
        printed = tmp_path / "stream"
        with printed.open("wb") as output:
            process = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {command.removeprefix('$ ').replace(':3000', f':{server.port}')}"],
                stdout=output,
                stderr=subprocess.DEVNULL,
            )
        try:
            await eventually(lambda: "connected" in printed.read_text(), "curl is connected")
            discovery = payload(content="unusual login pattern")
            await nats.publish(("discoveries.insights", discovery))
            await eventually(lambda: "discovery" in printed.read_text(), "curl prints the discovery")
        finally:
            process.kill()
            process.wait()
        assert shape(printed.read_text()) == shape(expected)
        event = await witness.next("discovery")
        command, _, expected = resource.partition("\n")
        real = command.removeprefix("$ ").replace(":3000", f":{server.port}").replace("m8x2k-42", event.id)
        answer = await trio.run_process(["/bin/sh", "-c", real], capture_stdout=True, capture_stderr=True)
        assert answer.stdout.decode().strip() == expected.strip()


def test_the_settings_table_is_the_settings() -> None:
    table = (ROOT / "docs" / "operating.md").read_text().partition("<!-- settings")[2].partition("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (?:`([^`]*)`)? ?\|", table, flags=re.MULTILINE))

    def shown(value: Any) -> str:
        if value is None:
            return ""
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    real = {str(field.validation_alias): shown(field.default) for field in Settings.model_fields.values()}
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
def test_python_in_the_pages_is_python_and_imports_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        tree = compile(block, str(page), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        imports: list[ast.stmt] = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_pages_exist(page: Path) -> None:
    bin_folder = Path(sys.executable).parent
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in line.partition("#")[0].split() if "=" not in word]
            if words and words[0] == "make":
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
            elif words and words[0] in {"sse-trio", "hypercorn"}:
                assert (bin_folder / words[0]).exists(), line
            elif words:
                assert shutil.which(words[0]) or (bin_folder / words[0]).exists(), line

"""The dashboard and the alerts in examples/monitoring ask for what the server has, and the alerts fire when they should.

What there is, is read from `/metrics` of a real server: every metric, label and label value that an expression names
must be among it. Prometheus' own promtool judges the rest.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import provision
import pytest
import trio
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families
from support import NatsServer, listen, payload, run_server

ROOT = Path(__file__).parent.parent
MONITORING = ROOT / "examples" / "monitoring"
GIVEN_BY_PROMETHEUS = {"job", "instance"}
SELECTOR = re.compile(r"\b(sse_trio_\w+|up)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!=|!~|=)\s*"([^"]*)"')
LABEL_LIST = re.compile(r"\b(?:by|on|group_left)\s*\(([^)]*)\)")
SHOWN = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")


@dataclass(frozen=True)
class Expression:
    """A PromQL expression, who has it, and the labels that its texts show."""

    where: str
    text: str
    shown: frozenset[str]

    @property
    def as_rule(self) -> str:
        """What Prometheus itself would read: the dashboard's variables have values."""
        return self.text.replace("$__rate_interval", "1m").replace("$job", "sse-trio").replace("$instance", ".*")


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


@cache
def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
    return read


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[Expression]:
    for rule in alerts():
        texts = " ".join(rule["annotations"].values())
        yield Expression(rule["alert"], rule["expr"], frozenset(re.findall(r"\$labels\.(\w+)", texts)))
    for panel in panels():
        for target in panel["targets"]:
            yield Expression(panel["title"], target["expr"], frozenset(SHOWN.findall(target["legendFormat"])))
    for annotation in dashboard()["annotations"]["list"]:
        shown = frozenset(SHOWN.findall(annotation["titleFormat"]))
        yield Expression(annotation["name"], annotation["expr"], shown)
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert asked is not None
            yield Expression(variable["name"], asked[1], frozenset({asked[2]}))


def promtool(*arguments: str | Path, stdin: bytes | None = None) -> str:
    """Run promtool, which must agree; what it said."""
    program = provision.which("promtool")
    assert program is not None, "promtool is needed; tests/provision.py gets it"
    done = subprocess.run([program, *arguments], input=stdin, capture_output=True, timeout=60)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a server says that has had something to do."""
    directory = tmp_path_factory.mktemp("monitoring")

    async def ask() -> bytes:
        nats = NatsServer(directory / "nats")
        try:
            await nats.start()
            async with run_server(directory, nats_url=nats.url) as server, listen(server.port) as client:
                await client.next("connected")
                await nats.publish(("discoveries.insights", payload()), ("discoveries.insights", b"{"))
                await client.next("discovery")
                body: bytes = (await server.get("/metrics"))[1]
                return body
        finally:
            nats.kill()

    return trio.run(ask)


@pytest.fixture(scope="module")
def known(rendered: bytes) -> dict[str, dict[str, set[str]]]:
    """Every name of a sample, with its labels and their values."""
    samples: dict[str, dict[str, set[str]]] = {"up": {}}
    for family in text_string_to_metric_families(rendered.decode()):
        for sample in family.samples:
            labels = samples.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return samples


def test_promtool_finds_nothing_wrong_with_the_metrics(rendered: bytes) -> None:
    assert promtool("check", "metrics", stdin=rendered) == ""


@pytest.mark.parametrize("expression", list(expressions()), ids=lambda expression: expression.where)
def test_every_metric_label_and_value_that_is_asked_for_exists(
    expression: Expression, known: dict[str, dict[str, set[str]]]
) -> None:
    labels = set(GIVEN_BY_PROMETHEUS)
    selectors = SELECTOR.findall(expression.text)
    assert selectors
    for name, matchers in selectors:
        assert name in known, name
        labels |= set(known[name])
        for label, pattern in MATCHER.findall(matchers):
            assert label in set(known[name]) | GIVEN_BY_PROMETHEUS, f"{name} has no label {label}"
            if label not in GIVEN_BY_PROMETHEUS:
                assert set(pattern.split("|")) <= known[name][label], f"{name} never has {label}={pattern}"
    listed = {label.strip() for found in LABEL_LIST.findall(expression.text) for label in found.split(",")} - {""}
    assert listed <= labels
    grouped = LABEL_LIST.search(expression.text) or re.search(r"\b(sum|min|max|count)\s*\(", expression.text)
    assert expression.shown <= (listed if grouped else labels), "a text shows a label that the result does not have"


def test_promtool_reads_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"e{n}", "expr": expression.as_rule} for n, expression in enumerate(expressions())]
    path = tmp_path / "expressions.yaml"
    path.write_text(json.dumps({"groups": [{"name": "expressions", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", path)


def test_every_metric_is_on_the_dashboard_and_in_the_manual(known: dict[str, dict[str, set[str]]]) -> None:
    named = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in known if not name.endswith("_created")}
    named -= {"up"}
    shown = {name for found in expressions() for name, _ in SELECTOR.findall(found.text)}
    # Who speaks is a label of the target here.
    assert named - {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in shown} == {"sse_trio_instance"}
    table = (ROOT / "docs" / "operating.md").read_text().partition("<!-- metrics")[2].partition("\n## ")[0]
    told = re.findall(r"^\| `(\w+?)(?:\{(\w+)\})?` \|", table, flags=re.MULTILINE)
    assert {re.sub(r"_total$", "", name) for name, _ in told} == named
    for name, label in told:
        if label:
            assert label in known[name]


def test_the_dashboards_panels_have_names_and_room() -> None:
    everything = dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another"
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"


def test_the_alerts_fire_for_their_cause_and_for_nothing_else() -> None:
    assert "SUCCESS" in promtool("check", "config", MONITORING / "prometheus.yaml")
    assert "SUCCESS" in promtool("test", "rules", MONITORING / "alerts-test.yaml")
    tried = (MONITORING / "alerts-test.yaml").read_text()
    for rule in alerts():
        assert rule["alert"] in tried, "no test lets it fire"
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}

"""What examples/deploy ships, as far as it can be tried without a container engine, a systemd or a cluster.

Each file goes through the linters of its kind, the commands in it are run, and the locks hold what pyproject.toml asks
for.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import trio
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement
from provision import which
from support import NatsServer, Server, eventually, free_port, listen, run_server

from sse_trio.settings import Settings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "examples" / "deploy"
BIN = Path(sys.executable).parent
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def lint(*command: object) -> str:
    """What a linter says; a complaint fails the test with its words."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def instruction(name: str) -> list[str]:
    """The exec form of the Dockerfile's last such instruction."""
    (*_, found) = re.finditer(rf'^{name} (?:[^\n]*\\\n)?[^\n]*?(\[".*"\])$', DOCKERFILE, re.MULTILINE)
    return list(json.loads(found[1]))


def test_the_dockerfile_is_what_hadolint_wants() -> None:
    lint(BIN / "hadolint", DEPLOY / "Dockerfile")


def test_the_image_runs_as_nobody_and_copies_what_exists() -> None:
    users = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    assert users
    assert int(users[-1][0]) > 0
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source


async def test_the_images_command_serves_and_its_health_check_tells_alive_from_dead(
    nats: NatsServer, tmp_path: Path
) -> None:
    program, *arguments = [*instruction("ENTRYPOINT"), *instruction("CMD")]
    port = free_port()

    def check() -> int:
        command = [sys.executable, *instruction("HEALTHCHECK")[1:]]
        return subprocess.run([word.replace(":3000/", f":{port}/") for word in command], capture_output=True).returncode

    assert await trio.to_thread.run_sync(check) != 0
    command = (str(BIN / program), *(word.replace("0.0.0.0:3000", f"127.0.0.1:{port}") for word in arguments))
    async with run_server(tmp_path, nats_url=nats.url, command=command, port=port) as server:
        assert await trio.to_thread.run_sync(check) == 0
        await stops_with_zero(server)
    assert await trio.to_thread.run_sync(check) != 0


async def stops_with_zero(server: Server) -> None:
    server.process.terminate()
    assert await server.exited() == 0, server.output


def test_the_compose_file_is_one_and_closes_what_it_can() -> None:
    compose = DEPLOY / "compose.yaml"
    lint(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", compose)
    lint(BIN / "yamllint", "--strict", "-d", YAMLLINT, compose)
    ours = yaml.safe_load(compose.read_text())["services"]["sse-trio"]
    assert ours["read_only"] is True
    assert ours["cap_drop"] == ["ALL"]
    assert (compose.parent / ours["build"]["context"] / ours["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert_settings_exist(ours["environment"])


YAMLLINT = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"


def assert_settings_exist(names: Any) -> None:
    """A variable that no setting reads would be a typo."""
    known = {str(field.validation_alias) for field in Settings.model_fields.values()}
    assert set(names) <= known, set(names) - known


def test_the_kubernetes_objects_are_valid_and_fit_each_other() -> None:
    manifest = DEPLOY / "kubernetes.yaml"
    lint(BIN / "kubernetes-validate", "--strict", "-k", "1.33", manifest)
    lint(BIN / "yamllint", "--strict", "-d", YAMLLINT, manifest)
    objects = {found["kind"]: found for found in yaml.safe_load_all(manifest.read_text())}
    pod = objects["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert_settings_exist(environment)
    assert pod["spec"]["terminationGracePeriodSeconds"] > 2 * float(environment["SSE_DRAIN_DELAY"]) + 5
    for labels in (
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert labels == pod["metadata"]["labels"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"


def test_the_systemd_unit_is_one_and_is_exposed_little(tmp_path: Path) -> None:
    analyze = which("systemd-analyze")
    assert analyze, "systemd-analyze is not installed (apt-get install systemd)"
    unit = tmp_path / "sse-trio.service"
    text = (DEPLOY / "sse-trio.service").read_text()
    (command,) = re.findall(r"^ExecStart=(\S+)", text, re.MULTILINE)
    unit.write_text(text.replace(command, str(BIN / "sse-trio")))
    said = lint(analyze, "verify", "--man=no", unit)
    assert str(unit) not in said
    exposure = lint(analyze, "security", "--offline=true", "--no-pager", "--threshold=15", unit)
    assert re.search(r"Overall exposure level .*: [01]\.\d OK", exposure), exposure[-200:]
    assert "\nKillMode=mixed\n" in text


def test_the_lock_holds_everything_that_the_project_asks_for_with_hashes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for file, asked in (
        ("requirements.txt", project["project"]["dependencies"]),
        ("requirements-build.txt", project["build-system"]["requires"]),
    ):
        text = (DEPLOY / file).read_text()
        assert "://" not in text
        pins = re.findall(r"^([\w.-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE)
        assert len(pins) == len(re.findall(r"^[\w.-]+==", text, re.MULTILINE)), "each has its hashes"
        locked = {name.lower().replace("_", "-"): version for name, version, _ in pins}
        for requirement in map(Requirement, asked):
            name = requirement.name.lower().replace("_", "-")
            assert requirement.specifier.contains(locked[name]), f"{file}: {requirement} is not {locked[name]}"


async def test_a_process_whose_whole_group_is_told_to_stop_drains_all_the_same(
    nats: NatsServer, tmp_path: Path
) -> None:
    """The unit says KillMode=mixed; a supervisor that signals the whole group must not cut anybody off either."""
    command = (str(BIN / "sse-trio"), "serve", "--workers", "2", "--bind")
    port = free_port()
    async with run_server(
        tmp_path, nats_url=nats.url, command=(*command, f"127.0.0.1:{port}"), port=port, start_new_session=True
    ) as server:
        await eventually(server.is_live, "the feed is live")
        async with listen(port) as client:
            await client.next("connected")
            os.killpg(server.process.pid, signal.SIGTERM)
            assert json.loads((await client.next("goodbye")).data) == {"reason": "shutdown"}
            await client.read_to_end()
        assert await server.exited() == 0, server.output

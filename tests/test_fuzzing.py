"""Requests that a machine makes up from our own description of ourselves: schemathesis, with every check on.

A short run stands in the suite, `make fuzz` is the long one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio
from support import NatsServer, eventually, payload, run_server
from test_attacks import SECRET, token

SECONDS = int(os.environ.get("FUZZ_SECONDS", "30"))

# An id of a page that belongs to another run of the feed is of the right form all the same.
CONFIGURATION = """
[[operations]]
include-operation-id = "latest"
checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "403"]
"""

OPEN: dict[str, str] = {}
CLOSED = {"SSE_JWT_SECRET": SECRET}
EVERYTHING = token(sub="fuzzer", agent_ids=["*"], subjects=[">"], roles=["admin"], share=True)


@pytest.mark.parametrize("env", [OPEN, CLOSED], ids=["without tokens", "with tokens"])
async def test_no_request_that_can_be_made_up_finds_us_other_than_described(
    nats: NatsServer, tmp_path: Path, env: dict[str, str]
) -> None:
    configuration = tmp_path / "schemathesis.toml"
    configuration.write_text(CONFIGURATION)
    # A stream that has said what it has to say must end, or each of its answers would be waited for.
    short_streams = {"SSE_MAX_LIFETIME": "0.2", "LOG_FORMAT": "json"}
    async with run_server(tmp_path, nats_url=nats.url, env=env | short_streams) as server:
        await eventually(server.is_live, "the feed is live")
        await nats.publish(*(("discoveries.insights", payload(number)) for number in range(20)))
        report = tmp_path / "report.json"
        command = [
            str(Path(sys.executable).parent / "schemathesis"),
            *("--config-file", str(configuration)),
            *("run", f"{server.url}/openapi.json", "--checks", "all", "--max-time", str(SECONDS), "--no-color"),
            *("--continue-on-failure", "--generation-database", "none", "--request-timeout", "30"),
            *("--report", "json", "--report-json-path", str(report)),
            *(("-H", f"Authorization: Bearer {EVERYTHING}") if env else ()),
        ]
        run = partial(subprocess.run, command, capture_output=True, text=True, cwd=tmp_path, timeout=SECONDS + 300)
        done = await trio.to_thread.run_sync(run)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        (made,) = re.findall(r"(\d+) generated", done.stdout)
        print(f"\n{made} requests")
        assert int(made) > 100
        assert json.loads(report.read_text())
        assert await server.is_live()
        assert "Traceback" not in server.output
        assert EVERYTHING not in server.output

"""Three agents who share what they find, for the demo and the examples: one finding every few seconds, some related."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

__all__ = ["sample_agents"]

Share = Callable[[Mapping[str, Any]], Awaitable[str]]
"""Shares the fields of a discovery and returns its URI."""

FINDINGS = {
    ("security-001", "Security"): [
        ("Anomaly", "Unusual login pattern from an internal subnet at 03:12"),
        ("Pattern", "The same user agent probes every service in turn"),
        ("Question", "Has anybody else seen port 8443 open on the build hosts?"),
        ("Solution", "Rotating the deploy key stops the failed logins"),
    ],
    ("performance-002", "Performance"): [
        ("Pattern", "Latency doubles whenever the nightly backup runs"),
        ("Insight", "90 % of queries touch only the last seven days"),
        ("Anomaly", "Memory of worker 3 grows by 2 MB an hour"),
        ("Solution", "An index on (tenant, created_at) halves the p99"),
    ],
    ("research-003", "Research"): [
        ("Insight", "Two unrelated papers describe the same failure mode"),
        ("Connection", "The login anomaly and the slow backups share a host"),
        ("Question", "Which of the sources were measured, which estimated?"),
        ("Pattern", "Reports that cite numbers are corrected twice as fast"),
    ],
}


async def sample_agents(share: Share, *, seconds: float = 2.0) -> None:
    """Share a finding of one agent after the other, about every `seconds` seconds, for ever."""
    agents = list(FINDINGS)
    latest: str | None = None
    while True:
        for agent_id, role in agents:
            kind, content = random.choice(FINDINGS[agent_id, role])
            related = latest if kind == "Connection" or random.random() < 0.25 else None
            latest = await share(
                {
                    "agent_id": agent_id,
                    "agent_role": role,
                    "discovery_type": kind,
                    "content": content,
                    "confidence": round(random.uniform(0.4, 0.99), 2),
                    "related_to": related,
                }
            )
            await trio.sleep(random.uniform(0.5, 1.5) * seconds)

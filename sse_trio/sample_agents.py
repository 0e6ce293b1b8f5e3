"""Three agents who share what they find, for the demo and the examples: one finding every few seconds, some related.

Strategy: a script that is told over and over. So no two findings nearby are the same, which would look as if one had been
delivered twice, and what a finding says it belongs to was really told before it.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

__all__ = ["sample_agents"]

Share = Callable[[Mapping[str, Any]], Awaitable[str]]
"""Shares the fields of a discovery and returns its URI."""

SECURITY = ("security-001", "Security")
PERFORMANCE = ("performance-002", "Performance")
RESEARCH = ("research-003", "Research")

FINDINGS: list[tuple[tuple[str, str], str, str, int | None]] = [
    (SECURITY, "Anomaly", "Unusual login pattern from an internal subnet at 03:12", None),
    (PERFORMANCE, "Pattern", "Latency doubles whenever the nightly backup runs", None),
    (RESEARCH, "Connection", "The login anomaly began in the minute of the backup that slows everything", 1),
    (SECURITY, "Question", "Has anybody else seen port 8443 open on the build hosts?", None),
    (PERFORMANCE, "Insight", "90% of queries touch only the last seven days", None),
    (RESEARCH, "Insight", "Two unrelated papers describe the same failure mode of retries", None),
    (SECURITY, "Insight", "The logins use the deploy key, and nobody's password", 0),
    (PERFORMANCE, "Solution", "Older partitions moved to slow disks: the cache fits again", 4),
    (RESEARCH, "Question", "Which of the sources were measured, which estimated?", None),
    (SECURITY, "Solution", "Rotating the deploy key stops the failed logins", 6),
    (PERFORMANCE, "Anomaly", "Memory of worker 3 grows by 2 MB an hour", None),
    (RESEARCH, "Pattern", "Reports that cite numbers are corrected twice as fast", None),
    (SECURITY, "Pattern", "The same user agent probes every service in turn", None),
    (PERFORMANCE, "Question", "Does worker 3 hold file watches that the others have closed?", 10),
    (RESEARCH, "Insight", "Growth of this kind was a watcher for each reload in three old incidents", 13),
    (SECURITY, "Anomaly", "A certificate of the staging gateway runs out in six days", None),
    (PERFORMANCE, "Solution", "Closing the old watcher on reload keeps worker 3 flat", 14),
    (RESEARCH, "Connection", "Port 8443 belongs to the debugger that the papers warn of", 3),
    (SECURITY, "Solution", "Build images without the debugger close port 8443", 17),
    (PERFORMANCE, "Insight", "An index on (tenant, created_at) halves the p99", None),
    (RESEARCH, "Question", "Is there a run of the load test from before the index?", 19),
    (SECURITY, "Question", "Who may renew certificates while the owner is away?", 15),
    (PERFORMANCE, "Anomaly", "One replica answers 40 ms later than its neighbours", None),
    (RESEARCH, "Insight", "A survey of 112 outages blames clocks more often than disks", None),
    (SECURITY, "Pattern", "Probes stop at the first answer that carries a version", 12),
    (PERFORMANCE, "Connection", "The slow replica is the one whose clock is corrected in steps", 23),
    (RESEARCH, "Pattern", "Questions with a time of day in them are answered first", None),
    (SECURITY, "Insight", "Answers without versions: the probes have moved on", 24),
    (PERFORMANCE, "Solution", "With the clock slewed, the replica answers like the others", 25),
    (RESEARCH, "Solution", "A column for measured or estimated settles which figures to cite", 8),
]
"""Who, what kind, what it says, and the index of the earlier one that it belongs to."""


async def sample_agents(share: Share, *, seconds: float = 2.0) -> None:
    """Share the findings one after the other, about every `seconds` seconds, for ever."""
    while True:
        uris: list[str] = []
        for (agent_id, role), kind, content, earlier in FINDINGS:
            uri = await share(
                {
                    "agent_id": agent_id,
                    "agent_role": role,
                    "discovery_type": kind,
                    "content": content,
                    "confidence": round(random.uniform(0.4, 0.99), 2),
                    "related_to": None if earlier is None else uris[earlier],
                }
            )
            uris.append(uri)
            await trio.sleep(random.uniform(0.5, 1.5) * seconds)

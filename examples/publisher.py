"""An agent in plain nats-py and asyncio, without any of sse-trio: shares five discoveries.

Try it (with `make demo` instead, set NATS_URL to what the demo prints after "Share one:", and run the last line only):

    nats-server &
    sse-trio serve &
    curl -N 'http://127.0.0.1:3000/discoveries/stream?agent_id=me' &
    python examples/publisher.py

NATS_URL names another server. The headers make a stream take each of them once, however often it is sent.
"""

import asyncio
import json
import os
import uuid
from datetime import UTC, datetime

import nats


async def main() -> None:
    connection = await nats.connect(os.environ.get("NATS_URL", "nats://127.0.0.1:4222"))
    for number in range(1, 6):
        discovery = {
            "agent_id": "counter-001",
            "agent_role": "Example",
            "discovery_type": "Insight",
            "content": f"I can count to {number}",
            "confidence": 0.9,
            "timestamp": datetime.now(UTC).isoformat(),
            "related_to": None,
        }
        await connection.publish(
            "discoveries.insights", json.dumps(discovery).encode(), headers={"Nats-Msg-Id": str(uuid.uuid4())}
        )
        print("shared:", discovery["content"])
    await connection.drain()


asyncio.run(main())

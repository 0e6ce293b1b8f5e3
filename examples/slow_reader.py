"""A reader that is too slow: watch what the server does for it, and what it says it could not.

Try it against a server with little room, while something publishes a lot:

    SSE_BUFFER=10 SSE_HISTORY=0 NATS_DURABLE=off sse-trio serve &
    python examples/slow_reader.py &
    while true; do python examples/publisher.py; done

With history (the default) the same reader misses nothing: it reads on from there at its own pace.
"""

import socket
import sys
import time
from urllib.parse import urlsplit

url = urlsplit(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:3000")
pause = float(sys.argv[2]) if len(sys.argv) > 2 else 0.5

connection = socket.socket()
connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that the kernel does not read for us
connection.connect((url.hostname, url.port))
connection.sendall(f"GET /discoveries/stream?agent_id=slow HTTP/1.1\r\nHost: {url.netloc}\r\n\r\n".encode())

event = ""
heard = missed = 0
for line in connection.makefile("r", encoding="utf-8", newline="\n"):
    if line.startswith("event: "):
        event = line[7:].strip()
    elif line.startswith("data: "):
        if event == "discovery":
            heard += 1
        elif event == "gap":
            missed += 1
            print(f"after {heard} discoveries a gap: {line[6:].strip()}", flush=True)
        elif event == "goodbye":
            print("goodbye:", line[6:].strip(), flush=True)
            break
        time.sleep(pause)
print(f"heard {heard} discoveries and {missed} gaps")

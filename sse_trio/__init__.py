"""sse-trio: discoveries from NATS to web clients, as Server-Sent Events.

Read it from the bottom; a module imports only from lower layers (tests/test_layering.py):

    7  cli, server, page/                   the commands, the server as a process, the live page
       embedded_nats, child, sample_agents  what the demo runs beside it
    6  application, app                     what is there once per process, and the one nursery; the one Hypercorn serves
    5  routes, resources                    the HTTP surface
       services                             what routes answer from, and how they read a request
    4  stream, reader                       one SSE response from head to goodbye; reading discoveries back
    3  nats_feed, publisher, listener       NATS in, NATS out, and a client of our own
       connection, access, metrics          below ASGI; who may do what; what is counted
    2  broadcaster                          who is listening
    1  client, history, nats_connection     one client's queue; the recent frames; one connection to NATS
    0  settings, discovery, sse, subjects   values and wire formats

`testing` stands beside them: the teardown harness, for other projects too, imports trio only.
"""

__version__ = "0.1.0"

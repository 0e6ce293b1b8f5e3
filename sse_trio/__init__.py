"""sse-trio: discoveries from NATS to web clients, as Server-Sent Events.

Read it from the bottom; a module imports only from lower layers (tests/test_layering.py):

    7  cli, embedded_nats, page/            commands, the child nats-server, the live page
    6  app                                  what is there once per process, and the one nursery
    5  routes                               the HTTP surface
    4  stream                               one SSE response, from head to goodbye
    3  nats_feed, publisher, listener       NATS in, NATS out, and a client of our own
       connection, access, metrics          below ASGI; who may do what; what is counted
    2  broadcaster                          who is listening
    1  client, history, nats_connection     one client's queue; the recent frames; one connection to NATS
    0  settings, discovery, sse, subjects   values and wire formats

`testing` stands beside them: the teardown harness, for other projects too, imports trio only.
"""

__version__ = "0.1.0"

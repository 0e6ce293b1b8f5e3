"""sse-trio: discoveries from NATS to web clients, as Server-Sent Events.

Read it from the bottom; a module imports only from lower layers (tests/test_layering.py):

    7  cli, server, tail, doctor        the commands, and the server as a process
       embedded_nats, child, scratch,   what the demo runs beside it, and leaves nothing of
       sample_agents
    6  application, app                 what is there once per process, in one nursery; the one that Hypercorn serves
    5  routes, resources, openapi       the HTTP surface
       services                         what routes answer from, and how they read a request
    4  stream, reader                   one SSE response from head to goodbye; reading discoveries back
    3  nats_feed, consumer, jetstream,  NATS in: the supervisor, the stream and its consumer, what the stream keeps
       backlog
       publisher, listener              NATS out; a client of our own
       connection, asgi,                what is below ASGI: Hypercorn's and Quart-Trio's insides
       hypercorn_connection
       access, metrics, collector       who may do what; what is counted; the garbage collector
    2  broadcaster                      who is listening
    1  history, audience, client        the recent frames; who hears the same of them; one client's queue
       row                              clients that have nothing outstanding, served together
       rounds                           what NATS brings, decoded in rounds
       nats_connection, nats_client     one crash-only connection to NATS
       tokens, jwks, limits, logs       tokens and their keys; how many at once; logging
       accepting                        a crowd that comes at once, taken in and begun one by one
    0  settings, discovery, sse,        values and wire formats
       subjects, addresses,
       nats_protocol, deadline          … and a stream whose writes have a deadline
       bulk_write                       the same bytes to many sockets, with one system call

`testing` stands beside them: the teardown harness, for other projects too, imports trio only.
"""

__version__ = "0.1.0"

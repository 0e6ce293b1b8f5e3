"""The HTTP surface as OpenAPI 3.2, with the events of the stream as `itemSchema`.

Written by hand, because what a client must know (what an id means, where a gap stands) is in no type. That it agrees
with the server is shown by tests, which ask the server everything that stands here.
"""

from __future__ import annotations

from typing import Any

from sse_trio import __version__
from sse_trio.discovery import DISCOVERY_TYPES, MAX_PAYLOAD

__all__ = ["openapi_document"]

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def json_content(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def problem(description: str) -> Schema:
    return {"description": description, "content": {"application/problem+json": {"schema": ref("Problem")}}}


def parameter(name: str, description: str, schema: Schema, **more: Any) -> Schema:
    return {"name": name, "in": "query", "description": description, "schema": schema} | more


def repeated(name: str, description: str, items: Schema) -> Schema:
    return parameter(name, f"{description} Repeatable.", {"type": "array", "items": items}, style="form", explode=True)


def event(name: str, description: str, data: Schema, *, id: bool = True, retry: bool = False) -> Schema:
    """The schema of one Server-Sent Event of the stream."""
    properties: Schema = {
        "event": {"const": name},
        "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": data},
    }
    required = ["event", "data"]
    if id:
        properties["id"] = ref("EventId")
    if retry:
        properties["retry"] = {"type": "integer", "minimum": 0, "description": "Reconnection time in milliseconds."}
        required.append("retry")
    return {"type": "object", "description": description, "properties": properties, "required": required}


CONFIDENCE = {"type": "number", "minimum": 0, "maximum": 1}
TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
EVENT_ID = {"type": "string", "pattern": r"^[A-Za-z0-9.-]+-[0-9]+$", "maxLength": 128}

TOKEN = r"[^\s.>\u0000-\u001f\u007f\u0085]+"
"""A token of a NATS subject: no white space, no control characters."""

FILTERS = [
    repeated("type", "Only these discovery types, in any case.", {"type": "string", "enum": list(DISCOVERY_TYPES)}),
    repeated("role", "Only from agents of these roles.", {"type": "string", "minLength": 1}),
    repeated("agent", "Only from these agents.", {"type": "string", "minLength": 1}),
    parameter("min_confidence", "Only at or above.", CONFIDENCE),
    repeated(
        "subject",
        "Only NATS subjects that match this pattern (`*` is one token, `>` the rest).",
        {"type": "string", "maxLength": 256, "pattern": rf"^{TOKEN}(\.{TOKEN})*(\.>)?$|^>$"},
    ),
]

EVENTS: dict[str, Schema] = {
    "ConnectedEvent": event(
        "connected",
        "The first event. `id` is the client's own cursor when it resumes, else the newest event's.",
        {
            "type": "object",
            "properties": {
                "agent_id": TEXT,
                "client_id": {"type": "string", "format": "uuid"},
                "resumed": {
                    "type": ["boolean", "null"],
                    "description": "Only where a cursor was sent; null: not known yet.",
                },
            },
            "required": ["agent_id", "client_id"],
        },
        retry=True,
    ),
    "DiscoveryEvent": event(
        "discovery", "A discovery was shared: a JSON-RPC notification that names it by its URI.", ref("Notification")
    ),
    "GapEvent": event(
        "gap",
        "Events are missing here; `id` is the last of them. `missed` counts those that the filter would have let "
        "through; null where that cannot be known.",
        {
            "type": "object",
            "properties": {
                "reason": {"type": "string", "enum": ["overflow", "expired", "restart", "upstream"]},
                "missed": {"type": ["integer", "null"], "minimum": 0},
            },
            "required": ["reason", "missed"],
        },
    ),
    "CursorEvent": event(
        "cursor", "Nothing for this filter, but the cursor moves on.", {"type": "object", "maxProperties": 0}
    ),
    "GoodbyeEvent": event(
        "goodbye",
        "The last event of a stream that the server ends; `retry` says when to come back.",
        {
            "type": "object",
            "properties": {
                "reason": {
                    "type": "string",
                    "enum": ["shutdown", "lifetime", "overflow", "kicked", "capacity", "expired"],
                }
            },
            "required": ["reason"],
        },
        id=False,
        retry=True,
    ),
}

DISCOVERY: Schema = {
    "type": "object",
    "description": "A discovery as it was published; keys that are not named here are kept.",
    "properties": {
        "agent_id": {"type": "string", "minLength": 1, "not": {"enum": [".", ".."]}},
        "agent_role": TEXT,
        "discovery_type": {"type": "string", "enum": list(DISCOVERY_TYPES)},
        "content": TEXT,
        "confidence": CONFIDENCE,
        "timestamp": {"type": "string", "format": "date-time"},
        "related_to": {"type": ["string", "null"]},
    },
    "required": ["agent_id", "agent_role", "discovery_type", "content", "confidence"],
}

SCHEMAS: dict[str, Schema] = {
    "EventId": EVENT_ID | {"description": "`<epoch>-<n>`: a cursor. Resumes after this event, on any instance."},
    "Discovery": DISCOVERY,
    "SharedDiscovery": DISCOVERY
    | {
        "description": "A discovery to share; without a `timestamp` it is of now.",
        "properties": DISCOVERY["properties"]
        | {"timestamp": {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]}},
    },
    "Notification": {
        "type": "object",
        "properties": {
            "jsonrpc": {"const": "2.0"},
            "method": {"const": "notifications/resources/updated"},
            "params": {
                "type": "object",
                "properties": {
                    "uri": {"type": "string", "pattern": "^discovery://agents/[^/]+/discoveries/[^/]+$"},
                    "_meta": {"type": "object", "properties": {"discovery": ref("Discovery")}},
                },
                "required": ["uri"],
            },
        },
        "required": ["jsonrpc", "method", "params"],
    },
    **EVENTS,
    "Event": {"oneOf": [ref(name) for name in EVENTS]},
    "Problem": {
        "type": "object",
        "description": "RFC 9457.",
        "properties": {
            "type": TEXT,
            "title": TEXT,
            "status": {"type": "integer"},
            "detail": TEXT,
            "errors": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"field": TEXT, "message": TEXT},
                    "required": ["field", "message"],
                },
            },
        },
        "required": ["type", "title", "status", "detail"],
    },
    "Client": {
        "type": "object",
        "properties": {
            "client_id": {"type": "string", "format": "uuid"},
            "agent_id": TEXT,
            "connected_at": {"type": "string", "format": "date-time"},
            "address": TEXT,
            "filter": {"type": "object"},
            "queued": COUNT,
            "sent": COUNT,
            "dropped": COUNT,
            "last_event_id": {"type": ["string", "null"]},
        },
        "required": [
            "client_id",
            "agent_id",
            "connected_at",
            "address",
            "filter",
            "queued",
            "sent",
            "dropped",
            "last_event_id",
        ],
    },
    "Health": {
        "type": "object",
        "properties": {
            "status": {"type": "string", "enum": ["healthy", "unhealthy"]},
            "reason": TEXT,
            "detail": TEXT,
            "instance": TEXT,
        },
        "required": ["status", "instance"],
    },
}


def paths() -> Schema:
    bad = problem("A parameter cannot be used; `errors` names it and says what it takes.")
    denied = {"401": problem("A token is needed."), "403": problem("Not allowed.")}
    away = problem("The feed is away, or too much was asked; see `Retry-After`.")
    last_event_id = {"name": "Last-Event-ID", "in": "header", "description": "The cursor.", "schema": TEXT}
    return {
        "/discoveries/stream": {
            "get": {
                "operationId": "stream",
                "summary": "Discoveries as they are shared, as Server-Sent Events.",
                "parameters": [
                    parameter(
                        "agent_id",
                        "Who is listening.",
                        {"type": "string", "pattern": "^[A-Za-z0-9._~-]{1,128}$"},
                        required=True,
                    ),
                    *FILTERS,
                    parameter("detail", "Adds the whole discovery at `params._meta.discovery`.", {"const": "full"}),
                    parameter("last_event_id", "The cursor, for clients that can set no header.", TEXT),
                    last_event_id,
                ],
                "responses": {
                    "200": {
                        "description": "The stream. Comments (`: keep-alive`) fill silence.",
                        "content": {"text/event-stream": {"itemSchema": ref("Event")}},
                    },
                    "400": bad,
                    **denied,
                    "406": problem("The client does not accept text/event-stream."),
                    "503": away,
                },
            }
        },
        "/discoveries": {
            "get": {
                "operationId": "latest",
                "summary": "The latest discoveries, newest first.",
                "parameters": [
                    *FILTERS,
                    parameter("limit", "How many.", {"type": "integer", "minimum": 1, "maximum": 500, "default": 50}),
                    parameter("before", "Those before this event: `next` of the last answer.", EVENT_ID),
                ],
                "responses": {
                    "200": {
                        "description": "One page.",
                        "content": json_content(
                            {
                                "type": "object",
                                "properties": {
                                    "discoveries": {
                                        "type": "array",
                                        "items": {
                                            "type": "object",
                                            "properties": {
                                                "id": ref("EventId"),
                                                "uri": TEXT,
                                                "subject": TEXT,
                                                "discovery": ref("Discovery"),
                                            },
                                            "required": ["id", "uri", "subject", "discovery"],
                                        },
                                    },
                                    "next": {"type": ["string", "null"]},
                                },
                                "required": ["discoveries", "next"],
                            }
                        ),
                    },
                    "400": bad,
                    **denied,
                    "503": away,
                },
            },
            "post": {
                "operationId": "share",
                "summary": f"Shares a discovery of at most {MAX_PAYLOAD} bytes over NATS.",
                "requestBody": {"required": True, "content": json_content(ref("SharedDiscovery"))},
                "responses": {
                    "202": {
                        "description": "NATS has it.",
                        "content": json_content({"type": "object", "properties": {"uri": TEXT}, "required": ["uri"]}),
                    },
                    "400": problem("`errors` names every bad field."),
                    **denied,
                    "413": problem("The discovery is too large."),
                    "415": problem("The body is not application/json."),
                    "503": away,
                },
            },
        },
        "/agents/{agent_id}/discoveries/{discovery_id}": {
            "get": {
                "operationId": "read",
                "summary": "The discovery or discoveries behind a notification's URI, as published.",
                "parameters": [
                    {"name": "agent_id", "in": "path", "required": True, "schema": TEXT},
                    {"name": "discovery_id", "in": "path", "required": True, "schema": TEXT},
                    parameter("event_id", "The notification's id: finds it whatever the agent's clock said.", TEXT),
                ],
                "responses": {
                    "200": {
                        "description": "All that have this URI.",
                        "content": json_content(
                            {
                                "type": "object",
                                "properties": {"discoveries": {"type": "array", "items": ref("Discovery")}},
                                "required": ["discoveries"],
                            }
                        ),
                    },
                    "304": {"description": "What `If-None-Match` names is still so."},
                    **denied,
                    "404": problem("There is none, or retention has taken it."),
                    "503": away,
                },
            }
        },
        "/clients": {
            "get": {
                "operationId": "clients",
                "summary": "Who is listening to this process.",
                "responses": {
                    "200": {
                        "description": "This process's clients.",
                        "content": json_content(
                            {
                                "type": "object",
                                "properties": {
                                    "instance": TEXT,
                                    "clients": {"type": "array", "items": ref("Client")},
                                },
                                "required": ["instance", "clients"],
                            }
                        ),
                    },
                    **denied,
                },
            }
        },
        "/clients/{client_id}": {
            "delete": {
                "operationId": "kick",
                "summary": "Ends a stream. It may come back.",
                "parameters": [{"name": "client_id", "in": "path", "required": True, "schema": TEXT}],
                "responses": {
                    "204": {"description": "It is ending."},
                    **denied,
                    "404": problem("No such client in this process."),
                },
            }
        },
        "/health": {
            "get": {
                "operationId": "health",
                "summary": "Readiness: whether the feed is live.",
                "responses": {
                    "200": {"description": "Ready.", "content": json_content(ref("Health"))},
                    "503": {"description": "Not ready, and why.", "content": json_content(ref("Health"))},
                },
            }
        },
        "/livez": {
            "get": {
                "operationId": "livez",
                "summary": "Liveness: the process serves.",
                "responses": {"200": {"description": "Alive.", "content": json_content({"type": "object"})}},
            }
        },
        "/metrics": {
            "get": {
                "operationId": "metrics",
                "summary": "Metrics for Prometheus.",
                "responses": {"200": {"description": "Metrics.", "content": {"text/plain": {"schema": TEXT}}}},
            }
        },
    }


def openapi_document() -> Schema:
    """The document that `GET /openapi.json` answers."""
    return {
        "openapi": "3.2.0",
        "info": {
            "title": "sse-trio",
            "version": __version__,
            "summary": "Discoveries that AI agents share over NATS, as Server-Sent Events.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": paths(),
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
                "cookie": {"type": "apiKey", "in": "cookie", "name": "__Secure-sse_trio"},
            },
        },
        "security": [{}, {"bearer": []}, {"cookie": []}],
    }

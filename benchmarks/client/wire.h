/* The wire: from readiness of a socket to body bytes of the clients behind it.
 *
 * A connection is TCP, with TLS or without, and speaks HTTP/1.1 (one client) or HTTP/2 (one or more). Only what a
 * client of an endless response needs is here: no trailers, no compression of our header fields, the largest windows.
 * Everything is non-blocking; what a server does wrong ends the connection and is counted by kind.
 */
#ifndef WIRE_H
#define WIRE_H

#include "books.h"

#ifndef WITHOUT_TLS
#include <openssl/ssl.h>
#else
typedef void SSL;
#endif

typedef enum { REFUSED, BROKEN, CLOSED, BAD_STATUS, BAD_TLS, BAD_HTTP, TOO_LATE, FAILURES } Failure;
extern const char *const failure_names[FAILURES];

typedef struct {
    int port;
    const char *path; /* `{n}` in it stands for the client's number */
    bool tls, http2;
} Target;

typedef struct {
    enum { UNUSED, CONNECTING, HANDSHAKING, OPEN, GONE } state;
    int fd;
    SSL *ssl;
    Client *clients;
    int count;          /* of its clients */
    uint32_t remaining; /* bytes of the chunk or frame being read */
    enum { IN_HEAD, IN_SIZE, IN_CHUNK, AFTER_CHUNK, UNCHUNKED } part; /* HTTP/1.1: where the reader is */
    uint8_t frame[9];   /* HTTP/2: the frame's header, and what it says */
    uint8_t type, flags;
    bool size_ended;    /* HTTP/1.1: an extension follows the chunk's size */
    uint32_t stream;
    uint32_t unacknowledged; /* HTTP/2: bytes read since the windows were last opened */
    uint16_t have;      /* bytes of head, chunk size or frame that are in `head` or `frame` so far */
    char *head;         /* HTTP/1.1: the response's head; HTTP/2: a control frame's payload */
} Connection;

/* Failures before a client was listening, and streams that ended afterwards. */
extern uint64_t failures[FAILURES], ended_streams;
extern int last_bad_status;

void wire_setup(const Target *target);
/* Begins to connect and to watch it with `epoll`; its events carry `index`. */
void connection_open(Connection *connection, int epoll, uint32_t index, int number);
/* Does what `epoll_wait` says is possible. */
void connection_proceed(Connection *connection, int epoll, uint32_t index);
void connection_fail(Connection *connection, Failure failure);
/* Whether each of its clients is listening or has failed. */
bool connection_is_settled(const Connection *connection);

#endif

#define _GNU_SOURCE
#include "wire.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { HEAD_MAX = 8192, READ_MAX = 1 << 18 };
enum { DATA = 0, HEADERS = 1, RST_STREAM = 3, SETTINGS = 4, PING = 6, GOAWAY = 7, WINDOW_UPDATE = 8 };
enum { END_STREAM = 1, ACK = 1, END_HEADERS = 4, PADDED = 8, PRIORITY = 32 };

const char *const failure_names[FAILURES] = {"refused", "reset", "closed", "status", "tls", "http", "too_late"};
uint64_t failures[FAILURES], ended_streams;
int last_bad_status;

static Target target;
#ifndef WITHOUT_TLS
static SSL_CTX *tls;
#endif

void wire_setup(const Target *the_target) {
    target = *the_target;
#ifndef WITHOUT_TLS
    if (!target.tls) return;
    tls = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_mode(tls, SSL_MODE_RELEASE_BUFFERS);
    const unsigned char *protocol = (const unsigned char *)(target.http2 ? "\2h2" : "\10http/1.1");
    SSL_CTX_set_alpn_protos(tls, protocol, target.http2 ? 3 : 9);
#else
    if (target.tls) {
        fprintf(stderr, "load: built without OpenSSL, cannot speak TLS\n");
        exit(2);
    }
#endif
}

/* ---- the end of it ---- */

static void client_fail(Client *client, Failure failure) {
    if (client->has_failed || client->has_ended) return;
    if (client->is_ready) {
        client->has_ended = true;
        ended_streams++;
    } else {
        client->has_failed = true;
        failures[failure]++;
    }
}

void connection_fail(Connection *connection, Failure failure) {
    if (connection->state == GONE) return;
    connection->state = GONE;
    for (int i = 0; i < connection->count; i++) client_fail(&connection->clients[i], failure);
#ifndef WITHOUT_TLS
    SSL_free(connection->ssl);
#endif
    free(connection->head);
    connection->head = NULL;
    if (connection->fd >= 0) close(connection->fd);
}

bool connection_is_settled(const Connection *connection) {
    for (int i = 0; i < connection->count; i++)
        if (!connection->clients[i].is_ready && !connection->clients[i].has_failed) return false;
    return true;
}

/* ---- writing: requests and acknowledgements only, far smaller than a socket's buffer ---- */

static void put(Connection *connection, const void *data, size_t length) {
    ssize_t written;
#ifndef WITHOUT_TLS
    if (connection->ssl)
        written = SSL_write(connection->ssl, data, (int)length);
    else
#endif
        written = send(connection->fd, data, length, MSG_NOSIGNAL);
    if (written != (ssize_t)length) connection_fail(connection, BROKEN);
}

/* The target's path with the client's number in place of `{n}`. */
static int make_path(char *out, size_t size, int number) {
    const char *mark = strstr(target.path, "{n}");
    if (!mark) return snprintf(out, size, "%s", target.path);
    return snprintf(out, size, "%.*s%d%s", (int)(mark - target.path), target.path, number, mark + 3);
}

static void request_http1(Connection *connection, int number) {
    char path[1024], request[2048];
    make_path(path, sizeof path, number);
    int length = snprintf(request, sizeof request,
                          "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: text/event-stream\r\n\r\n", path,
                          target.port);
    put(connection, request, (size_t)length);
}

static size_t frame(uint8_t *out, uint32_t length, uint8_t type, uint8_t flags, uint32_t stream) {
    uint8_t head[9] = {length >> 16, length >> 8, length, type, flags, stream >> 24, stream >> 16, stream >> 8, stream};
    memcpy(out, head, 9);
    return 9;
}

static size_t window_update(uint8_t *out, uint32_t stream, uint32_t by) {
    size_t n = frame(out, 4, WINDOW_UPDATE, 0, stream);
    uint8_t value[4] = {by >> 24, by >> 16, by >> 8, by};
    memcpy(out + n, value, 4);
    return n + 4;
}

/* An HPACK literal without indexing (RFC 7541, 6.2.2) whose name is entry `name` of the static table, below 15. */
static size_t field(uint8_t *out, uint8_t name, const char *value) {
    size_t length = strlen(value), n = 0;
    out[n++] = name;
    if (length < 127) {
        out[n++] = (uint8_t)length;
    } else { /* up to 254: enough for a path */
        out[n++] = 127;
        out[n++] = (uint8_t)(length - 127);
    }
    memcpy(out + n, value, length);
    return n + length;
}

static void request_http2(Connection *connection, int number) {
    uint8_t out[512 + 64], headers[512];
    size_t n = 24;
    memcpy(out, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 24);
    n += frame(out + n, 12, SETTINGS, 0, 0);
    /* no server push; the largest window for each stream */
    memcpy(out + n, "\0\2\0\0\0\0" "\0\4\x7f\xff\xff\xff", 12);
    n += 12;
    n += window_update(out + n, 0, 0x7fffffff - 65535);
    put(connection, out, n);
    for (int i = 0; i < connection->count && connection->state == OPEN; i++) {
        char path[240], authority[32];
        make_path(path, sizeof path, number + i);
        snprintf(authority, sizeof authority, "127.0.0.1:%d", target.port);
        size_t m = 0;
        headers[m++] = 0x82;                          /* :method GET */
        headers[m++] = target.tls ? 0x87 : 0x86;      /* :scheme https or http */
        m += field(headers + m, 4, path);             /* :path */
        m += field(headers + m, 1, authority);        /* :authority */
        memcpy(headers + m, "\x0f\x04", 2);           /* accept is entry 19 = 15 + 4 */
        headers[m + 2] = 17;
        memcpy(headers + m + 3, "text/event-stream", 17);
        m += 20;
        n = frame(out, (uint32_t)m, HEADERS, END_STREAM | END_HEADERS, (uint32_t)(2 * i + 1));
        memcpy(out + n, headers, m);
        put(connection, out, n + m);
    }
}

/* ---- reading HTTP/1.1 ---- */

static void read_head(Connection *connection, uint64_t now) {
    int status = 0;
    if (sscanf(connection->head, "HTTP/1.%*c %d", &status) != 1) {
        connection_fail(connection, BAD_HTTP);
    } else if (status != 200) {
        last_bad_status = status;
        connection_fail(connection, BAD_STATUS);
    } else {
        connection->part = strcasestr(connection->head, "\r\ntransfer-encoding: chunked") ? IN_SIZE : UNCHUNKED;
        free(connection->head);
        connection->head = NULL;
        if (!books.ready_event) client_is_ready(connection->clients, now);
    }
}

static size_t gather_head(Connection *connection, const char *data, size_t length, uint64_t now) {
    if (!connection->head) connection->head = malloc(HEAD_MAX + 1);
    size_t had = connection->have, take = length < HEAD_MAX - had ? length : HEAD_MAX - had;
    memcpy(connection->head + had, data, take);
    connection->head[had + take] = 0;
    char *end = strstr(connection->head + (had > 3 ? had - 3 : 0), "\r\n\r\n");
    if (!end) {
        connection->have = (uint16_t)(had + take);
        if (connection->have == HEAD_MAX) connection_fail(connection, BAD_HTTP);
        return take;
    }
    end[2] = 0;
    size_t used = (size_t)(end + 4 - connection->head) - had;
    connection->have = 0;
    read_head(connection, now);
    return used;
}

static void read_size(Connection *connection, char c) {
    if (c == '\n') {
        connection->part = IN_CHUNK;
        connection->size_ended = false;
        if (!connection->remaining) connection_fail(connection, CLOSED); /* the last chunk: the server ends it */
    } else if (c == ';' || c == '\r') {
        connection->size_ended = true;
    } else if (!connection->size_ended) {
        int digit = c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
        if (digit < 0)
            connection_fail(connection, BAD_HTTP);
        else
            connection->remaining = connection->remaining * 16 + (uint32_t)digit;
    }
}

static void feed_http1(Connection *connection, const char *data, size_t length, uint64_t now) {
    while (length && connection->state == OPEN) {
        size_t used = 1;
        switch (connection->part) {
        case IN_HEAD:
            used = gather_head(connection, data, length, now);
            break;
        case UNCHUNKED:
            client_feed(connection->clients, data, used = length, now);
            break;
        case IN_SIZE:
            read_size(connection, *data);
            break;
        case IN_CHUNK:
            used = length < connection->remaining ? length : connection->remaining;
            client_feed(connection->clients, data, used, now);
            if (!(connection->remaining -= (uint32_t)used)) connection->part = AFTER_CHUNK;
            break;
        case AFTER_CHUNK: /* CR LF */
            if (*data == '\n') connection->part = IN_SIZE;
            break;
        }
        data += used;
        length -= used;
    }
}

/* ---- reading HTTP/2 ---- */

static Client *client_of(Connection *connection, uint32_t stream) {
    uint32_t index = stream / 2;
    return stream & 1 && index < (uint32_t)connection->count ? &connection->clients[index] : NULL;
}

static void read_response_headers(Connection *connection, Client *client, uint32_t length, uint64_t now) {
    const uint8_t *block = (const uint8_t *)connection->head, *end = block + length;
    if (connection->flags & PADDED) block++;
    if (connection->flags & PRIORITY) block += 5;
    while (block < end && (*block & 0xe0) == 0x20) block++; /* the size of a table that we never fill */
    if (block >= end || *block != 0x88) {                     /* :status 200 is entry 8 of the static table */
        client_fail(client, BAD_STATUS);
    } else if (!books.ready_event) {
        client_is_ready(client, now);
    }
}

static void end_control_frame(Connection *connection, uint32_t length, uint64_t now) {
    uint8_t out[32];
    Client *client = client_of(connection, connection->stream);
    switch (connection->type) {
    case HEADERS:
        if (client) read_response_headers(connection, client, length, now);
        break;
    case SETTINGS:
        if (!(connection->flags & ACK)) put(connection, out, frame(out, 0, SETTINGS, ACK, 0));
        break;
    case PING:
        if (!(connection->flags & ACK) && length == 8) {
            size_t n = frame(out, 8, PING, ACK, 0);
            memcpy(out + n, connection->head, 8);
            put(connection, out, n + 8);
        }
        break;
    case RST_STREAM:
        if (client) client_fail(client, CLOSED);
        break;
    case GOAWAY:
        connection_fail(connection, CLOSED);
        break;
    }
}

/* The windows are as large as they get; they are opened again long before a server could notice. */
static void acknowledge(Connection *connection, uint32_t length) {
    connection->unacknowledged += length;
    if (connection->unacknowledged < 1u << 29) return;
    uint8_t out[16];
    put(connection, out, window_update(out, 0, connection->unacknowledged));
    if (connection->count == 1 && connection->state == OPEN)
        put(connection, out, window_update(out, 1, connection->unacknowledged));
    connection->unacknowledged = 0;
}

static void begin_frame(Connection *connection) {
    const uint8_t *f = connection->frame;
    connection->remaining = (uint32_t)f[0] << 16 | (uint32_t)f[1] << 8 | f[2];
    connection->type = f[3];
    connection->flags = f[4];
    connection->stream = ((uint32_t)f[5] << 24 | (uint32_t)f[6] << 16 | (uint32_t)f[7] << 8 | f[8]) & 0x7fffffff;
    connection->part = IN_CHUNK;
    connection->have = 0;
    if (connection->type == DATA) {
        acknowledge(connection, connection->remaining);
        if (connection->flags & PADDED) connection_fail(connection, BAD_HTTP); /* no contender pads */
    } else if (connection->remaining > HEAD_MAX) {
        connection_fail(connection, BAD_HTTP);
    } else if (!connection->head) {
        connection->head = malloc(HEAD_MAX + 1);
    }
}

static void end_frame(Connection *connection, uint64_t now) {
    connection->part = IN_HEAD;
    uint32_t length = connection->have;
    connection->have = 0;
    if (connection->type != DATA) end_control_frame(connection, length, now);
    bool may_end = connection->type == DATA || connection->type == HEADERS;
    if (may_end && connection->flags & END_STREAM && connection->state == OPEN) {
        Client *client = client_of(connection, connection->stream);
        if (client) client_fail(client, CLOSED);
    }
}

static void feed_http2(Connection *connection, const char *data, size_t length, uint64_t now) {
    while (length && connection->state == OPEN) {
        size_t used;
        if (connection->part == IN_HEAD) {
            used = 9u - connection->have < length ? 9u - connection->have : length;
            memcpy(connection->frame + connection->have, data, used);
            if ((connection->have += (uint16_t)used) == 9) {
                begin_frame(connection);
                if (!connection->remaining && connection->state == OPEN) end_frame(connection, now);
            }
        } else {
            used = connection->remaining < length ? connection->remaining : length;
            if (connection->type == DATA) {
                Client *client = client_of(connection, connection->stream);
                if (client) client_feed(client, data, used, now);
            } else {
                memcpy(connection->head + connection->have, data, used);
                connection->have += (uint16_t)used;
            }
            if (!(connection->remaining -= (uint32_t)used)) end_frame(connection, now);
        }
        data += used;
        length -= used;
    }
}

/* ---- connecting, and what epoll says ---- */

static void watch(Connection *connection, int epoll, uint32_t index, uint32_t events, int operation) {
    struct epoll_event event = {.events = events, .data.u32 = index};
    if (epoll_ctl(epoll, operation, connection->fd, &event)) connection_fail(connection, BROKEN);
}

void connection_open(Connection *connection, int epoll, uint32_t index, int number) {
    uint64_t now = now_ns();
    for (int i = 0; i < connection->count; i++) connection->clients[i].started = now;
    connection->state = CONNECTING;
    connection->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (connection->fd < 0) {
        perror("load: socket");
        exit(1);
    }
    int one = 1;
    setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    /* Closed connections keep their ports for a minute: 32 source addresses have enough for many runs. */
    setsockopt(connection->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    struct sockaddr_in from = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000002u + (unsigned)number % 32)};
    struct sockaddr_in to = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)target.port), .sin_addr.s_addr = htonl(0x7f000001)};
    if (bind(connection->fd, (struct sockaddr *)&from, sizeof from) ||
        (connect(connection->fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS)) {
        connection_fail(connection, errno == ECONNREFUSED ? REFUSED : BROKEN);
        return;
    }
    watch(connection, epoll, index, EPOLLOUT, EPOLL_CTL_ADD);
}

static void request(Connection *connection, int epoll, uint32_t index) {
    connection->state = OPEN;
    int number = (int)index * connection->count;
    if (target.http2)
        request_http2(connection, number);
    else
        request_http1(connection, number);
    if (connection->state == OPEN) watch(connection, epoll, index, EPOLLIN, EPOLL_CTL_MOD);
}

#ifndef WITHOUT_TLS
static void handshake(Connection *connection, int epoll, uint32_t index) {
    int done = SSL_connect(connection->ssl);
    if (done == 1) {
        request(connection, epoll, index);
        return;
    }
    int why = SSL_get_error(connection->ssl, done);
    if (why == SSL_ERROR_WANT_READ)
        watch(connection, epoll, index, EPOLLIN, EPOLL_CTL_MOD);
    else if (why == SSL_ERROR_WANT_WRITE)
        watch(connection, epoll, index, EPOLLOUT, EPOLL_CTL_MOD);
    else
        connection_fail(connection, BAD_TLS);
}
#endif

static void connected(Connection *connection, int epoll, uint32_t index) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(connection->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        connection_fail(connection, error == ECONNREFUSED ? REFUSED : BROKEN);
        return;
    }
#ifndef WITHOUT_TLS
    if (target.tls) {
        connection->ssl = SSL_new(tls);
        SSL_set_fd(connection->ssl, connection->fd);
        connection->state = HANDSHAKING;
        handshake(connection, epoll, index);
        return;
    }
#endif
    request(connection, epoll, index);
}

static void feed(Connection *connection, const char *data, size_t length, uint64_t now) {
    books.bytes += length;
    books.reads++;
    if (target.http2)
        feed_http2(connection, data, length, now);
    else
        feed_http1(connection, data, length, now);
}

static void receive(Connection *connection) {
    static char buffer[READ_MAX];
    ssize_t length;
#ifndef WITHOUT_TLS
    if (connection->ssl) { /* all that OpenSSL holds: epoll does not see it */
        while (connection->state == OPEN && (length = SSL_read(connection->ssl, buffer, READ_MAX)) > 0)
            feed(connection, buffer, (size_t)length, now_ns());
        if (connection->state != OPEN) return;
        int why = SSL_get_error(connection->ssl, (int)length);
        if (why != SSL_ERROR_WANT_READ) connection_fail(connection, why == SSL_ERROR_ZERO_RETURN ? CLOSED : BROKEN);
        return;
    }
#endif
    length = read(connection->fd, buffer, READ_MAX);
    if (length > 0)
        feed(connection, buffer, (size_t)length, now_ns());
    else if (length == 0)
        connection_fail(connection, CLOSED);
    else if (errno != EAGAIN && errno != EINTR)
        connection_fail(connection, BROKEN);
}

void connection_proceed(Connection *connection, int epoll, uint32_t index) {
    if (connection->state == CONNECTING)
        connected(connection, epoll, index);
#ifndef WITHOUT_TLS
    else if (connection->state == HANDSHAKING)
        handshake(connection, epoll, index);
#endif
    else if (connection->state == OPEN)
        receive(connection);
}

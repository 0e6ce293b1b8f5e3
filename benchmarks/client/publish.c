#define _GNU_SOURCE
#include "publish.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "books.h"

enum { AHEAD = 1 << 16 }; /* bytes that may be made before the server has taken the last ones */

static char out[AHEAD + 1024], in[1 << 16];
static size_t made, written;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void make(Publisher *publisher, uint32_t number) {
    char body[512], *at = out + made;
    int length;
    unsigned long long stamp = now_ns();
    if (publisher->kind == NATS) {
        length = snprintf(body, sizeof body,
                          "{\"agent_id\":\"bench-%u-%llu\",\"agent_role\":\"Bench\",\"discovery_type\":\"Anomaly\","
                          "\"content\":\"unusual login pattern from internal subnet\",\"confidence\":0.75,"
                          "\"timestamp\":\"2009-02-13T23:31:30.000000Z\",\"related_to\":null}",
                          number, stamp);
        made += (size_t)sprintf(at, "PUB discoveries.insights %d\r\n%s\r\n", length, body);
    } else { /* nchan gets the finished notification: it has nothing to decode */
        length = snprintf(body, sizeof body,
                          "{\"jsonrpc\":\"2.0\",\"method\":\"notifications/resources/updated\",\"params\":{\"uri\":"
                          "\"discovery://agents/bench-%u-%llu/discoveries/1234567890-Anomaly-unusual-login-patter\"}}",
                          number, stamp);
        made += (size_t)sprintf(at,
                                "POST /publish HTTP/1.1\r\nHost: 127.0.0.1\r\nX-EventSource-Event: discovery\r\n"
                                "Content-Length: %d\r\n\r\n%s",
                                length, body);
    }
}

/* Answers NATS's PING, counts nchan's refusals. A status line that a read has cut is not counted. */
static void hear(Publisher *publisher, int fd) {
    ssize_t length = recv(fd, in, sizeof in - 1, MSG_DONTWAIT);
    if (length == 0) {
        fprintf(stderr, "load: the server that is published to has closed the connection\n");
        exit(1);
    }
    if (length < 0) return;
    in[length] = 0;
    if (publisher->kind == NATS) {
        if (strstr(in, "-ERR")) {
            fprintf(stderr, "load: nats-server says %s\n", in);
            exit(1);
        }
        if (!strncmp(in, "PING", 4) && send(fd, "PONG\r\n", 6, MSG_NOSIGNAL) < 0) die("load: PONG");
    } else {
        for (char *p = in; (p = strstr(p, "HTTP/1.1 ")); p += 9)
            if (p[9] && p[9] != '2') publisher->rejected++;
    }
}

static int dial(Publisher *publisher) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)publisher->port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to)) die("load: connecting the publisher");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (publisher->kind == NATS) {
        static const char hello[] = "CONNECT {\"verbose\":false,\"pedantic\":false}\r\nPING\r\n";
        if (recv(fd, in, sizeof in, 0) <= 0) die("load: INFO");
        if (send(fd, hello, sizeof hello - 1, MSG_NOSIGNAL) < 0 || recv(fd, in, sizeof in, 0) <= 0) die("load: PONG");
    }
    fcntl(fd, F_SETFL, O_NONBLOCK);
    return fd;
}

/* The number of discoveries that should have been made by now. */
static uint32_t due(const Publisher *publisher, uint64_t now) {
    double count = (double)(now - publisher->began) * publisher->rate / 1e9 + 1;
    return count < publisher->total ? (uint32_t)count : publisher->total;
}

static void *publish(void *argument) {
    Publisher *publisher = argument;
    int fd = dial(publisher);
    prctl(PR_SET_TIMERSLACK, 1000ul, 0ul, 0ul, 0ul);
    publisher->began = now_ns();
    /* nchan is the contender itself: whatever it takes, it is given no more than its time. NATS is not, and a
     * publisher that the others have kept from the processor may catch up. */
    uint64_t grace = publisher->kind == NCHAN ? 100000000u : 2000000000u;
    uint64_t deadline = publisher->began + (uint64_t)(publisher->total / publisher->rate * 1e9) + grace;
    uint32_t number = 0;
    for (;;) {
        uint64_t now = now_ns();
        if (now > deadline && written == made) break;
        if (written == made) made = written = 0;
        for (uint32_t wanted = due(publisher, now); number < wanted && made < AHEAD && now <= deadline; number++) {
            uint64_t planned = publisher->began + (uint64_t)(number * 1e9 / publisher->rate);
            if (now > planned && now - planned > publisher->latest) publisher->latest = now - planned;
            make(publisher, number);
        }
        if (written < made) {
            ssize_t done = send(fd, out + written, made - written, MSG_NOSIGNAL);
            if (done < 0 && errno != EAGAIN) die("load: publishing");
            if (done > 0) written += (size_t)done;
        }
        atomic_store(&publisher->sent, number);
        if (number == publisher->total && written == made) break;
        struct pollfd ready = {.fd = fd, .events = POLLIN | (written < made ? POLLOUT : 0)};
        uint64_t next = publisher->began + (uint64_t)(number * 1e9 / publisher->rate);
        now = now_ns();
        uint64_t wait = next > now ? next - now : 0;
        if (wait < 1000000 && written == made) wait = 1000000; /* a thousand times a second is often enough */
        if (written < made) wait = 100000000;
        struct timespec timeout = {.tv_sec = (time_t)(wait / 1000000000u), .tv_nsec = (long)(wait % 1000000000u)};
        if (ppoll(&ready, 1, &timeout, NULL) > 0 && ready.revents & (POLLIN | POLLHUP)) hear(publisher, fd);
    }
    publisher->ended = now_ns();
    atomic_store(&publisher->finished, true);
    /* The connection stays: nchan still has answers for it. */
    for (;;) {
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        if (poll(&ready, 1, -1) > 0) hear(publisher, fd);
    }
    return NULL;
}

void publisher_start(Publisher *publisher) {
    if (pthread_create(&publisher->thread, NULL, publish, publisher)) die("load: the publisher's thread");
}

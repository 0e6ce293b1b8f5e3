/* floor: the least that a server can do, so that one sees how far from it the others are.
 *
 * It subscribes to NATS, and whatever one read brings becomes one HTTP/1.1 chunk of notifications, which a bare loop
 * of send() gives to every client: no filters, no ids to resume from, no deadlines, no limits, no other route.
 * All chunks stand behind each other in one log; a client is a socket and the place in the log up to which it has
 * been served, so a socket that is full is simply behind, and nothing is ever lost.
 *
 * Build and run: cc -O2 -o floor floor.c && ./floor PORT NATS_PORT
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define LOG_SIZE ((size_t)1 << 30) /* of address space; pages come as they are written */
enum { CLIENTS_MAX = 65536, READ_MAX = 1 << 18, LISTENER = CLIENTS_MAX, UPSTREAM };

typedef struct {
    bool asked, blocked; /* the request has come; the kernel takes no more */
    size_t at;           /* served up to here */
} Client;

static Client clients[CLIENTS_MAX]; /* by descriptor */
static int highest, epoll;
static char *events;
static size_t head;

static const char answer[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    "Transfer-Encoding: chunked\r\n\r\n1c\r\nevent: connected\ndata: {}\n\n\r\n";

static void die(const char *what) {
    perror(what);
    exit(1);
}

static int address(struct sockaddr_in *to, const char *port) {
    *to = (struct sockaddr_in){.sin_family = AF_INET,
                               .sin_port = htons((uint16_t)atoi(port)),
                               .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    return socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
}

static void watch(int fd, uint32_t events_wanted, uint32_t tag, int operation) {
    struct epoll_event event = {.events = events_wanted, .data.u32 = tag};
    if (epoll_ctl(epoll, operation, fd, &event)) die("floor: epoll_ctl");
}

static void leave(int fd) {
    clients[fd].asked = false;
    close(fd);
}

static void serve(int fd) {
    Client *client = &clients[fd];
    while (client->at < head) {
        ssize_t sent = send(fd, events + client->at, head - client->at, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            if (errno != EAGAIN) leave(fd);
            break;
        }
        client->at += (size_t)sent;
    }
    bool blocked = client->asked && client->at < head;
    if (blocked != client->blocked && client->asked) {
        client->blocked = blocked;
        watch(fd, EPOLLIN | (blocked ? EPOLLOUT : 0), (uint32_t)fd, EPOLL_CTL_MOD);
    }
}

/* One MSG's payload to one notification: of the discovery only the agent's name is needed. */
static char *notification(char *out, const char *payload, size_t length, uint64_t number) {
    static const char key[] = "\"agent_id\":\"";
    const char *agent = memmem(payload, length, key, sizeof key - 1);
    if (!agent) return out;
    agent += sizeof key - 1;
    int name = (int)strcspn(agent, "\"");
    return out + sprintf(out,
                         "event: discovery\ndata: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/resources/updated\","
                         "\"params\":{\"uri\":\"discovery://agents/%.*s/discoveries/1234567890-Anomaly-unusual-login-"
                         "patter\"}}\nid: floor-%ju\n\n",
                         name, agent, (uintmax_t)number);
}

/* Reads what NATS has to say; appends the notifications as one chunk. */
static void hear(int nats) {
    static char in[READ_MAX + 1], batch[4 * READ_MAX];
    static size_t have;
    static uint64_t number;
    ssize_t got = read(nats, in + have, READ_MAX - have);
    if (got <= 0) die("floor: nats-server has gone");
    have += (size_t)got;
    in[have] = 0;
    char *p = in, *end = in + have, *out = batch, *line;
    while (p < end && (line = memmem(p, (size_t)(end - p), "\r\n", 2))) {
        size_t length = 0;
        if (!strncmp(p, "MSG ", 4)) { /* MSG subject sid length */
            char *size = line;
            while (size[-1] != ' ') size--;
            length = strtoul(size, NULL, 10) + 2;
            if ((size_t)(end - line - 2) < length) break;
            out = notification(out, line + 2, length, ++number);
        } else if (!strncmp(p, "PING", 4)) {
            if (write(nats, "PONG\r\n", 6) < 0) die("floor: PONG");
        }
        p = line + 2 + length;
    }
    have = (size_t)(end - p);
    memmove(in, p, have);
    size_t size = (size_t)(out - batch);
    if (!size) return;
    if (head + size + 32 > LOG_SIZE) {
        fprintf(stderr, "floor: the log is full\n");
        exit(1);
    }
    head += (size_t)sprintf(events + head, "%zx\r\n", size);
    memcpy(events + head, batch, size);
    memcpy(events + head + size, "\r\n", 2);
    head += size + 2;
    for (int fd = 0; fd <= highest; fd++)
        if (clients[fd].asked && !clients[fd].blocked) serve(fd);
}

static void greet(int fd) {
    char request[4096];
    ssize_t got = read(fd, request, sizeof request);
    if (got <= 0) {
        leave(fd);
    } else if (!clients[fd].asked) { /* a request comes in one piece here */
        clients[fd] = (Client){.asked = true, .at = head};
        if (send(fd, answer, sizeof answer - 1, MSG_NOSIGNAL) < 0) leave(fd);
    }
}

static void accept_all(int listener) {
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
        if (fd >= CLIENTS_MAX) die("floor: too many clients");
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        clients[fd] = (Client){0};
        if (fd > highest) highest = fd;
        watch(fd, EPOLLIN, (uint32_t)fd, EPOLL_CTL_ADD);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "floor PORT NATS_PORT\n");
        return 2;
    }
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    events = mmap(NULL, LOG_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (events == MAP_FAILED) die("floor: mmap");
    epoll = epoll_create1(EPOLL_CLOEXEC);

    struct sockaddr_in to;
    int nats = address(&to, argv[2]);
    static const char hello[] = "CONNECT {\"verbose\":false,\"pedantic\":false}\r\nSUB discoveries.> 1\r\n";
    if (connect(nats, (struct sockaddr *)&to, sizeof to)) die("floor: NATS");
    if (write(nats, hello, sizeof hello - 1) < 0) die("floor: NATS");
    watch(nats, EPOLLIN, UPSTREAM, EPOLL_CTL_ADD);

    int listener = address(&to, argv[1]), one = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&to, sizeof to) || listen(listener, 4096)) die("floor: listening");
    fcntl(listener, F_SETFL, O_NONBLOCK);
    watch(listener, EPOLLIN, LISTENER, EPOLL_CTL_ADD);

    for (;;) {
        struct epoll_event ready[256];
        int count = epoll_wait(epoll, ready, 256, -1);
        for (int i = 0; i < count; i++) {
            uint32_t tag = ready[i].data.u32;
            if (tag == LISTENER) {
                accept_all(listener);
            } else if (tag == UPSTREAM) {
                hear(nats);
            } else {
                if (ready[i].events & EPOLLOUT) serve((int)tag);
                if (ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) greet((int)tag);
            }
        }
    }
}

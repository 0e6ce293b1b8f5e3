/* load: many clients of one event stream in one thread, and the books about what each of them has read.
 *
 * Three steps, each of which prints one line of JSON and then waits for a line (or the end) of standard input, so
 * that the caller can measure the server in between:
 *   connected   all clients are listening, or have failed
 *   done        everything published has been read, or nothing has come for a while
 * Build: cc -O2 -o load *.c -lssl -lcrypto -lpthread     (without OpenSSL: -DWITHOUT_TLS and no -lssl -lcrypto)
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <unistd.h>

#include "books.h"
#include "probe.h"
#include "publish.h"
#include "wire.h"

static const char usage[] =
    "load [options]\n"
    "  --port N             of the server under test, on 127.0.0.1\n"
    "  --path PATH          of its stream; {n} stands for the client's number\n"
    "  --clients N          streams to open [100]\n"
    "  --tls --http2        how to speak (default: HTTP/1.1 in plain text; --http2 alone: with prior knowledge)\n"
    "  --streams N          clients for each HTTP/2 connection [1]\n"
    "  --ready EVENT        the event that says a client is listening [the response's head]\n"
    "  --at-once N          connections that may be in the making at a time; 0: all [64]\n"
    "  --patience SECONDS   for all to be listening [60]\n"
    "  --source nats|nchan|none --source-port N       where to publish\n"
    "  --rate N --seconds N   discoveries a second, and for how long (rate 0: only listen)\n"
    "  --drain SECONDS      for the last ones to arrive [10]\n"
    "  --silence SECONDS    nothing for so long after publishing means: nothing more will come [3]\n"
    "  --probe PATH --probe-interval MS               asks this of the server meanwhile, at rate 0 while all connect [50]\n";

static struct {
    Target target;
    Publisher publisher;
    Probe probe;
    int clients, streams, at_once;
    double patience, seconds, drain, silence;
} o = {.clients = 100,
       .streams = 1,
       .at_once = 64,
       .patience = 60,
       .seconds = 1,
       .drain = 10,
       .silence = 3,
       .target = {.path = "/"},
       .probe = {.interval = 50000000}};

static void read_options(int argc, char **argv) {
    enum { PORT, PATH, CLIENTS, TLS, HTTP2, STREAMS, READY, AT_ONCE, PATIENCE, SOURCE, SOURCE_PORT, RATE, SECONDS, DRAIN,
           SILENCE, PROBE, PROBE_INTERVAL };
    static const struct option known[] = {
        {"port", 1, NULL, PORT},         {"path", 1, NULL, PATH},         {"clients", 1, NULL, CLIENTS},
        {"tls", 0, NULL, TLS},           {"http2", 0, NULL, HTTP2},       {"streams", 1, NULL, STREAMS},
        {"ready", 1, NULL, READY},       {"at-once", 1, NULL, AT_ONCE},   {"patience", 1, NULL, PATIENCE},
        {"source", 1, NULL, SOURCE},     {"rate", 1, NULL, RATE},         {"source-port", 1, NULL, SOURCE_PORT},
        {"seconds", 1, NULL, SECONDS},   {"drain", 1, NULL, DRAIN},       {"silence", 1, NULL, SILENCE},
        {"probe", 1, NULL, PROBE},       {"probe-interval", 1, NULL, PROBE_INTERVAL}, {NULL, 0, NULL, 0}};
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) switch (option) {
        case PORT: o.target.port = o.probe.port = atoi(optarg); break;
        case PATH: o.target.path = optarg; break;
        case CLIENTS: o.clients = atoi(optarg); break;
        case TLS: o.target.tls = true; break;
        case HTTP2: o.target.http2 = true; break;
        case STREAMS: o.streams = atoi(optarg); break;
        case READY: books.ready_event = optarg; break;
        case AT_ONCE: o.at_once = atoi(optarg); break;
        case PATIENCE: o.patience = atof(optarg); break;
        case SOURCE:
            o.publisher.kind = !strcmp(optarg, "nats") ? NATS : !strcmp(optarg, "nchan") ? NCHAN : NOBODY;
            break;
        case SOURCE_PORT: o.publisher.port = atoi(optarg); break;
        case RATE: o.publisher.rate = atof(optarg); break;
        case SECONDS: o.seconds = atof(optarg); break;
        case DRAIN: o.drain = atof(optarg); break;
        case SILENCE: o.silence = atof(optarg); break;
        case PROBE: o.probe.path = optarg; break;
        case PROBE_INTERVAL: o.probe.interval = (uint64_t)(atof(optarg) * 1e6); break;
        default: fputs(usage, stderr); exit(2);
        }
    if (!o.target.port || o.clients < 1 || o.streams < 1 || (o.streams > 1 && !o.target.http2)) {
        fputs(usage, stderr);
        exit(2);
    }
    o.publisher.total = (uint32_t)(o.publisher.rate * o.seconds + 0.5);
    books.capacity = o.publisher.total;
}

static void raise_descriptor_limit(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_cur < (rlim_t)o.clients + 32) {
        fprintf(stderr, "load: %d clients need more than the %ju files that this process may open\n", o.clients,
                (uintmax_t)limit.rlim_cur);
        exit(1);
    }
}

static Client *clients;
static Connection *connections;
static int epoll, connection_count;

static void make_clients(void) {
    size_t words = books.capacity / 64 + 1;
    uint64_t *bits = calloc((size_t)o.clients * words, sizeof *bits);
    clients = calloc((size_t)o.clients, sizeof *clients);
    connection_count = (o.clients + o.streams - 1) / o.streams;
    connections = calloc((size_t)connection_count, sizeof *connections);
    if (!bits || !clients || !connections) {
        perror("load");
        exit(1);
    }
    for (int i = 0; i < o.clients; i++) clients[i].seen = bits + (size_t)i * words;
    for (int i = 0; i < connection_count; i++) {
        int left = o.clients - i * o.streams;
        connections[i] = (Connection){
            .fd = -1, .clients = clients + i * o.streams, .count = left < o.streams ? left : o.streams};
    }
}

/* Serves what is ready within `ms`; returns how many connections have become settled by it. */
static int serve(int ms) {
    struct epoll_event events[256];
    int settled = 0, ready = epoll_wait(epoll, events, 256, ms);
    for (int i = 0; i < ready; i++) {
        Connection *connection = &connections[events[i].data.u32];
        bool before = connection_is_settled(connection);
        connection_proceed(connection, epoll, events[i].data.u32);
        settled += !before && connection_is_settled(connection);
    }
    return settled;
}

static double connect_all(void) {
    uint64_t began = now_ns(), deadline = began + (uint64_t)(o.patience * 1e9);
    int opened = 0, settled = 0;
    while (settled < connection_count && now_ns() < deadline) {
        for (int burst = 0; burst < 64 && opened < connection_count; burst++) {
            if (o.at_once && opened - settled >= o.at_once) break;
            connection_open(&connections[opened], epoll, (uint32_t)opened, opened * o.streams);
            settled += connections[opened++].state == GONE;
        }
        bool may_open = opened < connection_count && (!o.at_once || opened - settled < o.at_once);
        settled += serve(may_open ? 0 : 10);
    }
    double seconds = (double)(now_ns() - began) / 1e9;
    for (int i = 0; i < connection_count; i++)
        if (!connection_is_settled(&connections[i])) connection_fail(&connections[i], TOO_LATE);
    return seconds;
}

static void wait_for_line(void) {
    fflush(stdout);
    /* The clients go on reading: a server that writes meanwhile must find them awake. */
    struct epoll_event event;
    int watcher = epoll_create1(EPOLL_CLOEXEC), always = 0;
    struct epoll_event line = {.events = EPOLLIN, .data.u32 = 0}, streams = {.events = EPOLLIN, .data.u32 = 1};
    always = epoll_ctl(watcher, EPOLL_CTL_ADD, STDIN_FILENO, &line); /* a file cannot be watched: it is ready */
    epoll_ctl(watcher, EPOLL_CTL_ADD, epoll, &streams);
    while (!always) {
        if (epoll_wait(watcher, &event, 1, -1) < 1) continue;
        if (event.data.u32 == 0) break;
        serve(0);
    }
    close(watcher);
    for (char c; read(STDIN_FILENO, &c, 1) == 1 && c != '\n';) continue;
}

static void print_histogram(const char *name, const Histogram *histogram) {
    printf(",\"%s\":{\"count\":%ju,\"p50\":%.3f,\"p90\":%.3f,\"p99\":%.3f,\"max\":%.3f}", name,
           (uintmax_t)histogram->count, histogram_ms(histogram, 0.5), histogram_ms(histogram, 0.9),
           histogram_ms(histogram, 0.99), (double)histogram->max / 1e6);
}

static void print_probe(void) {
    if (!o.probe.path) return;
    print_histogram("probe_ms", &o.probe.latency);
    printf(",\"probe_failed\":%ju", (uintmax_t)o.probe.failed);
}

/* Without a load, connecting is what the probe watches. */
static bool only_connects(void) { return !o.publisher.total; }

static void print_connected(double seconds) {
    printf("{\"step\":\"connected\",\"clients\":%d,\"ready\":%u,\"seconds\":%.4f", o.clients, books.ready, seconds);
    print_histogram("ready_ms", &books.connecting);
    printf(",\"failures\":{");
    for (int i = 0, printed = 0; i < FAILURES; i++)
        if (failures[i]) printf("%s\"%s\":%ju", printed++ ? "," : "", failure_names[i], (uintmax_t)failures[i]);
    printf("},\"last_bad_status\":%d", last_bad_status);
    if (only_connects()) print_probe();
    puts("}");
}

static void read_all(uint64_t began) {
    uint64_t end = began + (uint64_t)(o.seconds * 1e9);
    for (;;) {
        serve(20);
        uint64_t now = now_ns();
        if (o.publisher.kind == NOBODY || !o.publisher.total) {
            uint64_t expected = (uint64_t)books.capacity * books.ready;
            if (now > end && (books.delivered >= expected || now > end + (uint64_t)(o.silence * 1e9))) return;
            continue;
        }
        if (!atomic_load(&o.publisher.finished)) continue;
        if (books.delivered >= (uint64_t)atomic_load(&o.publisher.sent) * books.ready) return;
        uint64_t last = books.last_delivery > o.publisher.ended ? books.last_delivery : o.publisher.ended;
        if (now > last + (uint64_t)(o.silence * 1e9) || now > o.publisher.ended + (uint64_t)(o.drain * 1e9)) return;
    }
}

static void print_done(uint64_t began) {
    bool published = o.publisher.kind != NOBODY;
    uint32_t sent = published ? atomic_load(&o.publisher.sent) : books.capacity, least = UINT32_MAX, most = 0;
    uint64_t holes = 0;
    for (int i = 0; i < o.clients; i++) {
        if (!clients[i].is_ready) continue;
        if (clients[i].received < least) least = clients[i].received;
        if (clients[i].received > most) most = clients[i].received;
        holes += sent > clients[i].received ? sent - clients[i].received : 0;
    }
    if (least > most) least = most;
    if (published) began = o.publisher.began;
    double seconds = books.last_delivery > began ? (double)(books.last_delivery - began) / 1e9 : 0;
    printf("{\"step\":\"done\",\"asked\":%u,\"sent\":%u,\"ready\":%u,\"delivered\":%ju,\"lost\":%ju,\"doubled\":%ju,"
           "\"out_of_order\":%ju,\"foreign\":%ju,\"least\":%u,\"most\":%u,\"seconds\":%.4f",
           o.publisher.total, sent, books.ready, (uintmax_t)books.delivered, (uintmax_t)holes, (uintmax_t)books.doubled,
           (uintmax_t)books.out_of_order, (uintmax_t)books.foreign, least, most, seconds);
    print_histogram("latency_ms", &books.latency);
    printf(",\"gaps\":%ju,\"missed\":%ju,\"goodbyes\":%ju,\"comments\":%ju,\"ended\":%ju,\"bytes\":%ju,\"reads\":%ju",
           (uintmax_t)books.gaps, (uintmax_t)books.missed, (uintmax_t)books.goodbyes, (uintmax_t)books.comments,
           (uintmax_t)ended_streams, (uintmax_t)books.bytes, (uintmax_t)books.reads);
    printf(",\"publisher\":{\"seconds\":%.4f,\"behind_ms\":%.3f,\"rejected\":%ju}",
           published && o.publisher.total ? (double)(o.publisher.ended - o.publisher.began) / 1e9 : 0,
           (double)o.publisher.latest / 1e6, (uintmax_t)o.publisher.rejected);
    if (!only_connects()) print_probe();
    puts("}");
}

int main(int argc, char **argv) {
    read_options(argc, argv);
    raise_descriptor_limit();
    wire_setup(&o.target);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    make_clients();
    if (only_connects()) probe_start(&o.probe);
    double seconds = connect_all();
    if (only_connects()) probe_stop(&o.probe);
    print_connected(seconds);
    wait_for_line();

    uint64_t began = now_ns();
    if (!only_connects()) probe_start(&o.probe);
    if (o.publisher.kind != NOBODY && o.publisher.total) publisher_start(&o.publisher);
    read_all(began);
    if (!only_connects()) probe_stop(&o.probe);
    print_done(began);
    wait_for_line();
    return 0;
}

#define _GNU_SOURCE
#include "probe.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* Whether the server has answered 200, to the end. */
static bool ask(const Probe *probe) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct timeval patience = {.tv_sec = 10};
    struct sockaddr_in to = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)probe->port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    char text[4096];
    int length = snprintf(text, sizeof text, "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n\r\n",
                          probe->path, probe->port);
    bool good = false;
    if (!connect(fd, (struct sockaddr *)&to, sizeof to) && send(fd, text, (size_t)length, MSG_NOSIGNAL) == length) {
        ssize_t got = recv(fd, text, sizeof text, 0);
        good = got > 12 && !memcmp(text + 8, " 200", 4);
        while (got > 0) got = recv(fd, text, sizeof text, 0);
        good = good && got == 0;
    }
    close(fd);
    return good;
}

static void *probing(void *argument) {
    Probe *probe = argument;
    prctl(PR_SET_TIMERSLACK, 1000ul, 0ul, 0ul, 0ul);
    while (!atomic_load(&probe->stop)) {
        uint64_t began = now_ns();
        bool good = ask(probe);
        uint64_t took = now_ns() - began;
        if (good)
            histogram_add(&probe->latency, took);
        else
            probe->failed++;
        if (took < probe->interval) {
            uint64_t rest = probe->interval - took;
            struct timespec pause = {.tv_sec = (time_t)(rest / 1000000000u), .tv_nsec = (long)(rest % 1000000000u)};
            nanosleep(&pause, NULL);
        }
    }
    return NULL;
}

void probe_start(Probe *probe) {
    if (probe->path && pthread_create(&probe->thread, NULL, probing, probe)) {
        perror("load: the probe's thread");
        exit(1);
    }
}

void probe_stop(Probe *probe) {
    if (!probe->path) return;
    atomic_store(&probe->stop, true);
    pthread_join(probe->thread, NULL);
}

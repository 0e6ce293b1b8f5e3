/* The publisher: a thread that shares discoveries at a steady rate, through NATS or nchan's publisher location.
 *
 * It has a thread of its own so that the reading of what arrives does not slow down what is sent. A discovery is
 * stamped when its bytes are made, and few are made ahead: a server that does not take them slows the publisher
 * down, and `sent` says so. Nothing is published twice.
 */
#ifndef PUBLISH_H
#define PUBLISH_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct {
    enum { NOBODY, NATS, NCHAN } kind;
    int port;
    double rate;    /* discoveries a second */
    uint32_t total; /* how many */

    uint64_t began, ended; /* when the first was due, when the last was on its way */
    uint64_t latest;       /* the most that one was behind its time, ns */
    uint64_t rejected;     /* answers of nchan other than 2xx */
    atomic_uint_least32_t sent;
    atomic_bool finished;
    pthread_t thread;
} Publisher;

/* Connects and starts the thread; ends the program when nobody listens there. */
void publisher_start(Publisher *publisher);

#endif

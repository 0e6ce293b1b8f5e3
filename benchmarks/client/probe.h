/* The probe: asks a path of the server again and again, on a new connection each time, as a health check does.
 *
 * What is measured is the whole of it, from connect to the answer's last byte. Under the load that runs beside it,
 * its longest time bounds the longest time that the server's loop has kept others waiting, from above.
 */
#ifndef PROBE_H
#define PROBE_H

#include <pthread.h>
#include <stdatomic.h>

#include "books.h"

typedef struct {
    int port;
    const char *path;  /* NULL: no probe */
    uint64_t interval; /* ns between the starts of two questions */
    Histogram latency; /* of those answered with 200 */
    uint64_t failed;   /* others, and those that took more than 10 s */
    atomic_bool stop;
    pthread_t thread;
} Probe;

void probe_start(Probe *probe);
void probe_stop(Probe *probe); /* after that its histogram may be read */

#endif

/* The books: what each client has read, and whether that is what was published.
 *
 * Strategy: every published discovery carries its number and the time of its publication in its agent's name
 * (`bench-<number>-<nanoseconds>`), which every contender copies into the notification's URI. A client is an SSE
 * parser that has one bit per number: a bit set twice is a doubled event, a bit never set a lost one, a number below
 * one already seen came out of order. An event counts when its blank line is read, never before.
 */
#ifndef BOOKS_H
#define BOOKS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Durations in nanoseconds, kept to within 0.8 %: 128 buckets for each power of two. */
typedef struct {
    uint64_t count, max, bucket[58 * 128];
} Histogram;

void histogram_add(Histogram *histogram, uint64_t ns);
/* The value below which the share `q` (0..1) lies, in milliseconds; 0 when nothing was added. */
double histogram_ms(const Histogram *histogram, double q);

/* A line is kept up to here; what is asked of a line stands in its beginning. */
enum { LINE_MAX_KEPT = 512 };

/* One client of the stream: its parser's state and its part of the books. */
typedef struct {
    uint64_t started;   /* when its connection was begun */
    uint64_t *seen;     /* one bit per published number */
    uint64_t stamp;     /* of the event being read: when it was published */
    uint32_t number;    /* of the event being read */
    uint32_t next;      /* one past the highest number read */
    uint32_t received;  /* different numbers read */
    uint32_t missed;    /* of the gap being read: the number the server says was missed */
    uint16_t carried;   /* length of the line that the last read has cut */
    uint8_t name;       /* of the event being read: one of NAME_… */
    bool has_number, is_ready, has_failed, has_ended;
    char carry[LINE_MAX_KEPT];
} Client;

/* What all clients together have seen. */
typedef struct {
    const char *ready_event; /* the event that says a client is listening; NULL: the response's head says so */
    uint32_t capacity;       /* numbers that the bitmaps can hold */
    uint32_t ready;          /* clients that are listening */
    uint64_t delivered, doubled, out_of_order, foreign;
    uint64_t gaps, missed, goodbyes, comments;
    uint64_t bytes, reads, last_delivery;
    Histogram latency, connecting;
} Books;

extern Books books;

uint64_t now_ns(void); /* CLOCK_MONOTONIC: the same for all processes of a machine */

/* Body bytes of a client's stream, cut anywhere; `now` is when they were read. */
void client_feed(Client *client, const char *data, size_t length, uint64_t now);
void client_is_ready(Client *client, uint64_t now);

#endif

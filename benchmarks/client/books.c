#define _GNU_SOURCE
#include "books.h"

#include <string.h>
#include <time.h>

Books books;

enum { NAME_OTHER, NAME_GAP, NAME_GOODBYE, NAME_READY };

uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void histogram_add(Histogram *histogram, uint64_t ns) {
    unsigned index = (unsigned)ns;
    if (ns >= 128) {
        unsigned exponent = 63u - (unsigned)__builtin_clzll(ns);
        index = (exponent - 6) * 128 + (unsigned)(ns >> (exponent - 7)) - 128;
    }
    histogram->bucket[index]++;
    histogram->count++;
    if (ns > histogram->max) histogram->max = ns;
}

double histogram_ms(const Histogram *histogram, double q) {
    if (!histogram->count) return 0;
    uint64_t wanted = (uint64_t)(q * (double)(histogram->count - 1)) + 1, below = 0;
    for (unsigned index = 0; index < sizeof histogram->bucket / sizeof *histogram->bucket; index++) {
        below += histogram->bucket[index];
        if (below >= wanted) {
            if (index < 128) return index / 1e6;
            unsigned exponent = index / 128 + 6;
            double floor = (double)((uint64_t)(index % 128 + 128) << (exponent - 7));
            double middle = floor * (1 + 0.5 / 128);
            return (middle < (double)histogram->max ? middle : (double)histogram->max) / 1e6;
        }
    }
    return (double)histogram->max / 1e6;
}

void client_is_ready(Client *client, uint64_t now) {
    if (client->is_ready) return;
    client->is_ready = true;
    books.ready++;
    histogram_add(&books.connecting, now - client->started);
}

static void book(Client *client, uint64_t now) {
    uint32_t number = client->number;
    if (number >= books.capacity) {
        books.foreign++;
        return;
    }
    uint64_t bit = 1ull << (number & 63), *word = &client->seen[number >> 6];
    if (*word & bit) {
        books.doubled++;
        return;
    }
    *word |= bit;
    client->received++;
    books.delivered++;
    books.last_delivery = now;
    if (number < client->next)
        books.out_of_order++;
    else
        client->next = number + 1;
    histogram_add(&books.latency, now - client->stamp);
}

static const char *read_number(const char *p, const char *end, uint64_t *value) {
    uint64_t v = 0;
    for (; p < end && *p >= '0' && *p <= '9'; p++) v = v * 10 + (uint64_t)(*p - '0');
    *value = v;
    return p;
}

/* Finds `needle` in a line. All notifications look alike, so it is tried first where it stood the last time. */
static const char *find(const char *line, size_t length, const char *needle, size_t needle_length) {
    static size_t hint;
    if (hint + needle_length <= length && !memcmp(line + hint, needle, needle_length)) return line + hint;
    const char *found = memmem(line, length, needle, needle_length);
    if (found) hint = (size_t)(found - line);
    return found;
}

static void read_data(Client *client, const char *line, size_t length) {
    static const char mark[] = "/agents/bench-", missed[] = "\"missed\":";
    const char *end = line + length;
    if (client->name == NAME_GAP) {
        const char *p = memmem(line, length, missed, sizeof missed - 1);
        uint64_t count = 0;
        if (p) read_number(p + sizeof missed - 1, end, &count);
        client->missed = (uint32_t)count;
        return;
    }
    const char *p = find(line, length, mark, sizeof mark - 1);
    if (!p) return;
    uint64_t number;
    p = read_number(p + sizeof mark - 1, end, &number);
    if (p == end || *p != '-') return;
    read_number(p + 1, end, &client->stamp);
    client->number = number < UINT32_MAX ? (uint32_t)number : UINT32_MAX;
    client->has_number = true;
}

static void read_name(Client *client, const char *name, size_t length) {
    client->name = NAME_OTHER;
    if (books.ready_event && length == strlen(books.ready_event) && !memcmp(name, books.ready_event, length))
        client->name = NAME_READY;
    else if (length == 3 && !memcmp(name, "gap", 3))
        client->name = NAME_GAP;
    else if (length == 7 && !memcmp(name, "goodbye", 7))
        client->name = NAME_GOODBYE;
}

static void end_of_event(Client *client, uint64_t now) {
    if (client->has_number) {
        book(client, now);
        client->has_number = false;
    } else if (client->name == NAME_READY) {
        client_is_ready(client, now);
    } else if (client->name == NAME_GAP) {
        books.gaps++;
        books.missed += client->missed;
    } else if (client->name == NAME_GOODBYE) {
        books.goodbyes++;
    }
    client->name = NAME_OTHER;
    client->missed = 0;
}

static void read_line(Client *client, const char *line, size_t length, uint64_t now) {
    if (length && line[length - 1] == '\r') length--;
    if (!length) {
        end_of_event(client, now);
    } else if (length >= 5 && !memcmp(line, "data:", 5)) {
        read_data(client, line, length);
    } else if (length >= 6 && !memcmp(line, "event:", 6)) {
        size_t skip = length > 6 && line[6] == ' ' ? 7 : 6;
        read_name(client, line + skip, length - skip);
    } else if (line[0] == ':') {
        books.comments++;
    }
}

static void carry(Client *client, const char *data, size_t length) {
    size_t room = LINE_MAX_KEPT - client->carried;
    if (length > room) length = room;
    memcpy(client->carry + client->carried, data, length);
    client->carried += (uint16_t)length;
}

void client_feed(Client *client, const char *data, size_t length, uint64_t now) {
    const char *end = data + length;
    while (data < end) {
        const char *newline = memchr(data, '\n', (size_t)(end - data));
        if (!newline) {
            carry(client, data, (size_t)(end - data));
            return;
        }
        if (client->carried) {
            carry(client, data, (size_t)(newline - data));
            read_line(client, client->carry, client->carried, now);
            client->carried = 0;
        } else {
            read_line(client, data, (size_t)(newline - data), now);
        }
        data = newline + 1;
    }
}

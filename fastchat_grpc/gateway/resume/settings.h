/* What the gateway tells the module: lines of a word and its values. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "buffer.h"

enum { MOST_CONTROLLERS = 16 };

typedef struct {
    char *text; /* that the others point into */
    Text workers[MOST_CONTROLLERS];     /* "controller WORKERS CONTROLLER": clusters of one controller */
    Text controllers[MOST_CONTROLLERS];
    size_t count;
    Text authorization; /* "authorization ...": what controllers want to see; empty: nothing */
    Text farewell;      /* "farewell JSON" and "farewell_end JSON": an error event, before and behind its message */
    Text farewell_end;
    uint64_t state;     /* "state N": bytes of state kept for a stream */
    uint64_t message;   /* "message N": bytes of a message */
    uint64_t parked;    /* "parked N": bytes kept for a caller that does not read, before its stream is parked */
    uint64_t unread;    /* "unread N": and before one ends that cannot be parked */
    uint64_t ask_ms;    /* "ask_ms N": how long a controller may take to answer */
} Settings;

/* False where it lacks something, or there is no memory. */
bool settings_read(Settings *settings, Text text);
void settings_free(Settings *settings);
/* Which controller has a cluster of workers. */
size_t settings_find(const Settings *settings, Text workers);

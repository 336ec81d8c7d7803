/* One streamed answer, carried past the workers that fail it.
 *
 * The request is collected, then sent to the worker that was picked. Whole frames of the answer go on to the caller; the
 * state that they carry is kept. When an attempt ends early, a controller is asked where to go on, and the next worker
 * gets the request with what is kept. Before the caller has anything, failures stay statuses and cost it nothing.
 */
#pragma once
#include "abi.h"
#include "frames.h"
#include "settings.h"

typedef enum {
    PHASE_PASSING,    /* it is not ours: the router has it */
    PHASE_COLLECTING, /* the request is not whole yet */
    PHASE_RUNNING,    /* a worker has it */
    PHASE_ASKING,     /* a controller is asked where to go on */
    PHASE_PARKED,     /* its caller does not read */
    PHASE_OVER        /* the caller has its end */
} Phase;

typedef struct {
    Settings settings;
    size_t broken, resumed, parked, given_up; /* counters of Envoy */
} Config;

typedef struct {
    void *envoy;
    const Config *config;
    Phase phase;
    int depth; /* hooks that run, one inside the other */
    bool gone; /* Envoy has destroyed the filter; it is freed when the outermost hook returns */

    bool streamed;      /* the caller gets the answer in pieces */
    Buffer request;     /* the caller's, one frame */
    Buffer places;      /* that were picked and are not used yet: "ip:port,ip:port" */
    Buffer cluster;     /* that has them */
    Buffer pick;        /* what a controller must know to pick again */
    size_t controller;  /* who is asked first */

    uint64_t upstream;  /* the stream to the worker; events of others are not of this attempt */
    uint64_t newest;    /* greatest id of any such stream */
    bool active;        /* whether events count at all */
    bool starting;      /* inside start_http_stream, which may report an end before it returns */
    bool ended;         /* and has */
    bool resumes;       /* it was sent what is kept */
    bool knows;         /* and its worker has said that it knows what that is */
    unsigned attempts, losses;
    Buffer place, worker_id, fingerprint, backend;
    Buffer held;        /* headers of the answer, until its first frame goes on */
    bool told;          /* whether the caller has them */
    Frames frames;
    Buffer code, message, details; /* status of the attempt that has ended; without code: it broke */
    Buffer broken;      /* for the access log: what broke and how */

    uint64_t callout;
    bool calling, answered;
    bool telling;       /* a controller is told that it is parked */
    bool after_parking; /* why the controller is asked */
    size_t asked;       /* controllers that were asked in vain */
    unsigned rounds;
    Buffer answer;

    unsigned above;     /* watermarks of the caller's connection that it is above */
    size_t unread;      /* bytes that were sent since */
    Buffer out, body;   /* for the moment */
} Stream;

Stream *stream_new(const Config *config, void *envoy);
void stream_free(Stream *stream);
/* Look at a request's headers: whether it is ours. */
bool stream_claims(Stream *stream);
/* A part of the request's body, or its end. */
void stream_collect(Stream *stream, Text part);
void stream_begin(Stream *stream);
/* Whether an event of the stream to a worker is of the attempt that runs. */
bool stream_current(Stream *stream, uint64_t id);
void stream_headers(Stream *stream, const Header *headers, size_t count, bool end);
void stream_data(Stream *stream, const Text *parts, size_t count);
void stream_trailers(Stream *stream, Header *trailers, size_t count);
/* The attempt has ended without a status. */
void stream_broke(Stream *stream);
/* A controller has answered the question of that id, or will not. */
void stream_answered(Stream *stream, uint64_t id, int result, const Text *parts, size_t count);
void stream_above(Stream *stream);
void stream_below(Stream *stream);
/* Envoy has answered in our place. */
void stream_over(Stream *stream);

/* ------------------------------------------------------------------------- what these files use of each other */

/* Send the request, and what is kept, to the place that is set. */
void stream_try(Stream *stream);
/* Set the next of the places that were picked; false where none is left. */
bool stream_take_place(Stream *stream);
/* Leave the worker, since the caller does not read, and tell a controller; come back when it does. */
void stream_park(Stream *stream);
void stream_unpark(Stream *stream);
/* Ask the controllers where to go on, and go. */
void stream_ask(Stream *stream, bool after_parking);
/* End the attempt that runs. */
void stream_drop(Stream *stream);
/* How the attempt has ended; without a code: it broke. */
void stream_set_status(Stream *stream, Text code, Text message, Text details);
/* The caller hears a status, and before it a last message if it has seen others. */
void stream_finish(Stream *stream, Text code, Text message, Text details, Text last);
void stream_fail(Stream *stream, Text code, Text message);
/* Nobody goes on, and no controller has said what the caller is to hear: as the last worker said. */
void stream_give_up(Stream *stream);
void stream_count(Stream *stream, size_t counter);
/* Tell the access log, and by it the controllers. */
void stream_note(Stream *stream, const char *key, Text value);

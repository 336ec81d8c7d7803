/* The messages by which the gateway asks a controller how to go on with a stream: ContinueStream of registry.proto.
 * Knows nothing of Envoy. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "buffer.h"

typedef struct {
    Text pick;        /* what the pick's answer says of the request, as it is */
    Text place;       /* "ip:port" that had the stream */
    Text worker_id;   /* as the worker named itself; empty: it did not */
    unsigned code;    /* gRPC status that ended it; 0: none came */
    Text details;     /* of that status, as in the trailer grpc-status-details-bin */
    bool started;     /* whether the caller has seen a part of the answer */
    bool parked;      /* whether it ended for its slow caller, through no fault of the worker */
    bool unread;      /* and that the caller still does not read: nothing is to be reserved */
    unsigned losses;  /* times that it has lost a worker after its start, this one included */
    Text fingerprint; /* of the model that began, and its backend */
    Text backend;
} Ask;

typedef struct {
    Text place;   /* where to go on; empty: nowhere */
    Text cluster; /* that has the place */
    bool again;   /* nobody yet: ask again */
    unsigned code;
    Text message; /* as in grpc-message */
    Text details; /* as in grpc-status-details-bin */
    Text last;    /* message that the caller gets before the end */
} Answer;

/* Append the request's frame; false where there is no memory. */
bool ask_write(const Ask *ask, Buffer *out);
/* Read the answer's frame, whose bytes the texts point into. False where it is none, or not to be used. */
bool answer_read(const Buffer *frame, Answer *answer);

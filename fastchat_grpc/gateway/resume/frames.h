/* The gRPC frames of a worker's answer. Whole ones go on to the caller, without the pieces of state that they carry;
 * the pieces are kept, and with them another worker goes on. What the pieces mean is no matter here: the fields of
 * protobuf messages that are put one behind the other add up.
 *
 * Knows nothing of Envoy.
 */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "buffer.h"

enum { FRAME_HEAD = 5 }; /* a flag for compression, and four bytes of length */

/* How the messages of one method carry state. */
typedef struct {
    unsigned piece; /* field of the response that holds a piece */
    unsigned state; /* field of the request that takes the pieces back */
    bool is_any;    /* whether a piece is a google.protobuf.Any, whose value then counts */
} Carriage;

typedef struct {
    size_t message; /* bytes of one message */
    size_t state;   /* bytes of all pieces of an answer that are kept */
} FrameLimits;

typedef struct {
    Carriage carriage;
    FrameLimits limits;
    Buffer partial;  /* a frame that is not whole yet */
    Buffer state;    /* the pieces, as fields of the request */
    uint64_t passed; /* frames that went on to the caller */
    bool kept;       /* a piece has come */
    bool lost;       /* a piece is missing, so that nobody can go on from here */
    bool fixed;      /* the request cannot take pieces back */
} Frames;

typedef enum { FRAMES_OK, FRAMES_TOO_LARGE, FRAMES_NO_MEMORY } FramesResult;

/* Take bytes of the answer; what goes on to the caller is appended to `out`. */
FramesResult frames_feed(Frames *frames, const char *data, size_t size, Buffer *out);
/* Another worker begins: what had not arrived whole is not there, and where it begins anew, nothing is. */
void frames_begin(Frames *frames);
/* Whether another worker can give the rest, or all of it where the caller has nothing yet. */
bool frames_can_go_on(const Frames *frames);
/* Whether the next worker is sent what is kept, and not the request alone. */
bool frames_resume(const Frames *frames);
/* Append the request for the next worker: the caller's, one frame, and behind it what is kept.
 * False where there is no memory. */
bool frames_request(const Frames *frames, const Buffer *request, Buffer *out);
/* Whether state can be put behind a request: it is one frame, and not compressed. */
bool frames_extensible(const Buffer *request);
void frames_free(Frames *frames);
/* Bytes of the message behind a frame's head. */
size_t frame_size(const void *head);
void frame_set_size(void *head, size_t size);

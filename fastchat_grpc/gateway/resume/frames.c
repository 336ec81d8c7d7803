#include "frames.h"

#include <string.h>

#include "wire.h"

enum { ANY_VALUE = 2 };

size_t frame_size(const void *head) {
    const uint8_t *p = head;
    return (size_t)p[1] << 24 | (size_t)p[2] << 16 | (size_t)p[3] << 8 | p[4];
}

void frame_set_size(void *head, size_t size) {
    uint8_t *p = head;
    for (int i = 0; i < 4; i++) p[1 + i] = (uint8_t)(size >> (24 - 8 * i));
}

/* Whether a piece says something; one that is empty says that there is no state from here on. */
static bool says_something(const Carriage *carriage, const Field *piece) {
    if (!carriage->is_any) return piece->size > 0;
    const uint8_t *at = piece->data, *end = piece->data + piece->size;
    bool found = false;
    Field field;
    while (at < end) {
        if (!wire_next(&at, end, &field)) return false;
        found = found || (field.number == ANY_VALUE && field.type == WIRE_BYTES && field.size > 0);
    }
    return found;
}

static void lose(Frames *frames) {
    frames->lost = true;
    buffer_free(&frames->state);
}

/* Keep a piece, or know that the state is not whole any more. */
static void keep(Frames *frames, const Field *piece) {
    Buffer *state = &frames->state;
    if (frames->lost) return;
    if (frames->fixed || !says_something(&frames->carriage, piece) || piece->size > frames->limits.state ||
        state->size > frames->limits.state - piece->size) {
        lose(frames);
        return;
    }
    frames->kept = true;
    if (!wire_bytes(state, frames->carriage.state, piece->data, piece->size)) lose(frames);
}

/* Whether a message can be read to its end, and has pieces. */
static bool has_pieces(const Frames *frames, const uint8_t *at, const uint8_t *end, bool *valid) {
    bool found = false;
    Field field;
    *valid = true;
    while (at < end) {
        if (!wire_next(&at, end, &field)) {
            *valid = false;
            return false;
        }
        found = found || (field.number == frames->carriage.piece && field.type == WIRE_BYTES);
    }
    return found;
}

/* Pass one whole frame on, without its pieces. */
static FramesResult pass(Frames *frames, const uint8_t *frame, size_t size, Buffer *out) {
    const uint8_t *at = frame + FRAME_HEAD, *end = at + size;
    bool valid = frame[0] == 0;
    bool pieces = valid && has_pieces(frames, at, end, &valid);
    if (!valid) lose(frames); /* compressed, or no message: as it is */
    if (!pieces) {
        frames->passed++;
        if (!frames->kept) frames->lost = true; /* the caller has something that no piece tells of */
        return buffer_put(out, frame, FRAME_HEAD + size) ? FRAMES_OK : FRAMES_NO_MEMORY;
    }
    size_t head = out->size;
    if (!buffer_put(out, frame, FRAME_HEAD)) return FRAMES_NO_MEMORY;
    Field field;
    while (at < end && wire_next(&at, end, &field)) {
        if (field.number == frames->carriage.piece && field.type == WIRE_BYTES) {
            keep(frames, &field);
        } else if (!buffer_put(out, field.start, (size_t)(field.end - field.start))) {
            out->size = head; /* the half of it is no frame */
            return FRAMES_NO_MEMORY;
        }
    }
    size_t left = out->size - head - FRAME_HEAD;
    if (left == 0) {
        out->size = head; /* it carried state alone */
    } else {
        frame_set_size(out->data + head, left);
        frames->passed++;
    }
    return FRAMES_OK;
}

/* Pass on all frames that are whole; `*used` is the number of their bytes. */
static FramesResult pass_whole(Frames *frames, const char *data, size_t size, Buffer *out, size_t *used) {
    *used = 0;
    while (size - *used >= FRAME_HEAD) {
        size_t message = frame_size(data + *used);
        if (message > frames->limits.message) return FRAMES_TOO_LARGE;
        if (size - *used - FRAME_HEAD < message) break;
        FramesResult result = pass(frames, (const uint8_t *)data + *used, message, out);
        if (result != FRAMES_OK) return result;
        *used += FRAME_HEAD + message;
    }
    return FRAMES_OK;
}

FramesResult frames_feed(Frames *frames, const char *data, size_t size, Buffer *out) {
    Buffer *partial = &frames->partial;
    size_t used = 0;
    FramesResult result;
    if (partial->size == 0) { /* the usual: nothing is copied that need not be */
        result = pass_whole(frames, data, size, out, &used);
        if (result != FRAMES_OK) return result;
        return used == size || buffer_put(partial, data + used, size - used) ? FRAMES_OK : FRAMES_NO_MEMORY;
    }
    if (!buffer_put(partial, data, size)) return FRAMES_NO_MEMORY;
    result = pass_whole(frames, partial->data, partial->size, out, &used);
    buffer_drop(partial, used);
    return result;
}

void frames_begin(Frames *frames) {
    buffer_free(&frames->partial);
    if (frames->passed == 0 && frames->lost) frames->kept = frames->lost = false;
}

bool frames_resume(const Frames *frames) { return frames->kept && !frames->lost; }

bool frames_can_go_on(const Frames *frames) { return frames->passed == 0 || frames_resume(frames); }

bool frames_extensible(const Buffer *request) {
    return request->size >= FRAME_HEAD && request->data[0] == 0 &&
           frame_size(request->data) == request->size - FRAME_HEAD;
}

bool frames_request(const Frames *frames, const Buffer *request, Buffer *out) {
    size_t head = out->size;
    if (!buffer_put(out, request->data, request->size)) return false;
    if (!frames_resume(frames)) return true; /* the caller has nothing: from the start */
    if (!buffer_put(out, frames->state.data, frames->state.size)) return false;
    frame_set_size(out->data + head, out->size - head - FRAME_HEAD);
    return true;
}

void frames_free(Frames *frames) {
    buffer_free(&frames->partial);
    buffer_free(&frames->state);
}

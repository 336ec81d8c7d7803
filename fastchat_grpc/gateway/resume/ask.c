#include "ask.h"

#include "frames.h"
#include "wire.h"

enum { PICK = 1, PLACE, WORKER_ID, CODE, DETAILS, STARTED, LOSSES, PARKED, FINGERPRINT, BACKEND, UNREAD };
enum { TO_PLACE = 1, CLUSTER, AGAIN, TO_CODE, MESSAGE, TO_DETAILS, LAST };
enum { MOST_CODE = 16, MOST_PLACE = 63 };

static bool put_text(Buffer *out, unsigned number, Text text) {
    return wire_bytes(out, number, text.data, text.size);
}

bool ask_write(const Ask *ask, Buffer *out) {
    size_t head = out->size;
    if (!buffer_put(out, "\0\0\0\0\0", FRAME_HEAD)) return false;
    bool written = put_text(out, PICK, ask->pick) && put_text(out, PLACE, ask->place) &&
                   put_text(out, WORKER_ID, ask->worker_id) && wire_number(out, CODE, ask->code) &&
                   put_text(out, DETAILS, ask->details) && wire_number(out, STARTED, ask->started) &&
                   wire_number(out, LOSSES, ask->losses) && wire_number(out, PARKED, ask->parked) &&
                   put_text(out, FINGERPRINT, ask->fingerprint) && put_text(out, BACKEND, ask->backend) &&
                   wire_number(out, UNREAD, ask->unread);
    frame_set_size(out->data + head, out->size - head - FRAME_HEAD);
    return written;
}

static void take(Answer *answer, const Field *field) {
    Text text = {(const char *)field->data, field->size};
    if (field->type == WIRE_VARINT) {
        if (field->number == AGAIN) answer->again = field->value != 0;
        if (field->number == TO_CODE) answer->code = field->value > MOST_CODE ? 2 : (unsigned)field->value;
    } else if (field->type == WIRE_BYTES) {
        if (field->number == TO_PLACE) answer->place = text;
        if (field->number == CLUSTER) answer->cluster = text;
        if (field->number == MESSAGE) answer->message = text;
        if (field->number == TO_DETAILS) answer->details = text;
        if (field->number == LAST) answer->last = text;
    }
}

bool answer_read(const Buffer *frame, Answer *answer) {
    *answer = (Answer){0};
    if (!frames_extensible(frame)) return false;
    const uint8_t *at = (const uint8_t *)frame->data + FRAME_HEAD, *end = (const uint8_t *)frame->data + frame->size;
    Field field;
    while (at < end) {
        if (!wire_next(&at, end, &field)) return false;
        take(answer, &field);
    }
    return answer->place.size <= MOST_PLACE && text_printable(answer->place) && text_printable(answer->cluster) &&
           text_printable(answer->message) && text_printable(answer->details);
}

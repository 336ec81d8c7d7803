/* Random answers of workers, and of controllers, for those parts of the gateway's module that read them.
 *
 *     fuzz_frames COUNT SEED      so many answers
 *     fuzz_frames long            one of more than 4 GiB, and what it leaves in memory
 *
 * Compiled with -fsanitize=address,undefined. Ends with 1, and says which input it was, where an invariant does not hold.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ask.h"
#include "frames.h"
#include "settings.h"
#include "wire.h"

static uint64_t state;

static uint64_t draw(uint64_t below) { /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (state * 0x2545F4914F6CDD1DULL >> 16) % below;
}

static void put_noise(Buffer *out, size_t size) {
    for (size_t i = 0; i < size; i++) {
        char byte = (char)draw(256);
        buffer_put(out, &byte, 1);
    }
}

static unsigned some_field(void) {
    static const unsigned fields[] = {1, 2, 3, 3, 14, 15, 15, 16, 536870911};
    return fields[draw(sizeof fields / sizeof *fields)];
}

/* A message that is mostly valid, to the depth of an Any within. */
static void put_message(Buffer *out, int depth) {
    for (uint64_t i = draw(5); i > 0; i--) {
        Buffer inner = {0};
        switch (draw(depth ? 6 : 4)) {
        case 0:
            wire_number(out, some_field(), draw(UINT32_MAX) << draw(30));
            break;
        case 1: { /* fixed, of 8 or 4 bytes */
            bool wide = draw(2);
            char tag = (char)((1 + draw(15)) << 3 | (wide ? WIRE_FIXED64 : WIRE_FIXED32));
            if (tag & (char)0x80) tag &= 0x7f;
            buffer_put(out, &tag, 1);
            put_noise(out, wide ? 8 : 4);
            break;
        }
        case 2:
            put_noise(&inner, draw(200));
            if (wire_head(out, some_field(), inner.size)) buffer_put(out, inner.data, inner.size);
            break;
        case 3:
            put_noise(out, draw(3)); /* which is mostly not valid */
            break;
        default:
            put_message(&inner, depth - 1);
            if (wire_head(out, some_field(), inner.size)) buffer_put(out, inner.data, inner.size);
        }
        buffer_free(&inner);
    }
}

static void put_frame(Buffer *out, int depth) {
    size_t head = out->size;
    buffer_put(out, "\0\0\0\0\0", FRAME_HEAD);
    put_message(out, depth);
    size_t size = out->size - head - FRAME_HEAD;
    if (draw(50) == 0) size += draw(9) - 4;
    frame_set_size(out->data + head, size);
    if (draw(50) == 0) out->data[head] = (char)draw(3);
}

static bool same(const Buffer *a, const Buffer *b) {
    return a->size == b->size && (a->size == 0 || memcmp(a->data, b->data, a->size) == 0);
}

#define HOLDS(condition)                         \
    do {                                         \
        if (!(condition)) {                      \
            printf("does not hold: %s\n", #condition); \
            return false;                        \
        }                                        \
    } while (0)

static Frames new_frames(bool is_any, size_t most_state) {
    Frames frames = {0};
    frames.carriage = is_any ? (Carriage){3, 3, true} : (Carriage){15, 14, false};
    frames.limits = (FrameLimits){.message = 4096, .state = most_state};
    return frames;
}

static FramesResult feed_in_pieces(Frames *frames, const Buffer *answer, Buffer *out) {
    for (size_t at = 0; at < answer->size;) {
        size_t size = 1 + draw(answer->size - at), most = 1 + draw(40);
        if (size > most && draw(4)) size = most;
        char *copy = malloc(size); /* so that reading beyond it is noticed */
        memcpy(copy, answer->data + at, size);
        FramesResult result = frames_feed(frames, copy, size, out);
        free(copy);
        if (result != FRAMES_OK) return result;
        at += size;
    }
    return FRAMES_OK;
}

static bool check_request(const Frames *frames) {
    Buffer request = {0}, sent = {0};
    put_frame(&request, 1);
    bool extensible = frames_extensible(&request);
    HOLDS(frames_request(frames, &request, &sent));
    HOLDS(!extensible || frames_extensible(&sent));
    HOLDS(sent.size == request.size + (frames->kept && !frames->lost ? frames->state.size : 0));
    buffer_free(&request);
    buffer_free(&sent);
    return true;
}

/* What went on to the caller has no state in it any more, and goes on as it is. */
static bool check_passed_on(const Buffer *out, bool is_any) {
    Frames again = new_frames(is_any, 1000);
    Buffer twice = {0};
    HOLDS(out->size == 0 || frames_feed(&again, out->data, out->size, &twice) == FRAMES_OK);
    HOLDS(same(out, &twice));
    HOLDS(!again.kept && again.state.size == 0 && again.partial.size == 0);
    buffer_free(&twice);
    frames_free(&again);
    return true;
}

static bool try_answer(void) {
    bool is_any = draw(2);
    size_t most_state = draw(2) ? 100000 : draw(200);
    Frames whole = new_frames(is_any, most_state), pieces = new_frames(is_any, most_state);
    Buffer answer = {0}, out = {0}, out_of_pieces = {0};
    for (uint64_t i = draw(6); i > 0; i--) put_frame(&answer, 2);
    if (draw(20) == 0) put_noise(&answer, draw(20));
    FramesResult result = answer.size ? frames_feed(&whole, answer.data, answer.size, &out) : FRAMES_OK;
    HOLDS(feed_in_pieces(&pieces, &answer, &out_of_pieces) == result);
    HOLDS(same(&out, &out_of_pieces));
    HOLDS(same(&whole.state, &pieces.state));
    HOLDS(whole.passed == pieces.passed && whole.kept == pieces.kept && whole.lost == pieces.lost);
    HOLDS(out.size <= answer.size);
    HOLDS(whole.state.size <= most_state + 6);
    HOLDS(!whole.lost || whole.state.size == 0);
    HOLDS(!frames_can_go_on(&whole) || whole.passed == 0 || whole.kept);
    if (!check_passed_on(&out, is_any) || !check_request(&whole)) return false;
    frames_begin(&whole);
    HOLDS(whole.partial.size == 0 && (whole.passed || !whole.lost));
    buffer_free(&answer);
    buffer_free(&out);
    buffer_free(&out_of_pieces);
    frames_free(&whole);
    frames_free(&pieces);
    return true;
}

static bool try_reading(void) {
    Buffer frame = {0};
    Answer answer;
    put_frame(&frame, 1);
    if (answer_read(&frame, &answer)) {
        const char *end = frame.data + frame.size;
        HOLDS(answer.place.size == 0 || (answer.place.data >= frame.data && answer.place.data + answer.place.size <= end));
        HOLDS(answer.last.size == 0 || (answer.last.data >= frame.data && answer.last.data + answer.last.size <= end));
        HOLDS(answer.code <= 16);
    }
    if (draw(8) == 0) {
        Settings settings;
        static const char *words[] = {"controller ", "a ", "\n", " ", "state 1", "ask_ms 99999999999999999999\n", "farewell"};
        frame.size = 0;
        for (uint64_t i = draw(30); i > 0; i--) {
            const char *word = words[draw(sizeof words / sizeof *words)];
            buffer_put(&frame, word, strlen(word));
        }
        settings_read(&settings, (Text){frame.size ? frame.data : "", frame.size});
        HOLDS(settings.count <= MOST_CONTROLLERS);
        settings_free(&settings);
    }
    buffer_free(&frame);
    return true;
}

/* An answer that has more bytes than 32 bits count is passed on like any other, and nothing of it stays but its state. */
static bool try_long(void) {
    enum { MESSAGE = 4 << 20, COUNT = 1100 };
    Frames frames = new_frames(false, 100000);
    frames.limits.message = 2 * MESSAGE;
    Buffer frame = {0}, out = {0};
    char *text = calloc(1, MESSAGE);
    buffer_put(&frame, "\0\0\0\0\0", FRAME_HEAD);
    wire_bytes(&frame, 2, text, MESSAGE);
    wire_bytes(&frame, 15, "piece", 5);
    frame_set_size(frame.data, frame.size - FRAME_HEAD);
    for (int i = 0; i < COUNT; i++) {
        out.size = 0;
        HOLDS(frames_feed(&frames, frame.data, frame.size, &out) == FRAMES_OK);
        HOLDS(out.size == frame.size - 7); /* a tag, a length, and the piece */
    }
    HOLDS(frames.passed == COUNT && frames.state.size == 7 * COUNT && frames.partial.size == 0);
    HOLDS(out.capacity < 3 * MESSAGE && frames_can_go_on(&frames));
    free(text);
    buffer_free(&frame);
    buffer_free(&out);
    frames_free(&frames);
    printf("a long answer\n");
    return true;
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "long") == 0) return !try_long();
    uint64_t count = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000, seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    for (uint64_t i = 0; i < count; i++) {
        state = (seed + i) * 0x9E3779B97F4A7C15ULL | 1;
        if (!try_answer() || !try_reading()) {
            printf("input %llu\n", (unsigned long long)(seed + i));
            return 1;
        }
    }
    printf("%llu inputs\n", (unsigned long long)count);
    return 0;
}

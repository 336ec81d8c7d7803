/* Where a stream goes on: the question to the controllers, and what their answer makes of it. */
#include <stdio.h>

#include "ask.h"
#include "stream.h"

enum { MOST_ROUNDS = 1000 /* of controllers that say: ask again */ };

/* Whether the next worker gets the rest of an answer. */
static bool begun(const Stream *s) { return s->frames.passed > 0 || frames_resume(&s->frames); }

static bool write_question(Stream *s) {
    Text code = buffer_text(&s->code);
    unsigned number = 0;
    for (size_t i = 0; i < code.size && number < 1000; i++) number = number * 10 + (unsigned)(code.data[i] - '0');
    Ask question = {
        .pick = buffer_text(&s->pick),
        .place = buffer_text(&s->place),
        .worker_id = buffer_text(&s->worker_id),
        .code = number,
        .details = buffer_text(&s->details),
        .started = begun(s),
        .parked = s->after_parking,
        .unread = s->phase == PHASE_PARKED,
        .losses = s->losses,
        .fingerprint = buffer_text(&s->fingerprint),
        .backend = buffer_text(&s->backend),
    };
    s->body.size = 0;
    return ask_write(&question, &s->body);
}

static int call_controller(Stream *s, Text cluster) {
    Text authorization = s->config->settings.authorization;
    Header headers[8] = {
        header(":method", TEXT("POST")),
        header(":path", TEXT("/fastchat_grpc.v1.ControllerService/ContinueStream")),
        header(":scheme", TEXT("http")),
        header(":authority", cluster),
        header("content-type", TEXT("application/grpc")),
        header("te", TEXT("trailers")),
    };
    size_t count = 6;
    if (authorization.size) headers[count++] = header("authorization", authorization);
    return CALL(http_filter_http_callout)(s->envoy, &s->callout, cluster, headers, count, buffer_text(&s->body),
                                          s->config->settings.ask_ms);
}

/* Do as the controller says. False where its answer cannot be used. */
static bool follow(Stream *s) {
    Answer answer;
    if (!answer_read(&s->answer, &answer)) return false;
    if (answer.again) {
        if (++s->rounds >= MOST_ROUNDS) return false;
        /* In turn: each may hear of somebody who goes on. Who may begin, the one that picked knows: it has counted. */
        s->controller = (s->controller + s->asked - !begun(s)) % s->config->settings.count;
        s->asked = 0;
        return true;
    }
    if (answer.place.size) {
        if (!buffer_set(&s->place, answer.place) || !buffer_set(&s->cluster, answer.cluster)) return false;
        s->controller = (s->controller + s->asked - 1) % s->config->settings.count;
        stream_count(s, s->config->resumed);
        stream_try(s);
        return true;
    }
    char number[16];
    stream_count(s, s->config->given_up);
    if (answer.code)
        stream_finish(s, (Text){number, (size_t)snprintf(number, sizeof number, "%u", answer.code)}, answer.message,
               answer.details, answer.last);
    else
        stream_finish(s, s->code.size ? buffer_text(&s->code) : TEXT("14"), buffer_text(&s->message),
               buffer_text(&s->details), answer.last);
    return true;
}

/* Whether that ends the question: where it does not, the next controller is asked. An attempt that ended at once has
 * asked by itself. */
static bool settles(Stream *s) {
    unsigned attempts = s->attempts;
    return follow(s) && (s->phase != PHASE_ASKING || s->attempts != attempts);
}

/* Ask one controller; whether its answer is still to come. */
static bool ask_one(Stream *s, Text cluster) {
    s->calling = true;
    s->answered = false;
    int result = write_question(s) ? call_controller(s, cluster) : !STARTED;
    s->calling = false;
    return result == STARTED && !s->answered;
}

/* Ask the controllers in turn, from the one that picked, until one is asked or has answered. */
static void ask_next(Stream *s) {
    const Settings *settings = &s->config->settings;
    while (s->asked < settings->count) {
        Text cluster = settings->controllers[(s->controller + s->asked++) % settings->count];
        bool waits = ask_one(s, cluster);
        if (waits || s->gone || s->phase != PHASE_ASKING) return;
        if (s->answered && settles(s)) return;
    }
    /* None of them says anything: what was picked at first may do. */
    if (stream_take_place(s))
        stream_try(s);
    else
        stream_give_up(s);
}

void stream_park(Stream *s) {
    stream_drop(s);
    s->phase = PHASE_PARKED;
    s->after_parking = true;
    s->telling = ask_one(s, s->config->settings.controllers[s->controller]);
}

void stream_unpark(Stream *s) {
    if (s->phase == PHASE_PARKED && s->above == 0 && !s->telling) stream_ask(s, true);
}

void stream_ask(Stream *s, bool after_parking) {
    s->phase = PHASE_ASKING;
    s->after_parking = after_parking;
    s->asked = s->rounds = 0;
    ask_next(s);
}

static void heed(Stream *s, int result, const Text *parts, size_t count) {
    s->answer.size = 0;
    bool whole = result == CALLOUT_SUCCESS;
    for (size_t i = 0; i < count && whole; i++) whole = buffer_put(&s->answer, parts[i].data, parts[i].size);
    if (!whole) s->answer.size = 0; /* which is no answer */
    if (!s->calling && !settles(s)) ask_next(s);
}

void stream_answered(Stream *s, uint64_t id, int result, const Text *parts, size_t count) {
    if (!s->calling && id != s->callout) return;
    s->answered = true;
    if (s->phase == PHASE_PARKED) { /* whatever it was: only, no later question may overtake it */
        s->telling = false;
        stream_unpark(s);
    } else if (s->phase == PHASE_ASKING) {
        heed(s, result, parts, count);
    }
}

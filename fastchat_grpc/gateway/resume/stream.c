#include "stream.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MOST_HEADERS = 128,
    SPARE_HEADERS = 8,
    MOST_ATTEMPTS = 64, /* whatever controllers say */
    MOST_BROKEN = 256,
    SCRATCH_BYTES = 64 * 1024 /* of buffers that are used again */
};

typedef struct {
    const char *path;
    Carriage carriage;
} Method;

static const Method METHODS[] = {
    {"/fastchat_grpc.v1.OpenAIService/ChatCompletions", {.piece = 3, .state = 3, .is_any = true}},
    {"/fastchat_grpc.v1.OpenAIService/Completions", {.piece = 3, .state = 3, .is_any = true}},
    {"/fastchat_grpc.v1.GenerationService/Generate", {.piece = 15, .state = 14, .is_any = false}},
};

static Text header_find(const Header *headers, size_t count, const char *name) {
    for (size_t i = 0; i < count; i++)
        if (text_is(header_name(&headers[i]), name)) return header_value(&headers[i]);
    return (Text){NULL, 0};
}

/* What the pick says of the request. */
static bool picked(Stream *s, const char *key, Buffer *value) {
    Text found;
    return CALL(http_get_metadata_string)(s->envoy, DYNAMIC_METADATA, TEXT("envoy.filters.http.ext_authz"),
                                          (Text){key, strlen(key)}, &found) &&
           found.size && buffer_set(value, found);
}

Stream *stream_new(const Config *config, void *envoy) {
    Stream *s = calloc(1, sizeof *s);
    if (s != NULL) {
        s->config = config;
        s->envoy = envoy;
    }
    return s;
}

void stream_free(Stream *s) {
    Buffer *all[] = {&s->request, &s->places, &s->cluster, &s->pick,    &s->place,  &s->worker_id, &s->fingerprint,
                     &s->backend, &s->held,   &s->code,    &s->message, &s->details, &s->broken,   &s->answer,
                     &s->out,     &s->body};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) buffer_free(all[i]);
    frames_free(&s->frames);
    free(s);
}

/* ------------------------------------------------------------------------------------------------------ the request */

static size_t request_headers(Stream *s, Header *headers) {
    size_t count = CALL(http_get_headers_size)(s->envoy, REQUEST_HEADERS);
    if (count > MOST_HEADERS - SPARE_HEADERS) return 0;
    return CALL(http_get_headers)(s->envoy, REQUEST_HEADERS, headers) ? count : 0;
}

bool stream_claims(Stream *s) {
    Header headers[MOST_HEADERS];
    size_t count = request_headers(s, headers);
    Text path = header_find(headers, count, ":path"), cluster = header_find(headers, count, "x-fastchat-cluster");
    Text encoding = header_find(headers, count, "grpc-encoding");
    const Method *method = NULL;
    for (size_t i = 0; i < sizeof METHODS / sizeof *METHODS; i++)
        if (text_is(path, METHODS[i].path)) method = &METHODS[i];
    if (method == NULL || cluster.size == 0) return false;
    if (encoding.size && !text_is(encoding, "identity")) return false; /* nothing can be put behind such a request */
    if (!picked(s, "places", &s->places) || !picked(s, "continue", &s->pick)) return false;
    if (!buffer_set(&s->cluster, cluster)) return false;
    const Settings *settings = &s->config->settings;
    s->controller = settings_find(settings, cluster);
    s->streamed = header_find(headers, count, "x-fastchat-stream").size > 0;
    s->frames.carriage = method->carriage;
    s->frames.limits = (FrameLimits){.message = settings->message, .state = settings->state};
    s->phase = PHASE_COLLECTING;
    /* The pick has changed the route, which the router would look up now: with it come the bounds of time. */
    CALL(get_most_specific_route_config)(s->envoy);
    return true;
}

/* The headers of a request that a worker gets. */
static size_t worker_headers(Stream *s, Header *headers) {
    Header all[MOST_HEADERS];
    size_t count = request_headers(s, all), kept = 0;
    for (size_t i = 0; i < count; i++) {
        Text name = header_name(&all[i]);
        /* Frames that are compressed cannot be read; what Envoy says to itself is said for each stream anew. */
        if (text_is(name, "content-length") || text_is(name, "grpc-accept-encoding") || text_begins(name, "x-envoy-"))
            continue;
        headers[kept++] = all[i];
    }
    if (s->place.size) headers[kept++] = header("x-fastchat-place", buffer_text(&s->place));
    headers[kept++] = header("x-fastchat-resume", TEXT("1"));
    return kept;
}

/* Whether another worker may do better. What a status means, the controller knows in full; these it is asked about. */
static bool worth_asking(const Stream *s) {
    Text code = buffer_text(&s->code);
    if (s->attempts >= MOST_ATTEMPTS || !frames_can_go_on(&s->frames)) return false;
    if (code.size == 0 || text_is(code, "14") || text_is(code, "1") || text_is(code, "8") || text_is(code, "5"))
        return true;
    /* Of one that was to go on with what another began, a refusal tells of itself alone. */
    bool resumed = s->frames.kept && s->attempts > 1;
    return resumed && (text_is(code, "3") || text_is(code, "9") || text_is(code, "12"));
}

static bool is_final(const Stream *s) {
    Text code = buffer_text(&s->code);
    return !(code.size == 0 || text_is(code, "14") || text_is(code, "1"));
}

/* The attempt has ended, and not well. */
static void attempt_over(Stream *s) {
    s->ended = false;
    if (s->phase == PHASE_OVER) return;
    bool asks = worth_asking(s);
    if (asks || !is_final(s)) {
        stream_count(s, s->config->broken);
        if (s->frames.passed && !is_final(s)) s->losses++;
        if (s->broken.size < MOST_BROKEN) {
            Text code = s->code.size ? buffer_text(&s->code) : TEXT("lost");
            if (s->broken.size) buffer_put(&s->broken, ",", 1);
            buffer_put(&s->broken, s->place.data, s->place.size);
            buffer_put(&s->broken, "=", 1);
            buffer_put(&s->broken, code.data, code.size);
            stream_note(s, "broken", buffer_text(&s->broken));
        }
    }
    if (asks) {
        stream_ask(s, false);
    } else if (is_final(s)) { /* the worker's own word, and its last message if it had one */
        stream_note(s, "end", buffer_text(&s->code));
        stream_note(s, "details", buffer_text(&s->details));
        stream_finish(s, buffer_text(&s->code), buffer_text(&s->message), buffer_text(&s->details), (Text){0});
    } else {
        stream_give_up(s);
    }
}

static void end_attempt(Stream *s) {
    s->active = false;
    s->ended = true;
    if (!s->starting) attempt_over(s);
}

/* ------------------------------------------------------------------------------------------------------ an attempt */

bool stream_take_place(Stream *s) {
    if (s->places.size == 0) return false;
    const char *comma = memchr(s->places.data, ',', s->places.size);
    size_t size = comma ? (size_t)(comma - s->places.data) : s->places.size;
    if (!buffer_set(&s->place, (Text){s->places.data, size})) return false;
    buffer_drop(&s->places, comma ? size + 1 : size);
    return true;
}

void stream_collect(Stream *s, Text part) {
    if (s->phase != PHASE_COLLECTING) return;
    if (part.size > s->config->settings.message - s->request.size)
        stream_fail(s, TEXT("8"), TEXT("the request is too large"));
    else if (!buffer_put(&s->request, part.data, part.size))
        stream_fail(s, TEXT("8"), TEXT("the gateway has no memory for the request"));
}

void stream_begin(Stream *s) {
    if (s->phase != PHASE_COLLECTING) return;
    s->frames.fixed = !frames_extensible(&s->request);
    if (stream_take_place(s))
        stream_try(s);
    else
        stream_fail(s, TEXT("8"), TEXT("the gateway has no memory for the request"));
}

void stream_try(Stream *s) {
    char number[16];
    Header headers[MOST_HEADERS];
    frames_begin(&s->frames);
    buffer_clear(&s->held, 0);
    buffer_clear(&s->body, 0);
    stream_set_status(s, (Text){0}, (Text){0}, (Text){0});
    if (!frames_request(&s->frames, &s->request, &s->body)) {
        stream_fail(s, TEXT("8"), TEXT("the gateway has no memory for the request"));
        return;
    }
    s->attempts++;
    s->worker_id.size = 0; /* the last one's word says nothing of this one */
    s->resumes = frames_resume(&s->frames);
    s->knows = false;
    stream_note(s, "place", buffer_text(&s->place));
    stream_note(s, "attempts", (Text){number, (size_t)snprintf(number, sizeof number, "%u", s->attempts)});
    s->phase = PHASE_RUNNING;
    s->active = s->starting = true;
    s->ended = false;
    s->upstream = 0;
    uint64_t id = 0;
    size_t count = worker_headers(s, headers);
    int result = CALL(http_filter_start_http_stream)(s->envoy, &id, buffer_text(&s->cluster), headers, count,
                                                     buffer_text(&s->body), true, 0);
    s->starting = false;
    buffer_free(&s->body);
    if (s->gone || s->phase == PHASE_OVER) return;
    if (result == STARTED) {
        if (s->active) s->upstream = id;
        if (id > s->newest) s->newest = id;
    } else if (!s->ended) {
        s->active = false;
        s->ended = true; /* nobody is there */
    }
    if (s->ended) attempt_over(s);
}

bool stream_current(Stream *s, uint64_t id) {
    if (!s->active || s->phase != PHASE_RUNNING) return false;
    if (s->starting && id > s->newest) s->newest = s->upstream = id; /* it is told only when it has started */
    return id == s->upstream;
}

static bool hold(Buffer *held, const Header *header) {
    size_t sizes[2] = {header->name_size, header->value_size};
    return buffer_put(held, sizes, sizeof sizes) && buffer_put(held, header->name, header->name_size) &&
           buffer_put(held, header->value, header->value_size);
}

static size_t held_headers(const Buffer *held, Header *headers) {
    size_t at = 0, count = 0, sizes[2];
    while (at < held->size && count < MOST_HEADERS) {
        memcpy(sizes, held->data + at, sizeof sizes);
        at += sizeof sizes;
        headers[count++] = (Header){held->data + at, sizes[0], held->data + at + sizes[0], sizes[1]};
        at += sizes[0] + sizes[1];
    }
    return count;
}

/* Of the hop to the worker alone. */
static bool is_ours(Text name) {
    return text_is(name, "x-fastchat-worker") || text_is(name, "x-fastchat-resume") ||
           text_is(name, "grpc-accept-encoding") || text_begins(name, "x-envoy-");
}

static void learn(Buffer *known, Text value) {
    if (known->size == 0 && value.size) buffer_set(known, value);
}

void stream_headers(Stream *s, const Header *headers, size_t count, bool end) {
    Text status = header_find(headers, count, "grpc-status"), type = header_find(headers, count, "content-type");
    if (!text_is(header_find(headers, count, ":status"), "200") || !text_begins(type, "application/grpc")) {
        if (status.size == 0 || text_is(status, "0")) { /* some other server is where the worker was */
            stream_drop(s);
            end_attempt(s);
            return;
        }
    }
    buffer_set(&s->worker_id, header_find(headers, count, "x-fastchat-worker"));
    s->knows = text_is(header_find(headers, count, "x-fastchat-resume"), "1");
    learn(&s->fingerprint, header_find(headers, count, "x-fastchat-grpc-fingerprint"));
    learn(&s->backend, header_find(headers, count, "x-fastchat-grpc-backend"));
    if (s->worker_id.size) stream_note(s, "served", buffer_text(&s->worker_id));
    if (end) {
        stream_trailers(s, (Header *)headers, count);
        return;
    }
    if (s->told) return;
    buffer_clear(&s->held, SCRATCH_BYTES);
    for (size_t i = 0; i < count && i < MOST_HEADERS; i++)
        if (!is_ours(header_name(&headers[i])) && !hold(&s->held, &headers[i])) {
            stream_fail(s, TEXT("8"), TEXT("the gateway has no memory for the answer"));
            return;
        }
}

/* The caller gets the headers that were held back, with its first frame. */
static bool tell_headers(Stream *s) {
    if (s->told) return true;
    Header headers[MOST_HEADERS];
    size_t count = held_headers(&s->held, headers);
    s->told = true;
    CALL(http_send_response_headers)(s->envoy, headers, count, false);
    if (!s->gone) buffer_free(&s->held);
    return !s->gone && s->phase == PHASE_RUNNING;
}

/* The caller reads slower than its worker writes. Envoy gives no means to stop reading, so the stream leaves its worker. */
static void mind_the_reader(Stream *s, size_t sent) {
    const Settings *settings = &s->config->settings;
    if (s->above == 0) return;
    s->unread += sent;
    if (s->unread > settings->parked && frames_can_go_on(&s->frames)) {
        stream_count(s, s->config->parked);
        stream_park(s);
    } else if (s->unread > settings->unread) {
        stream_fail(s, TEXT("8"), TEXT("the caller reads too slowly, and the answer cannot be resumed"));
    }
}

void stream_data(Stream *s, const Text *parts, size_t count) {
    Buffer *out = &s->out;
    if (s->resumes && !s->knows) { /* it has begun anew: its answer is not the rest of this one */
        stream_drop(s);
        stream_set_status(s, TEXT("12"), TEXT("the worker does not know the state that it was to go on from"), (Text){0});
        end_attempt(s);
        return;
    }
    out->size = 0;
    FramesResult result = FRAMES_OK;
    for (size_t i = 0; i < count && result == FRAMES_OK; i++)
        result = frames_feed(&s->frames, parts[i].data, parts[i].size, out);
    size_t sent = out->size;
    if (sent) {
        if (!tell_headers(s)) return;
        CALL(http_send_response_data)(s->envoy, buffer_text(out), false);
        if (s->gone || s->phase != PHASE_RUNNING) return;
        buffer_clear(out, SCRATCH_BYTES);
    }
    if (result == FRAMES_TOO_LARGE)
        stream_fail(s, TEXT("8"), TEXT("the worker sent a message that is too large"));
    else if (result == FRAMES_NO_MEMORY)
        stream_fail(s, TEXT("8"), TEXT("the gateway has no memory for the answer"));
    else if (sent)
        mind_the_reader(s, sent);
}

void stream_trailers(Stream *s, Header *trailers, size_t count) {
    Text code = header_find(trailers, count, "grpc-status");
    if (!text_is(code, "0")) {
        stream_set_status(s, code, header_find(trailers, count, "grpc-message"), header_find(trailers, count, "grpc-status-details-bin"));
        end_attempt(s);
        return;
    }
    s->active = false;
    if (s->frames.partial.size) { /* cut in the middle of a message, and called good */
        end_attempt(s);
        return;
    }
    stream_note(s, "end", code);
    bool alone = !s->told && s->held.size == 0; /* headers that are trailers, too */
    if (!alone && !tell_headers(s)) return;
    s->phase = PHASE_OVER;
    if (alone) {
        Header headers[MOST_HEADERS];
        size_t kept = 0;
        for (size_t i = 0; i < count && kept < MOST_HEADERS; i++)
            if (!is_ours(header_name(&trailers[i]))) headers[kept++] = trailers[i];
        s->told = true;
        CALL(http_send_response_headers)(s->envoy, headers, kept, true);
    } else {
        CALL(http_send_response_trailers)(s->envoy, trailers, count);
    }
}

void stream_broke(Stream *s) {
    stream_set_status(s, (Text){0}, (Text){0}, (Text){0});
    end_attempt(s);
}

/* ------------------------------------------------------------------------------------------------------ the caller */

void stream_above(Stream *s) { s->above++; }

void stream_below(Stream *s) {
    if (s->above) s->above--;
    if (s->above) return;
    s->unread = 0;
    stream_unpark(s);
}

void stream_over(Stream *s) {
    s->phase = s->phase == PHASE_PASSING ? PHASE_PASSING : PHASE_OVER;
    stream_drop(s);
}

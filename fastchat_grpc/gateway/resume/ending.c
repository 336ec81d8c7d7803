/* What a caller gets at the end of a stream. */
#include "stream.h"
#include "wire.h"

enum { HTTP_BODY_DATA = 2 };

void stream_count(Stream *s, size_t counter) { CALL(http_filter_increment_counter)(s->envoy, counter, NULL, 0, 1); }

void stream_note(Stream *s, const char *key, Text value) {
    CALL(http_set_dynamic_metadata_string)(s->envoy, TEXT("fastchat_grpc"), (Text){key, strlen(key)}, value);
}

void stream_set_status(Stream *s, Text code, Text message, Text details) {
    buffer_set(&s->code, code);
    buffer_set(&s->message, message);
    buffer_set(&s->details, details);
}

void stream_drop(Stream *s) {
    if (!s->active) return;
    s->active = false; /* first: the hook for it is called inside */
    if (!s->starting) CALL(http_filter_reset_http_stream)(s->envoy, s->upstream);
}

/* Send a message to the caller. False where that has ended the stream. */
static bool send_message(Stream *s, Text message) {
    Buffer *out = &s->out;
    out->size = 0;
    if (!buffer_put(out, "\0\0\0\0\0", FRAME_HEAD) || !buffer_put(out, message.data, message.size)) return true;
    frame_set_size(out->data, message.size);
    CALL(http_send_response_data)(s->envoy, buffer_text(out), false);
    return !s->gone;
}

void stream_finish(Stream *s, Text code, Text message, Text details, Text last) {
    if (s->phase == PHASE_OVER) return;
    s->phase = PHASE_OVER;
    stream_drop(s);
    Header headers[5] = {
        header(":status", TEXT("200")),
        header("content-type", TEXT("application/grpc")),
        header("grpc-status", code),
    };
    size_t count = 3;
    if (message.size) headers[count++] = header("grpc-message", message);
    if (details.size) headers[count++] = header("grpc-status-details-bin", details);
    if (!s->told) {
        s->told = true;
        CALL(http_send_response_headers)(s->envoy, headers, count, true);
    } else if (last.size == 0 || send_message(s, last)) {
        CALL(http_send_response_trailers)(s->envoy, headers + 2, count - 2);
    }
}

/* The event that tells a caller of events, in OpenAI's shape, why they end: an HttpBody. Empty for other callers. */
static void write_farewell(Stream *s, Text why, Buffer *out) {
    const Settings *settings = &s->config->settings;
    const Text parts[] = {TEXT("data: "), settings->farewell, why, settings->farewell_end, TEXT("\n\ndata: [DONE]\n\n")};
    size_t count = sizeof parts / sizeof *parts, size = 0;
    if (!s->streamed || !s->frames.carriage.is_any || s->frames.passed == 0) return;
    for (size_t i = 0; i < count; i++) size += parts[i].size;
    bool whole = wire_head(out, HTTP_BODY_DATA, size);
    for (size_t i = 0; i < count && whole; i++) whole = buffer_put(out, parts[i].data, parts[i].size);
    if (!whole) buffer_free(out);
}

static void finish_with_event(Stream *s, Text code, Text message, Text details, Text why) {
    Buffer last = {0};
    write_farewell(s, why, &last);
    stream_finish(s, code, message, details, buffer_text(&last));
    buffer_free(&last);
}

void stream_fail(Stream *s, Text code, Text why) { finish_with_event(s, code, why, (Text){0}, why); }

void stream_give_up(Stream *s) {
    Text lost = TEXT("the worker of this stream was lost, and no controller could say who goes on with it");
    bool broke = s->code.size == 0;
    stream_count(s, s->config->given_up);
    stream_note(s, "end", broke ? TEXT("lost") : buffer_text(&s->code));
    stream_note(s, "details", buffer_text(&s->details));
    if (broke)
        stream_fail(s, TEXT("14"), lost);
    else
        finish_with_event(s, buffer_text(&s->code), buffer_text(&s->message), buffer_text(&s->details), lost);
}

/* The functions that Envoy calls. */
#include <stdlib.h>

#include "stream.h"

/* Envoy may destroy the filter inside of what a hook calls: it is freed when the outermost hook returns. */
static Stream *enter(const void *module) {
    Stream *s = (Stream *)module;
    s->depth++;
    return s;
}

static void leave(Stream *s) {
    if (--s->depth == 0 && s->gone) stream_free(s);
}

#pragma GCC visibility push(default)

const char *HOOK(program_init)(void) { return ABI_VERSION; }

const void *HOOK(http_filter_config_new)(void *envoy, Text name, Text text) {
    (void)name;
    Config *config = calloc(1, sizeof *config);
    if (config == NULL) return NULL;
    if (!settings_read(&config->settings, text)) {
        CALL(log)(LOG_ERROR, TEXT("resume: its settings are not whole"));
        settings_free(&config->settings);
        free(config);
        return NULL;
    }
    CALL(http_filter_config_define_counter)(envoy, TEXT("fastchat_grpc.streams_broken"), NULL, 0, &config->broken);
    CALL(http_filter_config_define_counter)(envoy, TEXT("fastchat_grpc.streams_resumed"), NULL, 0, &config->resumed);
    CALL(http_filter_config_define_counter)(envoy, TEXT("fastchat_grpc.streams_parked"), NULL, 0, &config->parked);
    CALL(http_filter_config_define_counter)(envoy, TEXT("fastchat_grpc.streams_given_up"), NULL, 0, &config->given_up);
    return config;
}

void HOOK(http_filter_config_destroy)(const void *module) {
    Config *config = (Config *)module;
    settings_free(&config->settings);
    free(config);
}

const void *HOOK(http_filter_per_route_config_new)(Text name, Text text) {
    (void)name;
    (void)text;
    return "";
}

void HOOK(http_filter_per_route_config_destroy)(const void *config) { (void)config; }

const void *HOOK(http_filter_new)(const void *config, void *envoy) { return stream_new(config, envoy); }

void HOOK(http_filter_stream_complete)(void *envoy, const void *module) {
    (void)envoy;
    (void)module;
}

void HOOK(http_filter_destroy)(const void *module) {
    Stream *s = (Stream *)module;
    s->gone = true;
    if (s->depth == 0) stream_free(s);
}

/* ------------------------------------------------------------------------------------------------------ the request */

int HOOK(http_filter_request_headers)(void *envoy, const void *module, bool end) {
    (void)envoy;
    Stream *s = enter(module);
    bool ours = !end && stream_claims(s);
    leave(s);
    return ours ? HEADERS_STOP : HEADERS_CONTINUE;
}

static void collect(Stream *s) {
    size_t count = CALL(http_get_body_chunks_size)(s->envoy, RECEIVED_REQUEST_BODY);
    if (count == 0) return;
    Text *chunks = calloc(count, sizeof *chunks);
    if (chunks == NULL || !CALL(http_get_body_chunks)(s->envoy, RECEIVED_REQUEST_BODY, chunks))
        stream_fail(s, TEXT("8"), TEXT("the gateway has no memory for the request"));
    else
        for (size_t i = 0; i < count; i++) stream_collect(s, chunks[i]);
    free(chunks);
}

int HOOK(http_filter_request_body)(void *envoy, const void *module, bool end) {
    (void)envoy;
    Stream *s = enter(module);
    bool ours = s->phase != PHASE_PASSING;
    if (ours) {
        collect(s);
        if (end) stream_begin(s);
    }
    leave(s);
    return ours ? BODY_STOP : BODY_CONTINUE;
}

int HOOK(http_filter_request_trailers)(void *envoy, const void *module) {
    (void)envoy;
    Stream *s = enter(module);
    bool ours = s->phase != PHASE_PASSING;
    if (ours) stream_begin(s);
    leave(s);
    return ours ? TRAILERS_STOP : TRAILERS_CONTINUE;
}

/* ------------------------------------------------------------------------------------------------------ the answer */

int HOOK(http_filter_response_headers)(void *envoy, const void *module, bool end) {
    (void)envoy;
    (void)module;
    (void)end;
    return HEADERS_CONTINUE;
}

int HOOK(http_filter_response_body)(void *envoy, const void *module, bool end) {
    (void)envoy;
    (void)module;
    (void)end;
    return BODY_CONTINUE;
}

int HOOK(http_filter_response_trailers)(void *envoy, const void *module) {
    (void)envoy;
    (void)module;
    return TRAILERS_CONTINUE;
}

void HOOK(http_filter_http_stream_headers)(void *envoy, const void *module, uint64_t id, Header *headers, size_t count,
                                           bool end) {
    (void)envoy;
    Stream *s = enter(module);
    if (stream_current(s, id)) stream_headers(s, headers, count, end);
    leave(s);
}

void HOOK(http_filter_http_stream_data)(void *envoy, const void *module, uint64_t id, const Text *parts, size_t count,
                                        bool end) {
    (void)envoy;
    (void)end; /* without trailers: the end comes by the hook below */
    Stream *s = enter(module);
    if (stream_current(s, id)) stream_data(s, parts, count);
    leave(s);
}

void HOOK(http_filter_http_stream_trailers)(void *envoy, const void *module, uint64_t id, Header *trailers,
                                            size_t count) {
    (void)envoy;
    Stream *s = enter(module);
    if (stream_current(s, id)) stream_trailers(s, trailers, count);
    leave(s);
}

void HOOK(http_filter_http_stream_complete)(void *envoy, const void *module, uint64_t id) {
    (void)envoy;
    Stream *s = enter(module);
    if (stream_current(s, id)) stream_broke(s);
    leave(s);
}

void HOOK(http_filter_http_stream_reset)(void *envoy, const void *module, uint64_t id, int reason) {
    (void)envoy;
    (void)reason; /* which is the same for all of them */
    Stream *s = enter(module);
    if (stream_current(s, id)) stream_broke(s);
    leave(s);
}

void HOOK(http_filter_http_callout_done)(void *envoy, const void *module, uint64_t id, int result, Header *headers,
                                         size_t header_count, Text *parts, size_t count) {
    (void)envoy;
    (void)headers;
    (void)header_count;
    Stream *s = enter(module);
    stream_answered(s, id, result, parts, count);
    leave(s);
}

/* ------------------------------------------------------------------------------------------------------ the caller */

void HOOK(http_filter_downstream_above_write_buffer_high_watermark)(void *envoy, const void *module) {
    (void)envoy;
    Stream *s = enter(module);
    stream_above(s);
    leave(s);
}

void HOOK(http_filter_downstream_below_write_buffer_low_watermark)(void *envoy, const void *module) {
    (void)envoy;
    Stream *s = enter(module);
    stream_below(s);
    leave(s);
}

int HOOK(http_filter_local_reply)(void *envoy, const void *module, uint32_t code, Text details, bool reset) {
    (void)envoy;
    (void)code;
    (void)details;
    (void)reset;
    Stream *s = enter(module);
    stream_over(s);
    leave(s);
    return LOCAL_REPLY_CONTINUE;
}

void HOOK(http_filter_scheduled)(void *envoy, const void *module, uint64_t id) {
    (void)envoy;
    (void)module;
    (void)id;
}

void HOOK(http_filter_config_scheduled)(void *envoy, const void *module, uint64_t id) {
    (void)envoy;
    (void)module;
    (void)id;
}

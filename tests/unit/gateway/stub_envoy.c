/* An Envoy of a few lines around the gateway's module: it does what it is told, and prints what the module makes it do.
 *
 *     stub_envoy COMMAND...
 *
 *     controllers N       before all others; 1 otherwise
 *     begin               a caller's request comes, whole, for the place "first"
 *     heads ID WORDS      the stream ID to a worker begins to answer; WORDS: any of "ack", "end" (OK, and nothing else)
 *     frame ID TEXT       it sends a message with a piece of state
 *     bare ID TEXT        ... and without one
 *     trailers ID CODE    it ends
 *     reset ID            it breaks
 *     goes ID PLACE       the controller answers the callout ID: go on there
 *     says ID CODE        ... nobody goes on
 *     other ID            ... ask another one
 *     again ID            ... ask again
 *     silent ID           ... not at all
 *     above, below        the caller's connection passes a watermark
 *     nomemory NAME N     the N-th calloc or realloc from now on fails
 */
#include <stdio.h>
#include <stdlib.h>

#include "stream.h"
#include "wire.h"

const void *HOOK(http_filter_config_new)(void *, Text, Text);
void HOOK(http_filter_config_destroy)(const void *);
const void *HOOK(http_filter_new)(const void *, void *);
void HOOK(http_filter_destroy)(const void *);
int HOOK(http_filter_request_headers)(void *, const void *, bool);
int HOOK(http_filter_request_body)(void *, const void *, bool);
void HOOK(http_filter_http_stream_headers)(void *, const void *, uint64_t, Header *, size_t, bool);
void HOOK(http_filter_http_stream_data)(void *, const void *, uint64_t, const Text *, size_t, bool);
void HOOK(http_filter_http_stream_trailers)(void *, const void *, uint64_t, Header *, size_t);
void HOOK(http_filter_http_stream_reset)(void *, const void *, uint64_t, int);
void HOOK(http_filter_http_callout_done)(void *, const void *, uint64_t, int, Header *, size_t, Text *, size_t);
void HOOK(http_filter_downstream_above_write_buffer_high_watermark)(void *, const void *);
void HOOK(http_filter_downstream_below_write_buffer_low_watermark)(void *, const void *);

static const void *stream;
static uint64_t newest;
static const char *fails = "";
static unsigned long fails_at;

void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *data, size_t size);

static bool fails_now(const char *name) {
    return strcmp(fails, name) == 0 && --fails_at == 0;
}

void *__wrap_calloc(size_t count, size_t size) { return fails_now("calloc") ? NULL : __real_calloc(count, size); }
void *__wrap_realloc(void *data, size_t size) { return fails_now("realloc") ? NULL : __real_realloc(data, size); }

/* ------------------------------------------------------------------------------------- what the module asks of Envoy */

void CALL(log)(int level, Text message) { printf("log %d %.*s\n", level, (int)message.size, message.data); }
bool CALL(log_enabled)(int level) { return level >= LOG_WARN; }

static const Header REQUEST[] = {{":path", 5, "/fastchat_grpc.v1.OpenAIService/ChatCompletions", 47},
                                 {"x-fastchat-cluster", 18, "workers_0", 9},
                                 {"x-fastchat-stream", 17, "1", 1}};
static const char BODY[] = "\0\0\0\0\3\x12\1x";

size_t CALL(http_get_headers_size)(void *filter, int which) { return filter || which ? 0 : 3; }

bool CALL(http_get_headers)(void *filter, int which, Header *out) {
    memcpy(out, REQUEST, sizeof REQUEST);
    return !filter && !which;
}

size_t CALL(http_get_body_chunks_size)(void *filter, int which) { return filter || which ? 0 : 1; }

bool CALL(http_get_body_chunks)(void *filter, int which, Text *out) {
    *out = (Text){BODY, sizeof BODY - 1};
    return !filter && !which;
}

bool CALL(http_get_metadata_string)(void *filter, int source, Text space, Text key, Text *out) {
    *out = text_is(key, "places") ? TEXT("first") : TEXT("{}");
    return !filter && source == DYNAMIC_METADATA && space.size;
}

void CALL(http_set_dynamic_metadata_string)(void *filter, Text space, Text key, Text value) {
    (void)filter, (void)space, (void)key, (void)value;
}

const void *CALL(get_most_specific_route_config)(void *filter) { return filter; }

static void print_text(const char *data, size_t size) {
    for (size_t i = 0; i < size; i++) putchar(data[i] >= ' ' && data[i] <= '~' ? data[i] : '.');
}

static void print_headers(const Header *headers, size_t count) {
    for (size_t i = 0; i < count; i++) {
        printf(" %.*s=", (int)headers[i].name_size, headers[i].name);
        print_text(headers[i].value, headers[i].value_size);
    }
    printf("\n");
}

void CALL(http_send_response_headers)(void *filter, Header *headers, size_t count, bool end) {
    (void)filter;
    printf(end ? "only" : "headers");
    print_headers(headers, count);
}

void CALL(http_send_response_data)(void *filter, Text data, bool end) {
    (void)filter, (void)end;
    for (size_t at = 0; at + FRAME_HEAD <= data.size; at += FRAME_HEAD + frame_size(data.data + at)) {
        const uint8_t *from = (const uint8_t *)data.data + at + FRAME_HEAD, *to = from + frame_size(data.data + at);
        Field field;
        while (from < to && wire_next(&from, to, &field)) {
            printf("caller gets ");
            print_text((const char *)field.data, field.size);
            printf("\n");
        }
    }
}

void CALL(http_send_response_trailers)(void *filter, Header *trailers, size_t count) {
    (void)filter;
    printf("trailers");
    print_headers(trailers, count);
}

/* What a question says of parking. */
static const char *parking(Text question) {
    const char *found = "";
    const uint8_t *at = (const uint8_t *)question.data + FRAME_HEAD, *end = (const uint8_t *)question.data + question.size;
    Field field;
    while (at < end && wire_next(&at, end, &field))
        if (field.number == 8 || field.number == 11) found = field.number == 8 ? " after parking" : " while parked";
    return found;
}

int CALL(http_filter_http_callout)(void *filter, uint64_t *id, Text cluster, Header *headers, size_t count, Text body,
                                   uint64_t timeout_ms) {
    (void)filter, (void)headers, (void)count, (void)timeout_ms;
    *id = ++newest;
    printf("%llu asks %.*s%s\n", (unsigned long long)newest, (int)cluster.size, cluster.data,
           parking(body));
    return STARTED;
}

int CALL(http_filter_start_http_stream)(void *filter, uint64_t *id, Text cluster, Header *headers, size_t count,
                                        Text body, bool end, uint64_t timeout_ms) {
    (void)filter, (void)cluster, (void)end, (void)timeout_ms;
    *id = ++newest;
    printf("%llu starts with %zu bytes at ", (unsigned long long)newest, body.size - FRAME_HEAD);
    for (size_t i = 0; i < count; i++)
        if (text_is(header_name(&headers[i]), "x-fastchat-place")) print_text(headers[i].value, headers[i].value_size);
    printf("\n");
    return STARTED;
}

void CALL(http_filter_reset_http_stream)(void *filter, uint64_t id) {
    (void)filter;
    printf("%llu is reset\n", (unsigned long long)id);
}

int CALL(http_filter_config_define_counter)(void *config, Text name, Text *labels, size_t count, size_t *id) {
    (void)config, (void)name, (void)labels, (void)count;
    *id = 0;
    return 0;
}

int CALL(http_filter_increment_counter)(void *filter, size_t id, Text *labels, size_t count, uint64_t value) {
    (void)filter, (void)id, (void)labels, (void)count, (void)value;
    return 0;
}

/* -------------------------------------------------------------------------------------------- what the module is told */

static Text text_of(const char *word) { return (Text){word, strlen(word)}; }

static void whole_frame(Buffer *frame) { frame_set_size(frame->data, frame->size - FRAME_HEAD); }

static void send_heads(uint64_t id, const char *words) {
    Header all[5] = {header(":status", TEXT("200")), header("content-type", TEXT("application/grpc")),
                     header("x-fastchat-worker", TEXT("w"))};
    size_t count = 3;
    if (strstr(words, "ack")) all[count++] = header("x-fastchat-resume", TEXT("1"));
    if (strstr(words, "end")) all[count++] = header("grpc-status", TEXT("0"));
    HOOK(http_filter_http_stream_headers)(NULL, stream, id, all, count, strstr(words, "end") != NULL);
}

static void send_frame(uint64_t id, const char *text, bool piece, const char *failing) {
    Buffer frame = {0};
    buffer_put(&frame, "\0\0\0\0\0", FRAME_HEAD);
    wire_bytes(&frame, 2, text, strlen(text));
    if (piece) wire_bytes(&frame, 3, "\x12\1s", 3);
    whole_frame(&frame);
    Text whole = buffer_text(&frame);
    fails = failing;
    HOOK(http_filter_http_stream_data)(NULL, stream, id, &whole, 1, false);
    buffer_free(&frame);
}

static void send_trailers(uint64_t id, const char *code) {
    Header status = header("grpc-status", text_of(code));
    HOOK(http_filter_http_stream_trailers)(NULL, stream, id, &status, 1);
}

static void send_answer(uint64_t id, const char *command, const char *word) {
    Buffer frame = {0};
    buffer_put(&frame, "\0\0\0\0\0", FRAME_HEAD);
    if (strcmp(command, "goes") == 0) wire_bytes(&frame, 1, word, strlen(word));
    if (strcmp(command, "goes") == 0) wire_bytes(&frame, 2, "workers_0", 9);
    if (strcmp(command, "again") == 0) wire_number(&frame, 3, 1);
    if (strcmp(command, "says") == 0) wire_number(&frame, 4, strtoull(word, NULL, 10));
    if (strcmp(command, "says") == 0) wire_bytes(&frame, 5, "as told", 7);
    if (strcmp(command, "other") == 0) wire_number(&frame, 4, 14);
    if (strcmp(command, "other") == 0) wire_number(&frame, 8, 1);
    whole_frame(&frame);
    Text whole = buffer_text(&frame);
    bool silent = strcmp(command, "silent") == 0;
    HOOK(http_filter_http_callout_done)(NULL, stream, id, silent, NULL, 0, &whole, 1);
    buffer_free(&frame);
}

static const void *new_config(unsigned controllers) {
    Buffer text = {0};
    char line[64];
    for (unsigned i = 0; i < controllers; i++)
        buffer_put(&text, line, (size_t)snprintf(line, sizeof line, "controller workers_%u controller_%u\n", i, i));
    static const char rest[] = "state 4096\nmessage 4096\nparked 8\nunread 4096\nask_ms 8\nfarewell {\nfarewell_end }\n";
    buffer_put(&text, rest, sizeof rest - 1);
    const void *config = HOOK(http_filter_config_new)(NULL, TEXT("resume"), buffer_text(&text));
    buffer_free(&text);
    return config;
}

static void begin(void) {
    HOOK(http_filter_request_headers)(NULL, stream, false);
    HOOK(http_filter_request_body)(NULL, stream, true);
}

/* Do one command; returns how many words it takes. */
static int obey(char **words) {
    const char *command = words[0], *failing = fails;
    uint64_t id = words[1] ? strtoull(words[1], NULL, 10) : 0;
    const char *word = words[1] && words[2] ? words[2] : "";
    if (strcmp(command, "begin") == 0) return begin(), 1;
    if (strcmp(command, "above") == 0)
        return HOOK(http_filter_downstream_above_write_buffer_high_watermark)(NULL, stream), 1;
    if (strcmp(command, "below") == 0)
        return HOOK(http_filter_downstream_below_write_buffer_low_watermark)(NULL, stream), 1;
    if (strcmp(command, "nomemory") == 0) return fails = words[1], fails_at = strtoul(words[2], NULL, 10), 3;
    if (strcmp(command, "reset") == 0) return HOOK(http_filter_http_stream_reset)(NULL, stream, id, 0), 2;
    fails = "";
    if (strcmp(command, "heads") == 0) return send_heads(id, word), 3;
    if (strcmp(command, "frame") == 0) return send_frame(id, word, true, failing), 3;
    if (strcmp(command, "bare") == 0) return send_frame(id, word, false, failing), 3;
    if (strcmp(command, "trailers") == 0) return send_trailers(id, word), 3;
    send_answer(id, command, word);
    return strcmp(command, "goes") == 0 || strcmp(command, "says") == 0 ? 3 : 2;
}

int main(int argc, char **argv) {
    int at = 1;
    unsigned controllers = 1;
    if (argc > 2 && strcmp(argv[1], "controllers") == 0) {
        controllers = (unsigned)strtoul(argv[2], NULL, 10);
        at = 3;
    }
    const void *config = new_config(controllers);
    stream = HOOK(http_filter_new)(config, NULL);
    while (at < argc) at += obey(argv + at);
    HOOK(http_filter_destroy)(stream);
    HOOK(http_filter_config_destroy)(config);
    return 0;
}

/* What this module uses of Envoy's ABI for dynamic modules, version v0.2.0 (Envoy 1.40).
 *
 * What Envoy passes lives until the hook returns; what is passed to Envoy is copied. All hooks of one filter run on one
 * thread; its configuration is shared by all of them.
 */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "buffer.h"

#define ABI_VERSION "v0.2.0"
#define HOOK(name) envoy_dynamic_module_on_##name
#define CALL(name) envoy_dynamic_module_callback_##name

typedef struct {
    const char *name;
    size_t name_size;
    const char *value;
    size_t value_size;
} Header;

enum { LOG_TRACE, LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };
enum { REQUEST_HEADERS = 0 };
enum { RECEIVED_REQUEST_BODY = 0 };
enum { DYNAMIC_METADATA = 0 };
static inline Text header_name(const Header *header) { return (Text){header->name, header->name_size}; }
static inline Text header_value(const Header *header) { return (Text){header->value, header->value_size}; }
static inline Header header(const char *name, Text value) {
    return (Header){name, strlen(name), value.data, value.size};
}

/* What hooks return. */
enum { HEADERS_CONTINUE = 0, HEADERS_STOP = 1 };
enum { BODY_CONTINUE = 0, BODY_STOP = 3 /* and do not buffer it */ };
enum { TRAILERS_CONTINUE = 0, TRAILERS_STOP = 1 };
enum { LOCAL_REPLY_CONTINUE = 0 };
/* What starting a callout or a stream returns, and the result of a callout. */
enum { STARTED = 0 };
enum { CALLOUT_SUCCESS = 0 };

void CALL(log)(int level, Text message);
bool CALL(log_enabled)(int level);

size_t CALL(http_get_headers_size)(void *filter, int which);
bool CALL(http_get_headers)(void *filter, int which, Header *out);
size_t CALL(http_get_body_chunks_size)(void *filter, int which);
bool CALL(http_get_body_chunks)(void *filter, int which, Text *out);
bool CALL(http_get_metadata_string)(void *filter, int source, Text space, Text key, Text *out);
void CALL(http_set_dynamic_metadata_string)(void *filter, Text space, Text key, Text value);

/* The module has no configuration of routes; asking for it makes Envoy look its route up. */
const void *CALL(get_most_specific_route_config)(void *filter);

void CALL(http_send_response_headers)(void *filter, Header *headers, size_t count, bool end);
void CALL(http_send_response_data)(void *filter, Text data, bool end);
void CALL(http_send_response_trailers)(void *filter, Header *trailers, size_t count);

int CALL(http_filter_http_callout)(void *filter, uint64_t *id, Text cluster, Header *headers, size_t count, Text body,
                                   uint64_t timeout_ms);
int CALL(http_filter_start_http_stream)(void *filter, uint64_t *id, Text cluster, Header *headers, size_t count,
                                        Text body, bool end, uint64_t timeout_ms);
void CALL(http_filter_reset_http_stream)(void *filter, uint64_t id);

int CALL(http_filter_config_define_counter)(void *config, Text name, Text *labels, size_t count, size_t *id);
int CALL(http_filter_increment_counter)(void *filter, size_t id, Text *labels, size_t count, uint64_t value);

/* Bytes that grow. A buffer for which there is no memory stays as it is and says so. */
#pragma once
#include <stdbool.h>
#include <stddef.h>

/* Bytes of somebody else's, such as a header's value. Envoy's ABI has the same layout for them. */
typedef struct {
    const char *data;
    size_t size;
} Text;

#define TEXT(literal) ((Text){(literal), sizeof(literal) - 1})

bool text_is(Text text, const char *word);
bool text_begins(Text text, const char *word);
/* Whether all of it is printable ASCII, as the value of a header must be. */
bool text_printable(Text text);

typedef struct {
    char *data;
    size_t size;
    size_t capacity;
} Buffer;

/* Append; false where there is no memory. */
bool buffer_put(Buffer *buffer, const void *data, size_t size);
/* Leave out the first bytes. */
void buffer_drop(Buffer *buffer, size_t size);
/* Empty it, and give its memory back where it has more than `most`. */
void buffer_clear(Buffer *buffer, size_t most);
void buffer_free(Buffer *buffer);
/* Put a text in place of what is there; what it held stays where there is no memory. */
bool buffer_set(Buffer *buffer, Text text);
Text buffer_text(const Buffer *buffer);

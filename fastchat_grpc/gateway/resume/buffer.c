#include "buffer.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

bool text_is(Text text, const char *word) {
    return text.size == strlen(word) && memcmp(text.data, word, text.size) == 0;
}

bool text_begins(Text text, const char *word) {
    size_t size = strlen(word);
    return text.size >= size && memcmp(text.data, word, size) == 0;
}

bool text_printable(Text text) {
    for (size_t i = 0; i < text.size; i++)
        if (text.data[i] < ' ' || text.data[i] > '~') return false;
    return true;
}

bool buffer_put(Buffer *buffer, const void *data, size_t size) {
    if (size > SIZE_MAX / 2 - buffer->size) return false;
    if (buffer->size + size > buffer->capacity) {
        size_t capacity = buffer->size + size + buffer->size / 2 + 64;
        char *grown = realloc(buffer->data, capacity);
        if (grown == NULL) return false;
        buffer->data = grown;
        buffer->capacity = capacity;
    }
    if (size) memcpy(buffer->data + buffer->size, data, size);
    buffer->size += size;
    return true;
}

void buffer_drop(Buffer *buffer, size_t size) {
    if (size == 0) return;
    memmove(buffer->data, buffer->data + size, buffer->size - size);
    buffer->size -= size;
}

void buffer_clear(Buffer *buffer, size_t most) {
    buffer->size = 0;
    if (buffer->capacity > most) buffer_free(buffer);
}

void buffer_free(Buffer *buffer) {
    free(buffer->data);
    *buffer = (Buffer){0};
}

bool buffer_set(Buffer *buffer, Text text) {
    size_t before = buffer->size;
    buffer->size = 0;
    if (buffer_put(buffer, text.data, text.size)) return true;
    buffer->size = before;
    return false;
}

Text buffer_text(const Buffer *buffer) { return (Text){buffer->data, buffer->size}; }

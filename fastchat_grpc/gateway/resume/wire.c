#include "wire.h"

enum { VARINT_BYTES = 10 };

/* Bytes of the varint that begins here; 0 where it is cut short or too long. */
static size_t read_varint(const uint8_t *at, const uint8_t *end, uint64_t *value) {
    *value = 0;
    for (size_t i = 0; i < VARINT_BYTES && at + i < end; i++) {
        *value |= (uint64_t)(at[i] & 0x7f) << (7 * i);
        if (at[i] < 0x80) return i + 1;
    }
    return 0;
}

bool wire_next(const uint8_t **at, const uint8_t *end, Field *field) {
    const uint8_t *p = *at;
    uint64_t tag, length;
    size_t used = read_varint(p, end, &tag);
    if (used == 0 || tag >> 3 == 0 || tag > UINT32_MAX) return false;
    *field = (Field){.number = tag >> 3, .type = tag & 7, .start = p};
    p += used;
    switch (field->type) {
    case WIRE_VARINT:
        used = read_varint(p, end, &field->value);
        if (used == 0) return false;
        p += used;
        break;
    case WIRE_BYTES:
        used = read_varint(p, end, &length);
        if (used == 0 || length > (uint64_t)(end - p) - used) return false;
        field->data = p + used;
        field->size = (size_t)length;
        p = field->data + field->size;
        break;
    case WIRE_FIXED64:
    case WIRE_FIXED32:
        used = field->type == WIRE_FIXED64 ? 8 : 4;
        if ((size_t)(end - p) < used) return false;
        p += used;
        break;
    default: /* groups, which proto3 does not have */
        return false;
    }
    field->end = *at = p;
    return true;
}

static bool put_varint(Buffer *out, uint64_t value) {
    uint8_t bytes[VARINT_BYTES];
    size_t count = 0;
    do {
        bytes[count++] = (uint8_t)(value & 0x7f) | (value > 0x7f ? 0x80 : 0);
        value >>= 7;
    } while (value);
    return buffer_put(out, bytes, count);
}

bool wire_head(Buffer *out, unsigned number, size_t size) {
    return put_varint(out, (uint64_t)number << 3 | WIRE_BYTES) && put_varint(out, size);
}

bool wire_bytes(Buffer *out, unsigned number, const void *data, size_t size) {
    return size == 0 || (wire_head(out, number, size) && buffer_put(out, data, size));
}

bool wire_number(Buffer *out, unsigned number, uint64_t value) {
    return value == 0 || (put_varint(out, (uint64_t)number << 3 | WIRE_VARINT) && put_varint(out, value));
}

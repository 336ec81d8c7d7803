/* Protobuf's wire format: reading the fields of a message one by one, and writing some. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "buffer.h"

enum { WIRE_VARINT = 0, WIRE_FIXED64 = 1, WIRE_BYTES = 2, WIRE_FIXED32 = 5 };

typedef struct {
    uint64_t number;     /* of the field */
    unsigned type;       /* one of WIRE_... */
    uint64_t value;      /* of a varint */
    const uint8_t *data; /* what a field of WIRE_BYTES holds */
    size_t size;
    const uint8_t *start; /* of the whole field, its tag included */
    const uint8_t *end;
} Field;

/* Read the field at `*at`, and go behind it. False where there is none that is whole and valid. */
bool wire_next(const uint8_t **at, const uint8_t *end, Field *field);
/* Append fields; false where there is no memory. What is empty or zero is left out, as protobuf does. */
bool wire_bytes(Buffer *out, unsigned number, const void *data, size_t size);
bool wire_number(Buffer *out, unsigned number, uint64_t value);
/* Append a tag and a length alone, for a field of WIRE_BYTES that follows. */
bool wire_head(Buffer *out, unsigned number, size_t size);

// Names, offsets and sizes of what kernels.py mirrors, for it to compare.

#include <stddef.h>

#include "kernels.h"

#define WHOLE(type) {#type, 0, sizeof(type)}
#define FIELD(type, name) {#type "." #name, offsetof(type, name), sizeof(((type *)0)->name)}

static const Field fields[] = {
    WHOLE(Heads), FIELD(Heads, kv_heads), FIELD(Heads, group), FIELD(Heads, size), FIELD(Heads, value_size),
    FIELD(Heads, query_stride), FIELD(Heads, window), FIELD(Heads, scale),
    WHOLE(Pool), FIELD(Pool, keys), FIELD(Pool, values),
    WHOLE(NewTokens), FIELD(NewTokens, keys), FIELD(NewTokens, values), FIELD(NewTokens, slot_mapping),
    FIELD(NewTokens, count), FIELD(NewTokens, key_stride), FIELD(NewTokens, value_stride),
    WHOLE(Decode), FIELD(Decode, slot_mapping), FIELD(Decode, contexts), FIELD(Decode, lengths), FIELD(Decode, count),
    FIELD(Decode, longest),
    WHOLE(Chunk), FIELD(Chunk, context), FIELD(Chunk, count), FIELD(Chunk, length),
    WHOLE(Rotary), FIELD(Rotary, cosine), FIELD(Rotary, sine), FIELD(Rotary, count), FIELD(Rotary, size),
    WHOLE(Qkv), FIELD(Qkv, heads), FIELD(Qkv, kv_heads), FIELD(Qkv, query_norm), FIELD(Qkv, key_norm),
    FIELD(Qkv, epsilon),
    WHOLE(Product), FIELD(Product, packed), FIELD(Product, bias), FIELD(Product, outputs), FIELD(Product, inputs),
    WHOLE(Layer), FIELD(Layer, hidden), FIELD(Layer, inner), FIELD(Layer, size), FIELD(Layer, window),
    FIELD(Layer, epsilon), FIELD(Layer, scale), FIELD(Layer, attention_norm), FIELD(Layer, mlp_norm),
    FIELD(Layer, heads), FIELD(Layer, qkv), FIELD(Layer, o), FIELD(Layer, gate_up), FIELD(Layer, down),
    WHOLE(Stack), FIELD(Stack, layers), FIELD(Stack, pools), FIELD(Stack, count),
};

int64_t layout(const Field **all) {
    *all = fields;
    return sizeof fields / sizeof *fields;
}

int is_parallel(void) {
    #ifdef _OPENMP
    return 1;
    #else
    return 0;
    #endif
}

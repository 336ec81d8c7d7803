// A step of one token of each sequence through all layers in one call: what a call costs, and waiting for Python's
// lock after it, is paid once and not for each part of each layer.

#include <stdlib.h>

#include "kernels.h"

static int decode_layer(const Layer *layer, const Pool *pool, float *x, const Decode *decode, const Rotary *rotary) {
    int64_t kv_heads = layer->heads.kv_heads, size = layer->size, count = decode->count;
    int64_t query = layer->heads.heads * size, key = kv_heads * size, width = query + 2 * key;
    Heads heads = {kv_heads, layer->heads.heads / kv_heads, size, size, width, layer->window, layer->scale};
    float *qkv = malloc(sizeof(float) * count * (width + query));
    if (qkv == NULL) return 1;
    float *attended = qkv + count * width;
    int failed = before_attention(layer, qkv, x, rotary);
    if (!failed) {
        NewTokens tokens = {qkv + query, qkv + query + key, decode->slot_mapping, count, width, width};
        store(pool, &tokens, &heads);
        failed = attend_decode(attended, qkv, pool, decode, &heads) || after_attention(layer, x, x, attended, count);
    }
    free(qkv);
    return failed;
}

// x (count, hidden), in place.
int decode_layers(const Stack *stack, float *x, const Decode *decode, const Rotary *rotary) {
    for (int64_t i = 0; i < stack->count; i++)
        if (decode_layer(stack->layers[i], &stack->pools[i], x, decode, rotary)) return 1;
    return 0;
}

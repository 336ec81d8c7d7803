// A step of single tokens through all layers in one call: what a call costs, and waiting for Python's lock after it,
// is paid once and not for each part of each layer.

#include <stdlib.h>

#include "decode.h"

// One token of each of n sequences.
typedef struct {
    const float *cosine, *sine;  // (n, size)
    const int64_t *places;       // (n), where their keys and values go
    const int64_t *contexts;     // (n, longest), where those of their sequences are, and of themselves
    const int64_t *lengths;      // (n)
    int64_t n, longest;
} Singles;

static int decode_layer(const Layer *layer, float *keys, float *values, float *x, const Singles *s) {
    int64_t query = layer->heads * layer->size, key = layer->kv_heads * layer->size, width = query + 2 * key;
    Shape shape = {layer->kv_heads, layer->heads / layer->kv_heads, layer->size, layer->size, width,
                   layer->window, layer->scale};
    float *qkv = malloc(sizeof(float) * s->n * (width + query));
    if (qkv == NULL) return 1;
    float *attended = qkv + s->n * width;
    int failed = before_attention(layer, qkv, x, s->cosine, s->sine, s->n);
    if (!failed) {
        store(keys, qkv + query, s->places, s->n, key, width);
        store(values, qkv + query + key, s->places, s->n, key, width);
        failed = attend_singles(attended, qkv, keys, values, s->contexts, s->lengths, s->n, s->longest, &shape)
                 || after_attention(layer, x, x, attended, s->n);
    }
    free(qkv);
    return failed;
}

// x (n, hidden), in place, through `count` layers, each with its pool of keys and values (tokens, kv_heads, size).
// Returns 0, or 1 where there is no memory.
int decode(const Layer *const *layers, float *const *keys, float *const *values, int64_t count, float *x,
           const Singles *singles) {
    for (int64_t i = 0; i < count; i++)
        if (decode_layer(layers[i], keys[i], values[i], x, singles)) return 1;
    return 0;
}

// Bytes of the structs that kernels.py mirrors: Shape, Product, Layer, Singles.
void struct_sizes(int64_t *sizes) {
    sizes[0] = sizeof(Shape);
    sizes[1] = sizeof(Product);
    sizes[2] = sizeof(Layer);
    sizes[3] = sizeof(Singles);
}

int is_parallel(void) {
    #ifdef _OPENMP
    return 1;
    #else
    return 0;
    #endif
}

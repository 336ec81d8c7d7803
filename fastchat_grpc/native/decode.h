// What a decoder layer consists of, and the kernels that decode.c puts together.

#pragma once

#include <stdint.h>

// One linear layer in 8 bits.
typedef struct {
    const uint8_t *packed;
    const float *bias;  // (outputs), or NULL
    int64_t outputs, inputs;
} Product;

// A Llama-shaped layer: (n, hidden) in and out, an MLP of `inner`. Products fit these sizes exactly. window 0: none
typedef struct {
    int64_t hidden, inner, heads, kv_heads, size, window;
    float epsilon, scale;
    const float *attention_norm, *mlp_norm;  // (hidden)
    const float *query_norm, *key_norm;      // (size), or NULL
    Product qkv, o, gate_up, down;
} Layer;

// What all of a step's attention has in common. window 0: none
typedef struct {
    int64_t kv_heads, group, size, value_size, query_stride, window;
    float scale;
} Shape;

int before_attention(const Layer *layer, float *qkv, const float *x, const float *cosine, const float *sine, int64_t n);
int after_attention(const Layer *layer, float *out, const float *x, const float *attended, int64_t n);
int attend_singles(float *out, const float *query, const float *keys, const float *values, const int64_t *places,
                   const int64_t *lengths, int64_t n, int64_t longest, const Shape *shape);
void store(float *restrict pool, const float *restrict rows, const int64_t *restrict places, int64_t n, int64_t width,
           int64_t row_stride);

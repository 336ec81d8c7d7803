// What Python calls. kernels.py has the same structs, and compares them with layout.c when it loads the library.
//
// All numbers are float32, matrices row-major. A slot is a token's place in the pools of keys and values, as in
// vLLM's slot mapping. Functions that return int return 0, or 1 where there was no memory.

#pragma once

#include <stdint.h>

// ------------------------------------------------------------------------------- attention

// Of one layer. `group` query heads share a key head.
typedef struct {
    int64_t kv_heads, group, size, value_size;
    int64_t query_stride;  // from one token's query to the next one's
    int64_t window;        // latest tokens that each one attends to, itself included; 0: all
    float scale;
} Heads;

// One layer's keys (slots, kv_heads, size) and values (slots, kv_heads, value_size) of all sequences.
typedef struct {
    float *keys, *values;
} Pool;

// Keys and values of `count` new tokens, on their way into a pool; the strides are from one token to the next.
typedef struct {
    const float *keys, *values;
    const int64_t *slot_mapping;  // (count)
    int64_t count, key_stride, value_stride;
} NewTokens;

// One token of each of `count` sequences.
typedef struct {
    const int64_t *slot_mapping;  // (count), of the tokens
    const int64_t *contexts;      // (count, longest) slots of each one's sequence, its own last; then any slots
    const int64_t *lengths;       // (count), of the contexts
    int64_t count, longest;
} Decode;

// Successive tokens of one sequence, a chunk of its prompt.
typedef struct {
    const int64_t *context;  // (length) slots of the sequence so far, those of the chunk last
    int64_t count, length;
} Chunk;

void store(const Pool *pool, const NewTokens *tokens, const Heads *heads);
int attend_decode(float *out, const float *query, const Pool *pool, const Decode *decode, const Heads *heads);
int attend_chunk(float *out, const float *query, const Pool *pool, const Chunk *chunk, const Heads *heads);

// ------------------------------------------------------------------------------- rows

// What all layers rotate their queries and keys by: (count, size) in Hugging Face's layout, both halves equal.
typedef struct {
    const float *cosine, *sine;
    int64_t count, size;
} Rotary;

// Of one layer's heads, in a row of queries, keys and values. Norms of (size) or NULL.
typedef struct {
    int64_t heads, kv_heads;
    const float *query_norm, *key_norm;
    float epsilon;
} Qkv;

void rms_norm(float *out, const float *x, const float *weight, int64_t count, int64_t size, float epsilon);
void silu_and_multiply(float *out, const float *gate_up, int64_t count, int64_t size);
void norm_and_rotate(float *qkv, const Qkv *shape, const Rotary *rotary);

// ------------------------------------------------------------------------------- 8 bits

// One linear layer in 8 bits. Inputs are a multiple of 64, outputs of 32.
typedef struct {
    const uint8_t *packed;
    const float *bias;  // (outputs), or NULL
    int64_t outputs, inputs;
} Product;

// A Llama-shaped layer: (count, hidden) in and out, an MLP of `inner`. Products fit these sizes exactly.
typedef struct {
    int64_t hidden, inner, size, window;
    float epsilon, scale;
    const float *attention_norm, *mlp_norm;  // (hidden)
    Qkv heads;
    Product qkv, o, gate_up, down;
} Layer;

// All layers of a model, and the pool of each.
typedef struct {
    const Layer *const *layers;
    const Pool *pools;
    int64_t count;
} Stack;

int64_t int8_bytes(int64_t outputs, int64_t inputs);
void pack_int8(uint8_t *packed, const float *weights, int64_t outputs, int64_t inputs);
int multiply_int8(float *out, const float *x, int64_t count, int64_t stride, const Product *product);
int before_attention(const Layer *layer, float *qkv, const float *x, const Rotary *rotary);
int after_attention(const Layer *layer, float *out, const float *x, const float *attended, int64_t count);
int decode_layers(const Stack *stack, float *x, const Decode *decode, const Rotary *rotary);

// ------------------------------------------------------------------------------- the library itself

// A field of a struct, or a struct as a whole (offset 0, named by itself).
typedef struct {
    const char *name;
    int64_t offset, size;
} Field;

int64_t layout(const Field **fields);  // how many there are
int is_parallel(void);                 // whether kernels use several threads
int weight_bits(void);                 // of an 8-bit layer, by what this processor multiplies fast

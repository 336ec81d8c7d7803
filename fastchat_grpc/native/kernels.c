// Small float32 kernels for the CPU, where a model's many little operations cost as much as its products.
// Compiled on first use (kernels.py); everything they do has an equal in torch, used where there is no compiler.
//
// Threads come from the OpenMP pool that torch has already started.

#include "rows.h"

// Tokens that attention takes at a time, and how many tokens before their use keys and values are sent for.
#define TOKENS 4
#define AHEAD 8

typedef float vector __attribute__((vector_size(32), aligned(4), may_alias));

// Sums of neighbours: four of x, then four of y.
INLINE vector add_pairs(vector x, vector y) {
#ifdef __clang__
    return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14) + __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    typedef int32_t places __attribute__((vector_size(32)));
    const places even = {0, 2, 4, 6, 8, 10, 12, 14}, odd = {1, 3, 5, 7, 9, 11, 13, 15};
    return __builtin_shuffle(x, y, even) + __builtin_shuffle(x, y, odd);
#endif
}

// Scores of TOKENS tokens for one query head. As many sums at a time keep the processor busy while each waits for
// its last addition; they are written as vectors since GCC makes scalar code of four sums in a loop.
INLINE void score_tokens(float *restrict scores, const float *restrict query, const float *const *keys, int64_t size,
                         float scale) {
    vector sum[TOKENS] = {{0}};
    int64_t d = 0;
    for (; d + 8 <= size; d += 8)
        for (int i = 0; i < TOKENS; i++) sum[i] += *(const vector *)(query + d) * *(const vector *)(keys[i] + d);
    vector both = add_pairs(add_pairs(sum[0], sum[1]), add_pairs(sum[2], sum[3]));
    both = add_pairs(both, both);
    for (int i = 0; i < TOKENS; i++) scores[i] = both[i];
    for (; d < size; d++)
        for (int i = 0; i < TOKENS; i++) scores[i] += query[d] * keys[i][d];
    for (int i = 0; i < TOKENS; i++) scores[i] *= scale;
}

// out += weights of TOKENS tokens times their values.
INLINE void add_values(float *restrict out, const float *weights, const float *const *values, int64_t size) {
    float w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
    const float *v0 = values[0], *v1 = values[1], *v2 = values[2], *v3 = values[3];
    #pragma omp simd
    for (int64_t d = 0; d < size; d++) out[d] += w0 * v0[d] + w1 * v1[d] + w2 * v2[d] + w3 * v3[d];
}

// Rows of TOKENS successive places; the rows some tokens later are sent for. Past the last token stands the last.
INLINE void rows_of(const float **rows, const float *base, const int64_t *places, int64_t t, int64_t length,
                    int64_t stride, int64_t size) {
    for (int64_t i = 0; i < TOKENS; i++, t++) {
        rows[i] = base + places[t < length ? t : length - 1] * stride;
        const float *later = base + places[t + AHEAD < length ? t + AHEAD : length - 1] * stride;
        for (int64_t d = 0; d < size; d += 64 / sizeof(float)) __builtin_prefetch(later + d);
    }
}

// Attention of `group` query heads that share one key head: one query token over `length` places of the pool.
// scores (group, length + TOKENS)
INLINE void attend_group(float *restrict out, const float *restrict query, const float *restrict keys,
                         const float *restrict values, const int64_t *restrict places, int64_t first, int64_t length,
                         int64_t group, int64_t size, int64_t value_size, int64_t key_stride, int64_t value_stride,
                         float scale, float *restrict scores) {
    const float *rows[TOKENS];
    int64_t width = length + TOKENS;
    for (int64_t t = first; t < length; t += TOKENS) {
        rows_of(rows, keys, places, t, length, key_stride, size);
        for (int64_t g = 0; g < group; g++) score_tokens(scores + g * width + t, query + g * size, rows, size, scale);
    }
    memset(out, 0, sizeof(float) * group * value_size);
    for (int64_t g = 0; g < group; g++) {
        float *restrict s = scores + g * width;
        float top = -INFINITY, total = 0.0f;
        #pragma omp simd reduction(max : top)
        for (int64_t t = first; t < length; t++) top = s[t] > top ? s[t] : top;
        #pragma omp simd reduction(+ : total)
        for (int64_t t = first; t < length; t++) {
            s[t] = exp_negative(s[t] - top);
            total += s[t];
        }
        float inverse = 1.0f / total;
        #pragma omp simd
        for (int64_t t = first; t < length; t++) s[t] *= inverse;
        for (int64_t t = length; t < width; t++) s[t] = 0.0f;
    }
    for (int64_t t = first; t < length; t += TOKENS) {
        rows_of(rows, values, places, t, length, value_stride, value_size);
        for (int64_t g = 0; g < group; g++) add_values(out + g * value_size, scores + g * width + t, rows, value_size);
    }
}

// One query token per sequence over contexts in the pool.
//   out (n, kv_heads * group, value_size); query (n, kv_heads * group, size) with rows of query_stride
//   keys (tokens, kv_heads, size); values (tokens, kv_heads, value_size)
//   places (n, longest); lengths (n); window 0: none
// Returns 0, or 1 where there is no memory.
int attend_singles(float *out, const float *query, const float *keys, const float *values, const int64_t *places,
                   const int64_t *lengths, int64_t n, int64_t longest, int64_t kv_heads, int64_t group, int64_t size,
                   int64_t value_size, int64_t query_stride, int64_t window, float scale) {
    int64_t work = n * longest * kv_heads * group * size;
    int64_t chunk = n > 1 ? kv_heads : 1;  // one thread for a sequence, whose heads' keys are neighbours in memory
    int failed = 0;
    #pragma omp parallel if (work > PARALLEL_FROM)
    {
        float *scores = malloc(sizeof(float) * group * (longest + TOKENS));
        #pragma omp for collapse(2) schedule(dynamic, chunk)
        for (int64_t i = 0; i < n; i++) {
            for (int64_t h = 0; h < kv_heads; h++) {
                if (scores == NULL) {
                    failed = 1;
                    continue;
                }
                int64_t length = lengths[i];
                int64_t first = window > 0 && length > window ? length - window : 0;
                float *o = out + (i * kv_heads + h) * group * value_size;
                const float *q = query + i * query_stride + h * group * size;
                const float *k = keys + h * size, *v = values + h * value_size;
                const int64_t *p = places + i * longest;
                if (size == 64 && value_size == 64)
                    attend_group(o, q, k, v, p, first, length, group, 64, 64, kv_heads * 64, kv_heads * 64, scale, scores);
                else if (size == 128 && value_size == 128)
                    attend_group(o, q, k, v, p, first, length, group, 128, 128, kv_heads * 128, kv_heads * 128, scale, scores);
                else
                    attend_group(o, q, k, v, p, first, length, group, size, value_size, kv_heads * size,
                                 kv_heads * value_size, scale, scores);
            }
        }
        free(scores);
    }
    return failed;
}

// Rows of keys and values to their places in the pool; `width` floats each.
void store(float *restrict pool, const float *restrict rows, const int64_t *restrict places, int64_t n, int64_t width,
           int64_t row_stride) {
    for (int64_t i = 0; i < n; i++) memcpy(pool + places[i] * width, rows + i * row_stride, sizeof(float) * width);
}

// out = x / sqrt(mean(x^2) + epsilon) * (offset + weight), row by row.
void rms_norm(float *out, const float *x, const float *weight, int64_t n, int64_t size, float epsilon, float offset) {
    #pragma omp parallel for if (n * size > PARALLEL_FROM)
    for (int64_t i = 0; i < n; i++) norm_row(out + i * size, x + i * size, weight, size, epsilon, offset);
}

// out = silu(gate) * up, row by row; gate and up may be halves of one matrix.
void silu_and_multiply(float *out, const float *gate, const float *up, int64_t n, int64_t size, int64_t gate_stride,
                       int64_t up_stride) {
    #pragma omp parallel for if (n * size > PARALLEL_FROM / 8)
    for (int64_t i = 0; i < n; i++) silu_row(out + i * size, gate + i * gate_stride, up + i * up_stride, size);
}

// Rotary embedding, in place: x (n, heads, size) with rows of row_stride; cosine and sine (n, size).
void rotate(float *x, const float *cosine, const float *sine, int64_t n, int64_t heads, int64_t size,
            int64_t row_stride) {
    #pragma omp parallel for if (n * heads * size > PARALLEL_FROM)
    for (int64_t i = 0; i < n; i++) rotate_row(x + i * row_stride, cosine + i * size, sine + i * size, heads, size);
}

// Attention over keys and values that stand in a pool, wherever its slots are.
//
// Has an equal in torch (engine/attention.py), used where there is no compiler. Threads come from the OpenMP pool that
// torch has already started.

#include "rows.h"

// Tokens that attention takes at a time, and how many tokens before their use keys and values are sent for.
#define TOKENS 4
#define AHEAD 8
// Query tokens of a prompt that share what is read of each.
#define ROWS 4

typedef float vector __attribute__((vector_size(32), aligned(4), may_alias));

// Sums of neighbours: four of x, then four of y.
INLINE vector add_pairs(vector x, vector y) {
#ifdef __clang__
    return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14) + __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    typedef int32_t indices __attribute__((vector_size(32)));
    const indices even = {0, 2, 4, 6, 8, 10, 12, 14}, odd = {1, 3, 5, 7, 9, 11, 13, 15};
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

// Rows of TOKENS successive slots of a context; the rows some tokens later are sent for. Past the last token stands the last.
INLINE void rows_of(const float **rows, const float *base, const int64_t *slots, int64_t t, int64_t length,
                    int64_t stride, int64_t size) {
    for (int64_t i = 0; i < TOKENS; i++, t++) {
        rows[i] = base + slots[t < length ? t : length - 1] * stride;
        const float *later = base + slots[t + AHEAD < length ? t + AHEAD : length - 1] * stride;
        for (int64_t d = 0; d < size; d += 64 / sizeof(float)) __builtin_prefetch(later + d);
    }
}

// A sequence's last `count` tokens ask; each sees its own slot and those before it in the context.
typedef struct {
    float *out;          // (count, kv_heads * group, value_size)
    const float *query;  // (count, kv_heads * group, size) with rows of query_stride
    const Pool *pool;
    const int64_t *context;  // (length)
    int64_t count, length;
} Queries;

INLINE int64_t first_seen(const Heads *heads, int64_t length) {
    return heads->window > 0 && length > heads->window ? length - heads->window : 0;
}

// Key head h and the query heads that share it, for `rows` tokens from `begin`. Both sizes are those of the heads.
// scores (rows, group, length + TOKENS)
INLINE void attend(const Heads *heads, const Queries *q, int64_t h, int64_t begin, int64_t rows, int64_t size,
                   int64_t value_size, float *restrict scores) {
    int64_t group = heads->group, key_stride = heads->kv_heads * size, value_stride = heads->kv_heads * value_size;
    int64_t query_stride = heads->query_stride, out_stride = group * value_stride;
    float *out = q->out + begin * out_stride + h * group * value_size;
    const float *query = q->query + begin * query_stride + h * group * size;
    int64_t seen = q->length - q->count + begin + 1;  // by the first row; each later one sees one more
    int64_t longest = seen + rows - 1, width = longest + TOKENS, first = first_seen(heads, seen);
    const float *tokens[TOKENS];
    for (int64_t t = first; t < longest; t += TOKENS) {
        rows_of(tokens, q->pool->keys + h * size, q->context, t, longest, key_stride, size);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t g = 0; g < group; g++)
                score_tokens(scores + (r * group + g) * width + t, query + r * query_stride + g * size, tokens, size,
                             heads->scale);
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t length = seen + r, from = first_seen(heads, length);
        memset(out + r * out_stride, 0, sizeof(float) * group * value_size);
        for (int64_t g = 0; g < group; g++) {
            float *restrict s = scores + (r * group + g) * width;
            float top = -INFINITY, total = 0.0f;
            #pragma omp simd reduction(max : top)
            for (int64_t t = from; t < length; t++) top = s[t] > top ? s[t] : top;
            #pragma omp simd reduction(+ : total)
            for (int64_t t = from; t < length; t++) {
                s[t] = exp_negative(s[t] - top);
                total += s[t];
            }
            float inverse = 1.0f / total;
            #pragma omp simd
            for (int64_t t = from; t < length; t++) s[t] *= inverse;
            for (int64_t t = first; t < from; t++) s[t] = 0.0f;
            for (int64_t t = length; t < width; t++) s[t] = 0.0f;
        }
    }
    for (int64_t t = first; t < longest; t += TOKENS) {
        rows_of(tokens, q->pool->values + h * value_size, q->context, t, longest, value_stride, value_size);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t g = 0; g < group; g++)
                add_values(out + r * out_stride + g * value_size, scores + (r * group + g) * width + t, tokens,
                           value_size);
    }
}

// The same, with the usual sizes as constants, which compilers unroll.
INLINE void attend_head(const Heads *heads, const Queries *q, int64_t h, int64_t begin, int64_t rows, float *scores) {
    int64_t size = heads->size, value_size = heads->value_size;
    if (size == 64 && value_size == 64) attend(heads, q, h, begin, rows, 64, 64, scores);
    else if (size == 128 && value_size == 128) attend(heads, q, h, begin, rows, 128, 128, scores);
    else attend(heads, q, h, begin, rows, size, value_size, scores);
}

// One query token per sequence: out and query (count, ...).
int attend_decode(float *out, const float *query, const Pool *pool, const Decode *decode, const Heads *heads) {
    int64_t n = decode->count, longest = decode->longest, all = heads->kv_heads * heads->group;
    int64_t work = n * longest * all * heads->size;
    int64_t chunk = n > 1 ? heads->kv_heads : 1;  // one thread for a sequence, whose heads' keys are neighbours in memory
    int failed = 0;
    #pragma omp parallel if (work > PARALLEL_FROM)
    {
        float *scores = malloc(sizeof(float) * heads->group * (longest + TOKENS));
        #pragma omp for collapse(2) schedule(dynamic, chunk)
        for (int64_t i = 0; i < n; i++) {
            for (int64_t h = 0; h < heads->kv_heads; h++) {
                Queries one = {out + i * all * heads->value_size, query + i * heads->query_stride, pool,
                               decode->contexts + i * longest, 1, decode->lengths[i]};
                if (scores == NULL) failed = 1;
                else attend_head(heads, &one, h, 0, 1, scores);
            }
        }
        free(scores);
    }
    return failed;
}

// Successive query tokens of one sequence: out and query (count, ...).
int attend_chunk(float *out, const float *query, const Pool *pool, const Chunk *chunk, const Heads *heads) {
    Queries all = {out, query, pool, chunk->context, chunk->count, chunk->length};
    int64_t n = chunk->count, work = n * chunk->length * heads->kv_heads * heads->group * heads->size;
    int failed = 0;
    #pragma omp parallel if (work > PARALLEL_FROM)
    {
        float *scores = malloc(sizeof(float) * ROWS * heads->group * (chunk->length + TOKENS));
        // Backwards, as the last see most.
        #pragma omp for collapse(2) schedule(dynamic)
        for (int64_t tile = (n - 1) / ROWS; tile >= 0; tile--) {
            for (int64_t h = 0; h < heads->kv_heads; h++) {
                int64_t begin = tile * ROWS, rows = n - begin < ROWS ? n - begin : ROWS;
                if (scores == NULL) failed = 1;
                else attend_head(heads, &all, h, begin, rows, scores);
            }
        }
        free(scores);
    }
    return failed;
}

// Keys and values of new tokens to their slots.
void store(const Pool *pool, const NewTokens *tokens, const Heads *heads) {
    int64_t key = heads->kv_heads * heads->size, value = heads->kv_heads * heads->value_size;
    for (int64_t i = 0; i < tokens->count; i++) {
        int64_t slot = tokens->slot_mapping[i];
        memcpy(pool->keys + slot * key, tokens->keys + i * tokens->key_stride, sizeof(float) * key);
        memcpy(pool->values + slot * value, tokens->values + i * tokens->value_stride, sizeof(float) * value);
    }
}

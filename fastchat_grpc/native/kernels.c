// Small float32 kernels for the CPU, where a model's many little operations cost as much as its products.
// Compiled on first use (kernels.py); everything they do has an equal in torch, used where there is no compiler.
//
// Threads come from the OpenMP pool that torch has already started.

#include "decode.h"
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

// A sequence's last n tokens ask; each sees its own place in the pool and those before it, of `total`.
typedef struct {
    float *out;           // (n, kv_heads * group, value_size)
    const float *query;   // (n, kv_heads * group, size) with rows of query_stride
    const float *keys;    // (tokens, kv_heads, size), the pool
    const float *values;  // (tokens, kv_heads, value_size)
    const int64_t *places;
    int64_t n, total;
} Piece;

INLINE int64_t first_seen(const Shape *shape, int64_t length) {
    return shape->window > 0 && length > shape->window ? length - shape->window : 0;
}

// Key head h and the query heads that share it, for `rows` tokens of a piece from `begin`. Both sizes are the shape's.
// scores (rows, group, total + TOKENS)
INLINE void attend(const Shape *shape, const Piece *p, int64_t h, int64_t begin, int64_t rows, int64_t size,
                   int64_t value_size, float *restrict scores) {
    int64_t group = shape->group, key_stride = shape->kv_heads * size, value_stride = shape->kv_heads * value_size;
    int64_t query_stride = shape->query_stride, out_stride = group * value_stride;
    float *out = p->out + begin * out_stride + h * group * value_size;
    const float *query = p->query + begin * query_stride + h * group * size;
    int64_t seen = p->total - p->n + begin + 1;  // by the first row; each later one sees one more
    int64_t longest = seen + rows - 1, width = longest + TOKENS, first = first_seen(shape, seen);
    const float *tokens[TOKENS];
    for (int64_t t = first; t < longest; t += TOKENS) {
        rows_of(tokens, p->keys + h * size, p->places, t, longest, key_stride, size);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t g = 0; g < group; g++)
                score_tokens(scores + (r * group + g) * width + t, query + r * query_stride + g * size, tokens, size,
                             shape->scale);
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t length = seen + r, from = first_seen(shape, length);
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
        rows_of(tokens, p->values + h * value_size, p->places, t, longest, value_stride, value_size);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t g = 0; g < group; g++)
                add_values(out + r * out_stride + g * value_size, scores + (r * group + g) * width + t, tokens,
                           value_size);
    }
}

// The same, with the usual sizes as constants, which compilers unroll.
INLINE void attend_head(const Shape *shape, const Piece *p, int64_t h, int64_t begin, int64_t rows, float *scores) {
    int64_t size = shape->size, value_size = shape->value_size;
    if (size == 64 && value_size == 64) attend(shape, p, h, begin, rows, 64, 64, scores);
    else if (size == 128 && value_size == 128) attend(shape, p, h, begin, rows, 128, 128, scores);
    else attend(shape, p, h, begin, rows, size, value_size, scores);
}

// One query token per sequence: out, query (n, ...), places (n, longest), lengths (n).
// Returns 0, or 1 where there is no memory.
int attend_singles(float *out, const float *query, const float *keys, const float *values, const int64_t *places,
                   const int64_t *lengths, int64_t n, int64_t longest, const Shape *shape) {
    int64_t heads = shape->kv_heads * shape->group, work = n * longest * heads * shape->size;
    int64_t chunk = n > 1 ? shape->kv_heads : 1;  // one thread for a sequence, whose heads' keys are neighbours in memory
    int failed = 0;
    #pragma omp parallel if (work > PARALLEL_FROM)
    {
        float *scores = malloc(sizeof(float) * shape->group * (longest + TOKENS));
        #pragma omp for collapse(2) schedule(dynamic, chunk)
        for (int64_t i = 0; i < n; i++) {
            for (int64_t h = 0; h < shape->kv_heads; h++) {
                Piece piece = {out + i * heads * shape->value_size, query + i * shape->query_stride, keys, values,
                               places + i * longest, 1, lengths[i]};
                if (scores == NULL) failed = 1;
                else attend_head(shape, &piece, h, 0, 1, scores);
            }
        }
        free(scores);
    }
    return failed;
}

// Successive query tokens of one sequence, the last of its `total` places: out, query (n, ...), places (total).
// Returns 0, or 1 where there is no memory.
int attend_piece(float *out, const float *query, const float *keys, const float *values, const int64_t *places,
                 int64_t n, int64_t total, const Shape *shape) {
    Piece piece = {out, query, keys, values, places, n, total};
    int64_t work = n * total * shape->kv_heads * shape->group * shape->size;
    int failed = 0;
    #pragma omp parallel if (work > PARALLEL_FROM)
    {
        float *scores = malloc(sizeof(float) * ROWS * shape->group * (total + TOKENS));
        // Backwards, as the last see most.
        #pragma omp for collapse(2) schedule(dynamic)
        for (int64_t tile = (n - 1) / ROWS; tile >= 0; tile--) {
            for (int64_t h = 0; h < shape->kv_heads; h++) {
                int64_t begin = tile * ROWS, rows = n - begin < ROWS ? n - begin : ROWS;
                if (scores == NULL) failed = 1;
                else attend_head(shape, &piece, h, begin, rows, scores);
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

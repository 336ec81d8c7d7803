// 8-bit linear layers for the CPU, and decoder layers made of them.
//
// Weights and inputs are int8 in groups of 64 along the inputs, each group with a float32 scale of its own
// (the scheme of llama.cpp's Q8_0, with larger groups). Sums within a group are exact integers, and groups add
// up in one order, so a row's result does not depend on which rows stand beside it.
//
// Weights stand as the instructions read them: panels of 16 outputs, in each its groups, in each of those DEPTH
// inputs of all 16 outputs, then the next DEPTH. They are stored plus 128, as vpdpbusd multiplies unsigned by
// signed; sums start at -128 times the sum of the inputs instead. AVX2 has no such instruction that is exact: there
// weights are widened in registers, and vpmaddwd multiplies them by inputs that are kept in 16 bits.

#include <omp.h>

#include "rows.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define VNNI 1
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define AVX2 1
#endif

#define GROUP 64
#define LANES 16
#define TILE_ROWS 6

#ifdef AVX2
#define DEPTH 2
typedef int16_t level;
#else
#define DEPTH 4
typedef int8_t level;
#endif

int64_t int8_depth(void) { return DEPTH; }

// One row to levels of -127 to 127: q (groups * 64), scales (groups), and -128 times each group's sum.
INLINE void quantize_row(level *restrict q, float *restrict scales, int32_t *restrict offsets,
                         const float *restrict x, int64_t groups) {
    for (int64_t g = 0; g < groups; g++, x += GROUP, q += GROUP) {
        float top = 0.0f;
        #pragma omp simd reduction(max : top)
        for (int i = 0; i < GROUP; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
        float inverse = top > 0.0f ? 127.0f / top : 0.0f;
        int32_t sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int i = 0; i < GROUP; i++) {
            int32_t rounded = (int32_t)rintf(x[i] * inverse);
            q[i] = (level)rounded;
            sum += rounded;
        }
        scales[g] = top / 127.0f;
        offsets[g] = -128 * sum;
    }
}

#ifdef AVX2
// sum += x. Written so that compilers keep every sum in a register: from the intrinsic GCC makes two values of
// each, for which there are not enough.
INLINE void add_in_place(__m256i *sum, __m256i x) { __asm__ volatile("vpaddd %1, %0, %0" : "+x"(*sum) : "x"(x)); }

// `rows` (a constant where it is inlined) rows times one panel: twelve sums, two weights, an input and a product
// are what the sixteen registers hold. Meanwhile the panel at `next` is sent for.
INLINE void multiply_panel(int rows, float *restrict out, int64_t out_stride, const level *restrict q,
                           const float *restrict scales, const int32_t *restrict offsets,
                           const uint8_t *restrict weights, const float *restrict weight_scales, int64_t groups,
                           const uint8_t *next) {
    __m256 total[TILE_ROWS][2];
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g++, weight_scales += LANES) {
        __m256i sum[TILE_ROWS][2];
        for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm256_set1_epi32(offsets[r * groups + g]);
        for (int line = 0; line < GROUP; line += 2 * DEPTH, weights += 2 * DEPTH * LANES, next += 2 * DEPTH * LANES) {
            __builtin_prefetch(next, 0, 2);
            for (int k = line; k < line + 2 * DEPTH; k += DEPTH) {
                const __m128i *w = (const __m128i *)(weights + (k - line) * LANES);
                __m256i left = _mm256_cvtepu8_epi16(_mm_loadu_si128(w));
                __m256i right = _mm256_cvtepu8_epi16(_mm_loadu_si128(w + 1));
                for (int r = 0; r < rows; r++) {
                    int32_t two;
                    memcpy(&two, q + (r * groups + g) * GROUP + k, 4);
                    __m256i x = _mm256_set1_epi32(two);
                    add_in_place(&sum[r][0], _mm256_madd_epi16(left, x));
                    add_in_place(&sum[r][1], _mm256_madd_epi16(right, x));
                }
            }
        }
        __m256 left = _mm256_loadu_ps(weight_scales), right = _mm256_loadu_ps(weight_scales + 8);
        for (int r = 0; r < rows; r++) {
            __m256 scale = _mm256_set1_ps(scales[r * groups + g]);
            total[r][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][0]), _mm256_mul_ps(scale, left), total[r][0]);
            total[r][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][1]), _mm256_mul_ps(scale, right), total[r][1]);
        }
    }
    for (int r = 0; r < rows; r++) {
        _mm256_storeu_ps(out + r * out_stride, total[r][0]);
        _mm256_storeu_ps(out + r * out_stride + 8, total[r][1]);
    }
}
#endif

// `rows` (a constant where it is inlined) rows times two panels. `next` are those that will probably follow.
INLINE void multiply_tile(int rows, float *restrict out, int64_t out_stride, const level *restrict q,
                          const float *restrict scales, const int32_t *restrict offsets,
                          const uint8_t *restrict weights, const float *restrict weight_scales, int64_t groups,
                          const uint8_t *next) {
    int64_t panel = groups * GROUP * LANES;
    (void)next;
#ifdef VNNI
    __m512 total[TILE_ROWS][2];
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *w = weights + g * GROUP * LANES;
        __m512i sum[TILE_ROWS][2];
        for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_set1_epi32(offsets[r * groups + g]);
        #pragma GCC unroll 4
        for (int k = 0; k < GROUP; k += DEPTH) {
            __m512i left = _mm512_loadu_si512(w + k * LANES), right = _mm512_loadu_si512(w + panel + k * LANES);
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, q + (r * groups + g) * GROUP + k, 4);
                __m512i x = _mm512_set1_epi32(four);
                sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], left, x);
                sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], right, x);
            }
        }
        __m512 left = _mm512_loadu_ps(weight_scales + g * LANES);
        __m512 right = _mm512_loadu_ps(weight_scales + (groups + g) * LANES);
        for (int r = 0; r < rows; r++) {
            __m512 scale = _mm512_set1_ps(scales[r * groups + g]);
            total[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][0]), _mm512_mul_ps(scale, left), total[r][0]);
            total[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][1]), _mm512_mul_ps(scale, right), total[r][1]);
        }
    }
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(out + r * out_stride, total[r][0]);
        _mm512_storeu_ps(out + r * out_stride + LANES, total[r][1]);
    }
#elif defined(AVX2)
    multiply_panel(rows, out, out_stride, q, scales, offsets, weights, weight_scales, groups, next);
    multiply_panel(rows, out + LANES, out_stride, q, scales, offsets, weights + panel, weight_scales + groups * LANES,
                   groups, next + panel);
#else
    for (int r = 0; r < rows; r++) {
        for (int half = 0; half < 2; half++) {
            float total[LANES] = {0};
            for (int64_t g = 0; g < groups; g++) {
                const uint8_t *w = weights + half * panel + g * GROUP * LANES;
                const level *x = q + (r * groups + g) * GROUP;
                int32_t sum[LANES];
                for (int o = 0; o < LANES; o++) sum[o] = offsets[r * groups + g];
                for (int k = 0; k < GROUP; k += DEPTH, w += DEPTH * LANES) {
                    #pragma omp simd
                    for (int o = 0; o < LANES; o++) {
                        sum[o] += w[4 * o] * x[k] + w[4 * o + 1] * x[k + 1] + w[4 * o + 2] * x[k + 2] +
                                  w[4 * o + 3] * x[k + 3];
                    }
                }
                const float *s = weight_scales + (half * groups + g) * LANES;
                #pragma omp simd
                for (int o = 0; o < LANES; o++) total[o] += (float)sum[o] * (scales[r * groups + g] * s[o]);
            }
            memcpy(out + r * out_stride + half * LANES, total, sizeof total);
        }
    }
#endif
}

// Rows of a product's input in 8 bits. One malloc for all; `q` is NULL where there was no memory.
typedef struct {
    level *q;          // (n, width)
    float *scales;     // (n, groups)
    int32_t *offsets;  // (n, groups)
    int64_t n;
} Rows;

static Rows allocate_rows(int64_t n, int64_t width) {
    int64_t groups = width / GROUP;
    level *q = malloc(n * (width * sizeof(level) + groups * (sizeof(float) + sizeof(int32_t))));
    return (Rows){q, (float *)(q + n * width), (int32_t *)((float *)(q + n * width) + n * groups), n};
}

INLINE void quantize(const Rows *rows, int64_t i, const float *x, int64_t groups) {
    quantize_row(rows->q + i * groups * GROUP, rows->scales + i * groups, rows->offsets + i * groups, x, groups);
}

// One linear layer. Its inputs are 64 * groups, its outputs 16 * panels; panels is even.
typedef struct {
    const uint8_t *weights;  // (panels, groups, 64 / DEPTH, 16, DEPTH)
    const float *scales;     // (panels, groups, 16)
    const float *bias;       // (outputs), or NULL
    int64_t groups, panels;
} Product;

// out (n, outputs) = rows times weights, without bias. To be called by all threads of a team.
INLINE void multiply(const Rows *rows, const Product *p, float *restrict out) {
    int64_t n = rows->n, groups = p->groups, width = groups * GROUP, outputs = p->panels * LANES;
    int64_t blocks = (n + TILE_ROWS - 1) / TILE_ROWS, team = omp_get_num_threads();
    // Dynamic, as cores are seldom equally fast: other programs, and other virtual machines, use them too.
    #pragma omp for schedule(dynamic)
    for (int64_t panel = 0; panel < p->panels; panel += 2) {
        const uint8_t *w = p->weights + panel * width * LANES;
        const float *s = p->scales + panel * groups * LANES;
        const uint8_t *next = panel + 2 * team < p->panels ? w + 2 * team * width * LANES : w;
        for (int64_t block = 0; block < blocks; block++) {
            int64_t i = n * block / blocks;
            float *o = out + i * outputs + panel * LANES;
            const level *q = rows->q + i * width;
            const float *scales = rows->scales + i * groups;
            const int32_t *offsets = rows->offsets + i * groups;
            switch (n * (block + 1) / blocks - i) {
                #define CASE(count) \
                    case count: \
                        multiply_tile(count, o, outputs, q, scales, offsets, w, s, groups, next); \
                        break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
                #undef CASE
            }
        }
    }
}

// out (n, outputs) = x (n, inputs; rows of x_stride) times weights. Returns 0, or 1 where there is no memory.
int multiply_int8(float *out, const float *x, const uint8_t *weights, const float *weight_scales, int64_t n,
                  int64_t groups, int64_t panels, int64_t x_stride) {
    Product product = {weights, weight_scales, NULL, groups, panels};
    Rows rows = allocate_rows(n, groups * GROUP);
    if (rows.q == NULL) return 1;
    #pragma omp parallel if (n * groups * GROUP * panels * LANES > PARALLEL_FROM)
    {
        #pragma omp for
        for (int64_t i = 0; i < n; i++) quantize(&rows, i, x + i * x_stride, groups);
        multiply(&rows, &product, out);
    }
    free(rows.q);
    return 0;
}

// ------------------------------------------------------------------------------- a decoder layer around attention
//
// At a few rows per step, calls and the waking of threads cost as much as products. So what stands before attention
// is one call with one team of threads, and so is what stands behind it.

// A Llama-shaped layer: (n, hidden) in and out, an MLP of `inner`. Products fit these sizes exactly.
typedef struct {
    int64_t hidden, inner, heads, kv_heads, size;
    float epsilon;
    const float *attention_norm, *mlp_norm;  // (hidden)
    const float *query_norm, *key_norm;      // (size), or NULL
    Product qkv, o, gate_up, down;
} Layer;

INLINE void add_bias(float *restrict row, const Product *p) {
    if (p->bias == NULL) return;
    #pragma omp simd
    for (int64_t d = 0; d < p->panels * LANES; d++) row[d] += p->bias[d];
}

INLINE void add_row(float *out, const float *x, const float *restrict y, int64_t size) {
    #pragma omp simd
    for (int64_t d = 0; d < size; d++) out[d] = x[d] + y[d];
}

// qkv (n, (heads + 2 * kv_heads) * size): queries and keys are normalised where the layer does so, and rotated.
// x (n, hidden); cosine and sine (n, size). Returns 0, or 1 where there is no memory.
int before_attention(const Layer *layer, float *qkv, const float *x, const float *cosine, const float *sine, int64_t n) {
    int64_t hidden = layer->hidden, size = layer->size, heads = layer->heads, turned = heads + layer->kv_heads;
    int64_t width = (turned + layer->kv_heads) * size;
    Rows rows = allocate_rows(n, hidden);
    float *normed = malloc(sizeof(float) * n * hidden);
    int failed = rows.q == NULL || normed == NULL;
    if (!failed) {
        #pragma omp parallel if (n * hidden * width > PARALLEL_FROM)
        {
            #pragma omp for
            for (int64_t i = 0; i < n; i++) {
                float *row = normed + i * hidden;
                norm_row(row, x + i * hidden, layer->attention_norm, hidden, layer->epsilon, 0.0f);
                quantize(&rows, i, row, layer->qkv.groups);
            }
            multiply(&rows, &layer->qkv, qkv);
            #pragma omp for
            for (int64_t i = 0; i < n; i++) {
                float *row = qkv + i * width;
                add_bias(row, &layer->qkv);
                for (int64_t h = 0; h < turned; h++) {
                    const float *weight = h < heads ? layer->query_norm : layer->key_norm;
                    if (weight != NULL) norm_row(row + h * size, row + h * size, weight, size, layer->epsilon, 0.0f);
                }
                rotate_row(row, cosine + i * size, sine + i * size, turned, size);
            }
        }
    }
    free(normed);
    free(rows.q);
    return failed;
}

// out (n, hidden) = what the layer makes of its input x (n, hidden) and of attention's output (n, heads * size).
// Returns 0, or 1 where there is no memory.
int after_attention(const Layer *layer, float *out, const float *x, const float *attended, int64_t n) {
    int64_t hidden = layer->hidden, inner = layer->inner, attention = layer->heads * layer->size;
    int64_t widest = attention > hidden ? attention : hidden;
    Rows rows = allocate_rows(n, widest > inner ? widest : inner);
    float *product = malloc(sizeof(float) * n * (hidden + 2 * inner));
    float *both = product + n * hidden;
    int failed = rows.q == NULL || product == NULL;
    if (!failed) {
        #pragma omp parallel if (n * hidden * inner > PARALLEL_FROM)
        {
            #pragma omp for
            for (int64_t i = 0; i < n; i++) quantize(&rows, i, attended + i * attention, layer->o.groups);
            multiply(&rows, &layer->o, product);
            #pragma omp for
            for (int64_t i = 0; i < n; i++) {
                float *row = product + i * hidden;
                add_bias(row, &layer->o);
                add_row(out + i * hidden, x + i * hidden, row, hidden);
                norm_row(row, out + i * hidden, layer->mlp_norm, hidden, layer->epsilon, 0.0f);
                quantize(&rows, i, row, layer->gate_up.groups);
            }
            multiply(&rows, &layer->gate_up, both);
            #pragma omp for
            for (int64_t i = 0; i < n; i++) {
                float *row = both + i * 2 * inner;
                add_bias(row, &layer->gate_up);
                silu_row(row, row, row + inner, inner);
                quantize(&rows, i, row, layer->down.groups);
            }
            multiply(&rows, &layer->down, product);
            #pragma omp for
            for (int64_t i = 0; i < n; i++) {
                float *row = product + i * hidden;
                add_bias(row, &layer->down);
                add_row(out + i * hidden, out + i * hidden, row, hidden);
            }
        }
    }
    free(product);
    free(rows.q);
    return failed;
}

// Small float32 kernels for the CPU, where a model's many little operations cost as much as its products.
// Compiled on first use (native.py); everything they do has an equal in torch, used where there is no compiler.
//
// Threads come from the OpenMP pool that torch has already started.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define VNNI 1
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define AVX2 1
#endif

#define INLINE static inline __attribute__((always_inline))

// Floating point operations that are worth waking a second thread for.
#define PARALLEL_FROM 60000

// exp(x) for x <= 0, to about 2 ulp; written so that compilers vectorise it (Cephes' expf).
INLINE float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = floorf(x * 1.44269504088896341f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } power = { ((int32_t)n + 127) << 23 };
    return p * power.f;
}

// Attention of `group` query heads that share one key head: one query token over `length` places of the pool.
INLINE void attend_group(float *restrict out, const float *restrict query, const float *restrict keys,
                         const float *restrict values, const int64_t *restrict places, int64_t first, int64_t length,
                         int64_t group, int64_t size, int64_t value_size, int64_t key_stride, int64_t value_stride,
                         float scale, float *restrict scores) {
    for (int64_t t = first; t < length; t++) {
        const float *restrict key = keys + places[t] * key_stride;
        for (int64_t g = 0; g < group; g++) {
            const float *restrict q = query + g * size;
            float sum = 0.0f;
            #pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < size; d++) sum += q[d] * key[d];
            scores[g * length + t] = sum * scale;
        }
    }
    memset(out, 0, sizeof(float) * group * value_size);
    for (int64_t g = 0; g < group; g++) {
        float *restrict s = scores + g * length;
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
    }
    for (int64_t t = first; t < length; t++) {
        const float *restrict value = values + places[t] * value_stride;
        for (int64_t g = 0; g < group; g++) {
            float weight = scores[g * length + t];
            float *restrict o = out + g * value_size;
            #pragma omp simd
            for (int64_t d = 0; d < value_size; d++) o[d] += weight * value[d];
        }
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
    int failed = 0;
    #pragma omp parallel if (work > PARALLEL_FROM)
    {
        float *scores = malloc(sizeof(float) * group * longest);
        #pragma omp for collapse(2) schedule(dynamic)
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
void rms_norm(float *restrict out, const float *restrict x, const float *restrict weight, int64_t n, int64_t size,
              float epsilon, float offset) {
    #pragma omp parallel for if (n * size > PARALLEL_FROM)
    for (int64_t i = 0; i < n; i++) {
        const float *restrict row = x + i * size;
        float *restrict o = out + i * size;
        float sum = 0.0f;
        #pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < size; d++) sum += row[d] * row[d];
        float factor = 1.0f / sqrtf(sum / (float)size + epsilon);
        #pragma omp simd
        for (int64_t d = 0; d < size; d++) o[d] = row[d] * factor * (offset + weight[d]);
    }
}

// out = silu(gate) * up, row by row; gate and up may be halves of one matrix.
void silu_and_multiply(float *restrict out, const float *restrict gate, const float *restrict up, int64_t n,
                       int64_t size, int64_t gate_stride, int64_t up_stride) {
    #pragma omp parallel for if (n * size > PARALLEL_FROM / 8)
    for (int64_t i = 0; i < n; i++) {
        const float *restrict g = gate + i * gate_stride;
        const float *restrict u = up + i * up_stride;
        float *restrict o = out + i * size;
        #pragma omp simd
        for (int64_t d = 0; d < size; d++) {
            // silu(x) = x / (1 + exp(-x)); exp only of what is negative, which cannot overflow.
            float e = exp_negative(-fabsf(g[d]));
            float sigmoid = (g[d] >= 0.0f ? 1.0f : e) / (1.0f + e);
            o[d] = g[d] * sigmoid * u[d];
        }
    }
}

// Rotary embedding, in place: x (n, heads, size) with rows of row_stride; cosine and sine (n, size), of which the
// first half of each row is used (Hugging Face's layout: both halves are equal).
void rotate(float *restrict x, const float *restrict cosine, const float *restrict sine, int64_t n, int64_t heads,
            int64_t size, int64_t row_stride) {
    int64_t half = size / 2;
    #pragma omp parallel for if (n * heads * size > PARALLEL_FROM)
    for (int64_t i = 0; i < n; i++) {
        const float *restrict c = cosine + i * size;
        const float *restrict s = sine + i * size;
        for (int64_t h = 0; h < heads; h++) {
            float *restrict a = x + i * row_stride + h * size;
            float *restrict b = a + half;
            #pragma omp simd
            for (int64_t d = 0; d < half; d++) {
                float left = a[d], right = b[d];
                a[d] = left * c[d] - right * s[d];
                b[d] = right * c[d] + left * s[d];
            }
        }
    }
}

// ------------------------------------------------------------------------------- 8-bit products
//
// Weights and inputs are int8 in groups of 64 along the inputs, each group with a float32 scale of its own
// (the scheme of llama.cpp's Q8_0, with larger groups). Sums within a group are exact integers, and groups add
// up in one order, so a row's result does not depend on which rows stand beside it.
//
// Weights stand as the instructions read them: panels of 16 outputs, in each its groups, in each of those DEPTH
// inputs of all 16 outputs, then the next DEPTH. They are stored plus 128, as vpdpbusd multiplies unsigned by
// signed; sums start at -128 times the sum of the inputs instead. AVX2 has no such instruction that is exact: there
// weights are widened in registers, and vpmaddwd multiplies them by inputs that are kept in 16 bits.

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
// are what the sixteen registers hold.
INLINE void multiply_panel(int rows, float *restrict out, int64_t out_stride, const level *restrict q,
                           const float *restrict scales, const int32_t *restrict offsets,
                           const uint8_t *restrict weights, const float *restrict weight_scales, int64_t groups) {
    __m256 total[TILE_ROWS][2];
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g++, weights += GROUP * LANES, weight_scales += LANES) {
        __m256i sum[TILE_ROWS][2];
        for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm256_set1_epi32(offsets[r * groups + g]);
        for (int k = 0; k < GROUP; k += DEPTH) {
            const __m128i *w = (const __m128i *)(weights + k * LANES);
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

// `rows` (a constant where it is inlined) rows times two panels.
INLINE void multiply_tile(int rows, float *restrict out, int64_t out_stride, const level *restrict q,
                          const float *restrict scales, const int32_t *restrict offsets,
                          const uint8_t *restrict weights, const float *restrict weight_scales, int64_t groups) {
    int64_t panel = groups * GROUP * LANES;
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
    multiply_panel(rows, out, out_stride, q, scales, offsets, weights, weight_scales, groups);
    multiply_panel(rows, out + LANES, out_stride, q, scales, offsets, weights + panel, weight_scales + groups * LANES,
                   groups);
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

// out (n, 32 * panels / 2) = x (n, 64 * groups; rows of x_stride) times weights (panels, groups, 64 / DEPTH, 16,
// DEPTH) with scales (panels, groups, 16); panels is even. Returns 0, or 1 where there is no memory.
int multiply_int8(float *restrict out, const float *restrict x, const uint8_t *restrict weights,
                  const float *restrict weight_scales, int64_t n, int64_t groups, int64_t panels, int64_t x_stride) {
    int64_t width = groups * GROUP, outputs = panels * LANES;
    level *q = malloc(n * (width * sizeof(level) + groups * (sizeof(float) + sizeof(int32_t))));
    if (q == NULL) return 1;
    float *scales = (float *)(q + n * width);
    int32_t *offsets = (int32_t *)(scales + n * groups);
    int64_t blocks = (n + TILE_ROWS - 1) / TILE_ROWS;
    #pragma omp parallel if (n * width * outputs > PARALLEL_FROM)
    {
        #pragma omp for
        for (int64_t i = 0; i < n; i++)
            quantize_row(q + i * width, scales + i * groups, offsets + i * groups, x + i * x_stride, groups);
        #pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; p += 2) {
            const uint8_t *w = weights + p * width * LANES;
            const float *s = weight_scales + p * groups * LANES;
            for (int64_t block = 0; block < blocks; block++) {
                int64_t i = n * block / blocks;
                float *o = out + i * outputs + p * LANES;
                const level *rows = q + i * width;
                switch (n * (block + 1) / blocks - i) {
                    #define CASE(count) \
                        case count: \
                            multiply_tile(count, o, outputs, rows, scales + i * groups, offsets + i * groups, w, s, groups); \
                            break;
                    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
                    #undef CASE
                }
            }
        }
    }
    free(q);
    return 0;
}

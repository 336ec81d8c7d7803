// Small float32 kernels for the CPU, where a model's many little operations cost as much as its products.
// Compiled on first use (native.py); everything they do has an equal in torch, used where there is no compiler.
//
// Threads come from the OpenMP pool that torch has already started.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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

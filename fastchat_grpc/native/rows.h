// Operations on one row, shared by all kernels.

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

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

// The largest absolute value.
INLINE float top_of(const float *x, int64_t size) {
    float top = 0.0f;
    #pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < size; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
    return top;
}

// out = x / sqrt(mean(x^2) + epsilon) * weight; out may be x.
INLINE void norm_row(float *out, const float *x, const float *weight, int64_t size, float epsilon) {
    float sum = 0.0f;
    #pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < size; d++) sum += x[d] * x[d];
    float factor = 1.0f / sqrtf(sum / (float)size + epsilon);
    #pragma omp simd
    for (int64_t d = 0; d < size; d++) out[d] = x[d] * factor * weight[d];
}

// out = silu(gate) * up; out may be gate.
INLINE void silu_row(float *out, const float *gate, const float *up, int64_t size) {
    #pragma omp simd
    for (int64_t d = 0; d < size; d++) {
        // silu(x) = x / (1 + exp(-x)); exp only of what is negative, which cannot overflow.
        float e = exp_negative(-fabsf(gate[d]));
        float sigmoid = (gate[d] >= 0.0f ? 1.0f : e) / (1.0f + e);
        out[d] = gate[d] * sigmoid * up[d];
    }
}

// Rotary embedding of one token in place: x (heads, size); cosine and sine (size), of which the first half is used
// (Hugging Face's layout: both halves are equal).
INLINE void rotate_row(float *restrict x, const float *restrict cosine, const float *restrict sine, int64_t heads,
                       int64_t size) {
    int64_t half = size / 2;
    for (int64_t h = 0; h < heads; h++) {
        float *restrict a = x + h * size;
        float *restrict b = a + half;
        #pragma omp simd
        for (int64_t d = 0; d < half; d++) {
            float left = a[d], right = b[d];
            a[d] = left * cosine[d] - right * sine[d];
            b[d] = right * cosine[d] + left * sine[d];
        }
    }
}

// Queries and keys of one token, row `i` of the step, normalised where the layer does so, and rotated.
INLINE void turn_row(float *row, const Qkv *shape, const Rotary *rotary, int64_t i) {
    int64_t size = rotary->size, turned = shape->heads + shape->kv_heads;
    for (int64_t h = 0; h < turned; h++) {
        const float *weight = h < shape->heads ? shape->query_norm : shape->key_norm;
        if (weight != NULL) norm_row(row + h * size, row + h * size, weight, size, shape->epsilon);
    }
    rotate_row(row, rotary->cosine + i * size, rotary->sine + i * size, turned, size);
}

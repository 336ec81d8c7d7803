// Weights of int8.c in 8 bits: for AVX-512 with VNNI, and in plain C for processors without anything better.
//
// Groups of 64 with a float32 scale each, for weights and inputs alike (llama.cpp's Q8_0, with larger groups).
// vpdpbusd multiplies unsigned by signed bytes, so weights stand plus 128. Sums start at minus what that adds to
// them, -128 times the sum of the inputs.

#pragma once

#include "rows.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define VNNI 1
#endif

#define PANEL 32
#define WEIGHT_BITS 8
#define TILE_ROWS 6
#define LANES (PANEL / 2)
#define DEPTH 4

typedef int8_t level;

// Of a group of inputs: its scale, and what its sums start at.
typedef struct {
    float scale;
    int32_t start;
} Scale;

// A panel is two halves of 16 outputs, then the scales (groups, 16) of both. In a half stand its groups, in each of
// those DEPTH inputs of all 16 outputs, then the next DEPTH.
INLINE int64_t half_bytes(int64_t groups) { return groups * GROUP * LANES; }

INLINE int64_t panel_bytes(int64_t groups) { return 2 * half_bytes(groups) + groups * PANEL * sizeof(float); }

// weights (PANEL, groups * GROUP)
static void pack_panel(uint8_t *panel, const float *weights, int64_t groups) {
    for (int64_t o = 0; o < PANEL; o++) {
        uint8_t *half = panel + o / LANES * half_bytes(groups);
        float *scales = (float *)(panel + 2 * half_bytes(groups)) + o / LANES * groups * LANES;
        for (int64_t g = 0; g < groups; g++, weights += GROUP) {
            float top = top_of(weights, GROUP), inverse = top > 0.0f ? 127.0f / top : 0.0f;
            for (int i = 0; i < GROUP; i++) {
                int64_t place = ((g * GROUP + i) / DEPTH * LANES + o % LANES) * DEPTH + i % DEPTH;
                half[place] = (uint8_t)((int32_t)rintf(weights[i] * inverse) + 128);
            }
            scales[g * LANES + o % LANES] = top / 127.0f;
        }
    }
}

// One row to levels of -127 to 127.
INLINE void quantize_row(level *restrict q, Scale *restrict scales, const float *restrict x, int64_t groups) {
    for (int64_t g = 0; g < groups; g++, x += GROUP, q += GROUP) {
        float top = top_of(x, GROUP), inverse = top > 0.0f ? 127.0f / top : 0.0f;
        int32_t sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int i = 0; i < GROUP; i++) {
            int32_t rounded = (int32_t)rintf(x[i] * inverse);
            q[i] = (level)rounded;
            sum += rounded;
        }
        scales[g] = (Scale){top / 127.0f, -128 * sum};
    }
}

#ifdef VNNI
INLINE void multiply_panel(int rows, float *restrict out, int64_t out_stride, const level *restrict q,
                           const Scale *restrict scales, const uint8_t *restrict panel, int64_t groups,
                           const uint8_t *next) {
    (void)next;  // what comes next the processor sees by itself
    int64_t bytes = half_bytes(groups);
    const float *weight_scales = (const float *)(panel + 2 * bytes);
    __m512 total[TILE_ROWS][2];
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *w = panel + g * GROUP * LANES;
        __m512i sum[TILE_ROWS][2];
        for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_set1_epi32(scales[r * groups + g].start);
        #pragma GCC unroll 4
        for (int k = 0; k < GROUP; k += DEPTH) {
            __m512i left = _mm512_loadu_si512(w + k * LANES), right = _mm512_loadu_si512(w + bytes + k * LANES);
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, q + (r * groups + g) * GROUP + k, sizeof four);
                __m512i x = _mm512_set1_epi32(four);
                sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], left, x);
                sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], right, x);
            }
        }
        __m512 left = _mm512_loadu_ps(weight_scales + g * LANES);
        __m512 right = _mm512_loadu_ps(weight_scales + (groups + g) * LANES);
        for (int r = 0; r < rows; r++) {
            __m512 scale = _mm512_set1_ps(scales[r * groups + g].scale);
            total[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][0]), _mm512_mul_ps(scale, left), total[r][0]);
            total[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][1]), _mm512_mul_ps(scale, right), total[r][1]);
        }
    }
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(out + r * out_stride, total[r][0]);
        _mm512_storeu_ps(out + r * out_stride + LANES, total[r][1]);
    }
}
#else
INLINE void multiply_panel(int rows, float *restrict out, int64_t out_stride, const level *restrict q,
                           const Scale *restrict scales, const uint8_t *restrict panel, int64_t groups,
                           const uint8_t *next) {
    (void)next;  // what comes next the processor sees by itself
    int64_t bytes = half_bytes(groups);
    for (int r = 0; r < rows; r++) {
        for (int half = 0; half < 2; half++) {
            float total[LANES] = {0};
            for (int64_t g = 0; g < groups; g++) {
                const uint8_t *w = panel + half * bytes + g * GROUP * LANES;
                const level *x = q + (r * groups + g) * GROUP;
                Scale scale = scales[r * groups + g];
                int32_t sum[LANES];
                for (int o = 0; o < LANES; o++) sum[o] = scale.start;
                for (int k = 0; k < GROUP; k += DEPTH, w += DEPTH * LANES) {
                    #pragma omp simd
                    for (int o = 0; o < LANES; o++) {
                        sum[o] += w[4 * o] * x[k] + w[4 * o + 1] * x[k + 1] + w[4 * o + 2] * x[k + 2] +
                                  w[4 * o + 3] * x[k + 3];
                    }
                }
                const float *s = (const float *)(panel + 2 * bytes) + (half * groups + g) * LANES;
                #pragma omp simd
                for (int o = 0; o < LANES; o++) total[o] += (float)sum[o] * (scale.scale * s[o]);
            }
            memcpy(out + r * out_stride + half * LANES, total, sizeof total);
        }
    }
}
#endif

// Weights of int8.c for AVX2, which has no exact product of bytes that adds in 32 bits.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds two products in 16 bits; with weights of 6 bits, four fit.
// What that costs in precision, groups of 8 give back: each has an 8-bit multiple of its output's scale (llama.cpp's
// Q6_K has such, in groups of 16), and as vpmaddwd has to widen the sums anyway, it multiplies by that on the way.
//
// Inputs stand plus 128, for the unsigned side. Sums start at minus what that adds to them, which is kept with the
// weights.

#pragma once

#include <immintrin.h>

#include "rows.h"

#define PANEL 8
#define TILE_ROWS 8
#define LEVELS 32
#define WEIGHT_BITS 6
#define STEP 8
#define STEPS (GROUP / STEP)

typedef uint8_t level;
typedef float Scale;

// A group of a panel's outputs: of each step, weights of inputs 0 to 3 of all outputs, then of inputs 4 to 7.
typedef struct {
    int8_t weights[STEPS][2][PANEL][STEP / 2];
    uint8_t multiples[STEPS][PANEL];
    int32_t starts[PANEL];
} Group;

// A panel is its groups, then a scale for each output.
INLINE int64_t panel_bytes(int64_t groups) { return groups * sizeof(Group) + PANEL * sizeof(float); }

// One group's weights x of output o, whose multiples are of `unit`.
INLINE void pack_group(Group *group, int64_t o, const float *x, float unit) {
    int32_t sum = 0;
    for (int s = 0; s < STEPS; s++, x += STEP) {
        float multiple = unit > 0.0f ? ceilf(top_of(x, STEP) / (LEVELS * unit) - 1e-3f) : 1.0f;
        multiple = multiple < 1.0f ? 1.0f : multiple > 255.0f ? 255.0f : multiple;
        group->multiples[s][o] = (uint8_t)multiple;
        for (int i = 0; i < STEP; i++) {
            float rounded = unit > 0.0f ? rintf(x[i] / (multiple * unit)) : 0.0f;
            int8_t weight = (int8_t)(rounded > LEVELS ? LEVELS : rounded < -LEVELS ? -LEVELS : rounded);
            group->weights[s][i / (STEP / 2)][o][i % (STEP / 2)] = weight;
            sum += weight * (int32_t)multiple;
        }
    }
    group->starts[o] = -128 * sum;
}

// weights (PANEL, groups * GROUP)
static void pack_panel(uint8_t *panel, const float *weights, int64_t groups) {
    for (int64_t o = 0; o < PANEL; o++) {
        float unit = top_of(weights + o * groups * GROUP, groups * GROUP) / (LEVELS * 255);
        ((float *)(panel + groups * sizeof(Group)))[o] = unit;
        for (int64_t g = 0; g < groups; g++)
            pack_group((Group *)panel + g, o, weights + (o * groups + g) * GROUP, unit);
    }
}

// One row to levels of 1 to 255, 128 being zero.
INLINE void quantize_row(level *restrict q, Scale *restrict scales, const float *restrict x, int64_t groups) {
    for (int64_t g = 0; g < groups; g++, x += GROUP, q += GROUP) {
        float top = top_of(x, GROUP), inverse = top > 0.0f ? 127.0f / top : 0.0f;
        #pragma omp simd
        for (int i = 0; i < GROUP; i++) q[i] = (level)((int32_t)rintf(x[i] * inverse) + 128);
        scales[g] = top / 127.0f;
    }
}

INLINE __m256i broadcast(const level *four) {
    int32_t bits;
    memcpy(&bits, four, sizeof bits);
    return _mm256_set1_epi32(bits);
}

// Eight bytes, each to both halves of a 32-bit number.
INLINE __m256i widen(const uint8_t *eight) {
    const __m256i places = _mm256_setr_epi8(0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1,
                                            4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7, -1);
    int64_t bits;
    memcpy(&bits, eight, sizeof bits);
    return _mm256_shuffle_epi8(_mm256_set1_epi64x(bits), places);
}

// `rows` (a constant where it is inlined) rows times one panel. Meanwhile the panel at `next` is sent for.
INLINE void multiply_panel(int rows, float *restrict out, int64_t out_stride, const level *restrict q,
                           const Scale *restrict scales, const uint8_t *restrict panel, int64_t groups,
                           const uint8_t *next) {
    const Group *group = (const Group *)panel;
    __m256 total[TILE_ROWS];
    for (int r = 0; r < rows; r++) total[r] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g++, group++, next += sizeof(Group)) {
        __m256i sum[TILE_ROWS];
        for (int r = 0; r < rows; r++) sum[r] = _mm256_loadu_si256((const __m256i *)group->starts);
        for (int s = 0; s < STEPS; s++) {
            __builtin_prefetch(next + s * 64, 0, 2);
            __m256i left = _mm256_loadu_si256((const __m256i *)group->weights[s][0]);
            __m256i right = _mm256_loadu_si256((const __m256i *)group->weights[s][1]);
            __m256i multiples = widen(group->multiples[s]);
            for (int r = 0; r < rows; r++) {
                const level *x = q + (r * groups + g) * GROUP + s * STEP;
                __m256i four = _mm256_add_epi16(_mm256_maddubs_epi16(broadcast(x), left),
                                                _mm256_maddubs_epi16(broadcast(x + STEP / 2), right));
                sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(four, multiples));
            }
        }
        for (int r = 0; r < rows; r++) {
            __m256 scale = _mm256_set1_ps(scales[r * groups + g]);
            total[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r]), scale, total[r]);
        }
    }
    __m256 scale = _mm256_loadu_ps((const float *)group);
    for (int r = 0; r < rows; r++) _mm256_storeu_ps(out + r * out_stride, _mm256_mul_ps(total[r], scale));
}

// Products of int8.c for AVX2, which has no exact product of bytes that adds in 32 bits.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds two products in 16 bits; with weights of 6 bits, four fit.
// What that costs in precision, groups of 8 give back: each has an 8-bit multiple of its output's scale (llama.cpp's
// Q6_K has such, in groups of 16), and as vpmaddwd has to widen the sums anyway, it multiplies by that on the way.
//
// Inputs stand plus 128, for the unsigned side. Sums start at minus what that adds to them, which is kept with the
// weights.

#include "int8.h"

#ifdef INT8_AVX2

#include <immintrin.h>

#define PANEL 8
#define TILE_ROWS 8
#define LEVELS 32
#define STEP 8
#define STEPS (GROUP / STEP)

const Panel panel = {PANEL, sizeof(float), 6};

// A group of a panel's outputs: of each step, weights of inputs 0 to 3 of all outputs, then of inputs 4 to 7.
typedef struct {
    int8_t weights[STEPS][2][PANEL][STEP / 2];
    uint8_t multiples[STEPS][PANEL];
    int32_t starts[PANEL];
} Group;

// A panel is its groups, then a scale for each output.
int64_t panel_bytes(int64_t groups) { return groups * sizeof(Group) + PANEL * sizeof(float); }

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
void pack_panel(uint8_t *packed, const float *weights, int64_t groups) {
    for (int64_t o = 0; o < PANEL; o++) {
        float unit = top_of(weights + o * groups * GROUP, groups * GROUP) / (LEVELS * 255);
        ((float *)(packed + groups * sizeof(Group)))[o] = unit;
        for (int64_t g = 0; g < groups; g++)
            pack_group((Group *)packed + g, o, weights + (o * groups + g) * GROUP, unit);
    }
}

// One row to levels of 1 to 255, 128 being zero.
void quantize_row(uint8_t *restrict levels, void *restrict scales, const float *restrict x, int64_t groups) {
    for (int64_t g = 0; g < groups; g++, x += GROUP, levels += GROUP) {
        float top = top_of(x, GROUP), inverse = top > 0.0f ? 127.0f / top : 0.0f;
        #pragma omp simd
        for (int i = 0; i < GROUP; i++) levels[i] = (uint8_t)((int32_t)rintf(x[i] * inverse) + 128);
        ((float *)scales)[g] = top / 127.0f;
    }
}

INLINE __m256i broadcast(const uint8_t *four) {
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

// `rows` is a constant where it is inlined.
INLINE void multiply_rows(int rows, float *restrict out, int64_t out_stride, const uint8_t *restrict levels,
                          const float *restrict scales, int64_t groups, const uint8_t *restrict weights,
                          const uint8_t *next) {
    const Group *group = (const Group *)weights;
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
                const uint8_t *x = levels + (r * groups + g) * GROUP + s * STEP;
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

// In tiles of nearly equal numbers of rows.
void multiply_panel(float *out, int64_t out_stride, const Rows *rows, const uint8_t *weights, const uint8_t *next) {
    int64_t n = rows->count, groups = rows->groups, tiles = (n + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t i = n * t / tiles;
        const uint8_t *levels = rows->levels + i * groups * GROUP;
        const float *scales = (const float *)rows->scales + i * groups;
        switch (n * (t + 1) / tiles - i) {
            #define CASE(r) \
                case r: multiply_rows(r, out + i * out_stride, out_stride, levels, scales, groups, weights, next); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
            #undef CASE
        }
    }
}

#endif

// Products of int8.c for AVX-512 with VNNI.

#include "int8_bytes.h"

#ifdef INT8_AVX512

#include <immintrin.h>

// `rows` is a constant where it is inlined.
INLINE void multiply_rows(int rows, float *restrict out, int64_t out_stride, const int8_t *restrict levels,
                          const Scale *restrict scales, int64_t groups, const uint8_t *restrict weights) {
    int64_t bytes = half_bytes(groups);
    const float *weight_scales = (const float *)(weights + 2 * bytes);
    __m512 total[TILE_ROWS][2];
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t *w = weights + g * GROUP * LANES;
        __m512i sum[TILE_ROWS][2];
        for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_set1_epi32(scales[r * groups + g].start);
        #pragma GCC unroll 4
        for (int k = 0; k < GROUP; k += DEPTH) {
            __m512i left = _mm512_loadu_si512(w + k * LANES), right = _mm512_loadu_si512(w + bytes + k * LANES);
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, levels + (r * groups + g) * GROUP + k, sizeof four);
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

#include "int8_tiles.h"

#endif

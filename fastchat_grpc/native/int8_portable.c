// Products of int8.c in plain C.

#include "int8_bytes.h"

#ifdef INT8_PORTABLE

// `rows` is a constant where it is inlined.
INLINE void multiply_rows(int rows, float *restrict out, int64_t out_stride, const int8_t *restrict levels,
                          const Scale *restrict scales, int64_t groups, const uint8_t *restrict weights) {
    int64_t bytes = half_bytes(groups);
    for (int r = 0; r < rows; r++) {
        for (int half = 0; half < 2; half++) {
            float total[LANES] = {0};
            for (int64_t g = 0; g < groups; g++) {
                const uint8_t *w = weights + half * bytes + g * GROUP * LANES;
                const int8_t *x = levels + (r * groups + g) * GROUP;
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
                const float *s = (const float *)(weights + 2 * bytes) + (half * groups + g) * LANES;
                #pragma omp simd
                for (int o = 0; o < LANES; o++) total[o] += (float)sum[o] * (scale.scale * s[o]);
            }
            memcpy(out + r * out_stride + half * LANES, total, sizeof total);
        }
    }
}

#include "int8_tiles.h"

#endif

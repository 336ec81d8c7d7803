// Packing and quantizing for int8_avx512.c and int8_portable.c.

#include "int8_bytes.h"

#ifndef INT8_AVX2

const Panel panel = {PANEL, sizeof(Scale), 8};

int64_t panel_bytes(int64_t groups) { return 2 * half_bytes(groups) + groups * PANEL * sizeof(float); }

// weights (PANEL, groups * GROUP)
void pack_panel(uint8_t *packed, const float *weights, int64_t groups) {
    for (int64_t o = 0; o < PANEL; o++) {
        uint8_t *half = packed + o / LANES * half_bytes(groups);
        float *scales = (float *)(packed + 2 * half_bytes(groups)) + o / LANES * groups * LANES;
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
void quantize_row(uint8_t *restrict levels, void *restrict scales, const float *restrict x, int64_t groups) {
    for (int64_t g = 0; g < groups; g++, x += GROUP, levels += GROUP) {
        float top = top_of(x, GROUP), inverse = top > 0.0f ? 127.0f / top : 0.0f;
        int32_t sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int i = 0; i < GROUP; i++) {
            int32_t rounded = (int32_t)rintf(x[i] * inverse);
            levels[i] = (uint8_t)(int8_t)rounded;
            sum += rounded;
        }
        ((Scale *)scales)[g] = (Scale){top / 127.0f, -128 * sum};
    }
}

#endif

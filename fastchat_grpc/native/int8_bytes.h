// Weights in 8 bits, for AVX-512 with VNNI and for the plain C of processors without anything better.
//
// Groups have a float32 scale each, for weights and inputs alike (llama.cpp's Q8_0, with larger groups). vpdpbusd
// multiplies unsigned by signed bytes, so weights stand plus 128. Sums start at minus what that adds to them, -128
// times the sum of the inputs.
//
// A panel is two halves of LANES outputs, then the scales (groups, LANES) of both. In a half stand its groups, in each
// of those DEPTH inputs of all LANES outputs, then the next DEPTH.

#pragma once

#include "int8.h"

#define PANEL 32
#define TILE_ROWS 6
#define LANES (PANEL / 2)
#define DEPTH 4

// Of a group of inputs: its scale, and what its sums start at.
typedef struct {
    float scale;
    int32_t start;
} Scale;

INLINE int64_t half_bytes(int64_t groups) { return groups * GROUP * LANES; }

// What int8.c asks of an instruction set. One of int8_avx512.c, int8_avx2.c and int8_portable.c has code, by what the
// compiler may use; how weights are kept is its own affair.
//
// Weights and inputs are small integers in groups of GROUP along the inputs, each group with a scale. Sums within a
// group are exact, and groups add up in one order, so a row's result does not depend on which rows stand beside it.

#pragma once

#include "rows.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define INT8_AVX512
#elif defined(__AVX2__) && defined(__FMA__)
#define INT8_AVX2
#else
#define INT8_PORTABLE
#endif

#define GROUP 64

#pragma GCC visibility push(hidden)

// Weights are kept in panels of some outputs.
typedef struct {
    int64_t outputs;      // of a panel; a divisor of 32
    int64_t scale_bytes;  // of an input's group
    int weight_bits;
} Panel;

extern const Panel panel;

int64_t panel_bytes(int64_t groups);

// weights (panel.outputs, groups * GROUP) to packed (panel_bytes(groups)).
void pack_panel(uint8_t *packed, const float *weights, int64_t groups);

// One row's inputs x (groups * GROUP) to as many levels, a byte each, and to their groups' scales.
void quantize_row(uint8_t *levels, void *scales, const float *x, int64_t groups);

// Quantized rows of a product's input: levels (count, groups * GROUP), scales (count, groups).
typedef struct {
    uint8_t *levels;
    void *scales;
    int64_t count, groups;
} Rows;

// out (count, panel.outputs; rows of out_stride) = the rows times one panel. Meanwhile the panel at `next` is sent for.
void multiply_panel(float *out, int64_t out_stride, const Rows *rows, const uint8_t *weights, const uint8_t *next);

#pragma GCC visibility pop

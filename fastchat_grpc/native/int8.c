// 8-bit linear layers for the CPU, and decoder layers made of them.
//
// Weights and inputs are small integers in groups of 64 along the inputs, each group with a scale. Sums within a group
// are exact, and groups add up in one order, so a row's result does not depend on which rows stand beside it.
// How weights are kept depends on what the processor multiplies fast, and nobody else needs to know it: a layer is
// packed here, in panels of some outputs.

#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_num_threads() 1
#endif

#include "decode.h"
#include "rows.h"

#define GROUP 64
#define OUTPUTS 32  // a multiple of the outputs of every kind of panel, and what a thread takes at a time

#if defined(__AVX2__) && defined(__FMA__) && !(defined(__AVX512F__) && defined(__AVX512VNNI__))
#include "int8_avx2.h"
#else
#include "int8_bytes.h"
#endif

int weight_bits(void) { return WEIGHT_BITS; }

// Bytes of a layer's weights. Its inputs are a multiple of GROUP, its outputs of OUTPUTS.
int64_t int8_bytes(int64_t outputs, int64_t inputs) { return outputs / PANEL * panel_bytes(inputs / GROUP); }

// weights (outputs, inputs) to packed (int8_bytes).
void pack_int8(uint8_t *packed, const float *weights, int64_t outputs, int64_t inputs) {
    int64_t groups = inputs / GROUP;
    #pragma omp parallel for
    for (int64_t panel = 0; panel < outputs / PANEL; panel++)
        pack_panel(packed + panel * panel_bytes(groups), weights + panel * PANEL * inputs, groups);
}

// Rows of a product's input. One malloc for all; `q` is NULL where there was no memory.
typedef struct {
    level *q;       // (n, width)
    Scale *scales;  // (n, groups)
    int64_t n;
} Rows;

static Rows allocate_rows(int64_t n, int64_t width) {
    level *q = malloc(n * (width * sizeof(level) + width / GROUP * sizeof(Scale)));
    return (Rows){q, (Scale *)(q + n * width), n};
}

INLINE void quantize(const Rows *rows, int64_t i, const float *x, int64_t inputs) {
    int64_t groups = inputs / GROUP;
    quantize_row(rows->q + i * groups * GROUP, rows->scales + i * groups, x, groups);
}

// out (n, outputs) = rows times weights, without bias. To be called by all threads of a team.
INLINE void multiply(const Rows *rows, const Product *p, float *restrict out) {
    int64_t n = rows->n, groups = p->inputs / GROUP, bytes = panel_bytes(groups), panels = p->outputs / PANEL;
    int64_t tiles = (n + TILE_ROWS - 1) / TILE_ROWS, ahead = omp_get_num_threads() * OUTPUTS / PANEL;
    // Dynamic, as cores are seldom equally fast: other programs, and other virtual machines, use them too.
    #pragma omp for schedule(dynamic, OUTPUTS / PANEL)
    for (int64_t panel = 0; panel < panels; panel++) {
        const uint8_t *weights = p->packed + panel * bytes;
        const uint8_t *next = panel + ahead < panels ? weights + ahead * bytes : weights;  // probably this thread's
        for (int64_t tile = 0; tile < tiles; tile++) {
            int64_t i = n * tile / tiles;
            float *o = out + i * p->outputs + panel * PANEL;
            const level *q = rows->q + i * groups * GROUP;
            const Scale *scales = rows->scales + i * groups;
            switch (n * (tile + 1) / tiles - i) {
                #define CASE(count) \
                    case count: \
                        multiply_panel(count, o, p->outputs, q, scales, weights, groups, next); \
                        break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if TILE_ROWS > 6
                CASE(7) CASE(8)
#endif
                #undef CASE
            }
        }
    }
}

// out (n, outputs) = x (n, inputs; rows of x_stride) times packed weights. Returns 0, or 1 where there is no memory.
int multiply_int8(float *out, const float *x, const uint8_t *packed, int64_t n, int64_t outputs, int64_t inputs,
                  int64_t x_stride) {
    Product product = {packed, NULL, outputs, inputs};
    Rows rows = allocate_rows(n, inputs);
    if (rows.q == NULL) return 1;
    #pragma omp parallel if (n * inputs * outputs > PARALLEL_FROM)
    {
        #pragma omp for
        for (int64_t i = 0; i < n; i++) quantize(&rows, i, x + i * x_stride, inputs);
        multiply(&rows, &product, out);
    }
    free(rows.q);
    return 0;
}

// ------------------------------------------------------------------------------- a decoder layer around attention
//
// At a few rows per step, calls and the waking of threads cost as much as products. So what stands before attention
// is one call with one team of threads, and so is what stands behind it.

INLINE void add_bias(float *restrict row, const Product *p) {
    if (p->bias == NULL) return;
    #pragma omp simd
    for (int64_t d = 0; d < p->outputs; d++) row[d] += p->bias[d];
}

INLINE void add_row(float *out, const float *x, const float *restrict y, int64_t size) {
    #pragma omp simd
    for (int64_t d = 0; d < size; d++) out[d] = x[d] + y[d];
}

// qkv (n, (heads + 2 * kv_heads) * size): queries and keys are normalised where the layer does so, and rotated.
// x (n, hidden); cosine and sine (n, size). Returns 0, or 1 where there is no memory.
int before_attention(const Layer *layer, float *qkv, const float *x, const float *cosine, const float *sine, int64_t n) {
    int64_t hidden = layer->hidden, size = layer->size, heads = layer->heads, turned = heads + layer->kv_heads;
    int64_t width = (turned + layer->kv_heads) * size;
    Rows rows = allocate_rows(n, hidden);
    float *normed = malloc(sizeof(float) * n * hidden);
    int failed = rows.q == NULL || normed == NULL;
    if (!failed) {
        #pragma omp parallel if (n * hidden * width > PARALLEL_FROM)
        {
            #pragma omp for
            for (int64_t i = 0; i < n; i++) {
                float *row = normed + i * hidden;
                norm_row(row, x + i * hidden, layer->attention_norm, hidden, layer->epsilon, 0.0f);
                quantize(&rows, i, row, hidden);
            }
            multiply(&rows, &layer->qkv, qkv);
            #pragma omp for
            for (int64_t i = 0; i < n; i++) {
                float *row = qkv + i * width;
                add_bias(row, &layer->qkv);
                for (int64_t h = 0; h < turned; h++) {
                    const float *weight = h < heads ? layer->query_norm : layer->key_norm;
                    if (weight != NULL) norm_row(row + h * size, row + h * size, weight, size, layer->epsilon, 0.0f);
                }
                rotate_row(row, cosine + i * size, sine + i * size, turned, size);
            }
        }
    }
    free(normed);
    free(rows.q);
    return failed;
}

// out (n, hidden), which may be x, = what the layer makes of its input x (n, hidden) and of attention's output
// (n, heads * size). Returns 0, or 1 where there is no memory.
int after_attention(const Layer *layer, float *out, const float *x, const float *attended, int64_t n) {
    int64_t hidden = layer->hidden, inner = layer->inner, attention = layer->heads * layer->size;
    int64_t widest = attention > hidden ? attention : hidden;
    Rows rows = allocate_rows(n, widest > inner ? widest : inner);
    float *product = malloc(sizeof(float) * n * (hidden + 2 * inner));
    float *both = product + n * hidden;
    int failed = rows.q == NULL || product == NULL;
    if (!failed) {
        #pragma omp parallel if (n * hidden * inner > PARALLEL_FROM)
        {
            #pragma omp for
            for (int64_t i = 0; i < n; i++) quantize(&rows, i, attended + i * attention, attention);
            multiply(&rows, &layer->o, product);
            #pragma omp for
            for (int64_t i = 0; i < n; i++) {
                float *row = product + i * hidden;
                add_bias(row, &layer->o);
                add_row(out + i * hidden, x + i * hidden, row, hidden);
                norm_row(row, out + i * hidden, layer->mlp_norm, hidden, layer->epsilon, 0.0f);
                quantize(&rows, i, row, hidden);
            }
            multiply(&rows, &layer->gate_up, both);
            #pragma omp for
            for (int64_t i = 0; i < n; i++) {
                float *row = both + i * 2 * inner;
                add_bias(row, &layer->gate_up);
                silu_row(row, row, row + inner, inner);
                quantize(&rows, i, row, inner);
            }
            multiply(&rows, &layer->down, product);
            #pragma omp for
            for (int64_t i = 0; i < n; i++) {
                float *row = product + i * hidden;
                add_bias(row, &layer->down);
                add_row(out + i * hidden, out + i * hidden, row, hidden);
            }
        }
    }
    free(product);
    free(rows.q);
    return failed;
}

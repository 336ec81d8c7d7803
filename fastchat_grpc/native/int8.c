// 8-bit linear layers for the CPU, and decoder layers made of them. What depends on the processor is behind int8.h.

#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_num_threads() 1
#endif

#include "int8.h"

#define OUTPUTS 32  // what a thread takes at a time, and a multiple of every panel's outputs

int weight_bits(void) { return panel.weight_bits; }

// Bytes of a layer's weights. Its inputs are a multiple of GROUP, its outputs of OUTPUTS.
int64_t int8_bytes(int64_t outputs, int64_t inputs) { return outputs / panel.outputs * panel_bytes(inputs / GROUP); }

// weights (outputs, inputs) to packed (int8_bytes).
void pack_int8(uint8_t *packed, const float *weights, int64_t outputs, int64_t inputs) {
    int64_t groups = inputs / GROUP, bytes = panel_bytes(groups);
    #pragma omp parallel for
    for (int64_t i = 0; i < outputs / panel.outputs; i++)
        pack_panel(packed + i * bytes, weights + i * panel.outputs * inputs, groups);
}

// Room for rows of up to `width` inputs. One malloc for all; `levels` is NULL where there was no memory.
static Rows allocate_rows(int64_t count, int64_t width) {
    uint8_t *levels = malloc(count * (width + width / GROUP * panel.scale_bytes));
    return (Rows){levels, levels + count * width, count, 0};
}

// One of them, of `groups` groups.
INLINE void quantize(const Rows *rows, int64_t i, const float *x, int64_t groups) {
    uint8_t *scales = (uint8_t *)rows->scales + i * groups * panel.scale_bytes;
    quantize_row(rows->levels + i * groups * GROUP, scales, x, groups);
}

// out (count, outputs) = quantized rows times weights, without bias. To be called by all threads of a team.
INLINE void multiply(const Rows *quantized, const Product *p, float *restrict out) {
    Rows rows = {quantized->levels, quantized->scales, quantized->count, p->inputs / GROUP};
    int64_t panels = p->outputs / panel.outputs, bytes = panel_bytes(rows.groups), step = OUTPUTS / panel.outputs;
    int64_t ahead = omp_get_num_threads() * step;
    // Dynamic, as cores are seldom equally fast: other programs, and other virtual machines, use them too.
    #pragma omp for schedule(dynamic, step)
    for (int64_t i = 0; i < panels; i++) {
        const uint8_t *weights = p->packed + i * bytes;
        const uint8_t *next = i + ahead < panels ? weights + ahead * bytes : weights;  // probably this thread's
        multiply_panel(out + i * panel.outputs, p->outputs, &rows, weights, next);
    }
}

// out (count, outputs) = x (count, inputs; rows of `stride`) times the weights, without bias.
int multiply_int8(float *out, const float *x, int64_t count, int64_t stride, const Product *product) {
    Rows rows = allocate_rows(count, product->inputs);
    if (rows.levels == NULL) return 1;
    #pragma omp parallel if (count * product->inputs * product->outputs > PARALLEL_FROM)
    {
        #pragma omp for
        for (int64_t i = 0; i < count; i++) quantize(&rows, i, x + i * stride, product->inputs / GROUP);
        multiply(&rows, product, out);
    }
    free(rows.levels);
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

// qkv (count, (heads + 2 * kv_heads) * size) of x (count, hidden): queries and keys normalised where the layer does
// so, and rotated.
int before_attention(const Layer *layer, float *qkv, const float *x, const Rotary *rotary) {
    int64_t n = rotary->count, hidden = layer->hidden, width = layer->qkv.outputs;
    Rows rows = allocate_rows(n, hidden);
    float *normed = malloc(sizeof(float) * n * hidden);
    int failed = rows.levels == NULL || normed == NULL;
    if (!failed) {
        #pragma omp parallel if (n * hidden * width > PARALLEL_FROM)
        {
            #pragma omp for
            for (int64_t i = 0; i < n; i++) {
                float *row = normed + i * hidden;
                norm_row(row, x + i * hidden, layer->attention_norm, hidden, layer->epsilon);
                quantize(&rows, i, row, hidden / GROUP);
            }
            multiply(&rows, &layer->qkv, qkv);
            #pragma omp for
            for (int64_t i = 0; i < n; i++) {
                add_bias(qkv + i * width, &layer->qkv);
                turn_row(qkv + i * width, &layer->heads, rotary, i);
            }
        }
    }
    free(normed);
    free(rows.levels);
    return failed;
}

// out (count, hidden), which may be x, = what the layer makes of its input x (count, hidden) and of attention's output
// (count, heads * size).
int after_attention(const Layer *layer, float *out, const float *x, const float *attended, int64_t count) {
    int64_t hidden = layer->hidden, inner = layer->inner, attention = layer->o.inputs, n = count;
    int64_t widest = attention > hidden ? attention : hidden;
    Rows rows = allocate_rows(n, widest > inner ? widest : inner);
    float *product = malloc(sizeof(float) * n * (hidden + 2 * inner));
    float *both = product + n * hidden;
    int failed = rows.levels == NULL || product == NULL;
    if (!failed) {
        #pragma omp parallel if (n * hidden * inner > PARALLEL_FROM)
        {
            #pragma omp for
            for (int64_t i = 0; i < n; i++) quantize(&rows, i, attended + i * attention, attention / GROUP);
            multiply(&rows, &layer->o, product);
            #pragma omp for
            for (int64_t i = 0; i < n; i++) {
                float *row = product + i * hidden;
                add_bias(row, &layer->o);
                add_row(out + i * hidden, x + i * hidden, row, hidden);
                norm_row(row, out + i * hidden, layer->mlp_norm, hidden, layer->epsilon);
                quantize(&rows, i, row, hidden / GROUP);
            }
            multiply(&rows, &layer->gate_up, both);
            #pragma omp for
            for (int64_t i = 0; i < n; i++) {
                float *row = both + i * 2 * inner;
                add_bias(row, &layer->gate_up);
                silu_row(row, row, row + inner, inner);
                quantize(&rows, i, row, inner / GROUP);
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
    free(rows.levels);
    return failed;
}

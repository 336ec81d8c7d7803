// Norms, activation and rotation of all rows of a step. At a few rows, torch's little operations cost as much as a
// model's products. Everything here has an equal in torch, used where there is no compiler.
//
// Threads come from the OpenMP pool that torch has already started.

#include "rows.h"

// out = x / sqrt(mean(x^2) + epsilon) * weight, row by row.
void rms_norm(float *out, const float *x, const float *weight, int64_t count, int64_t size, float epsilon) {
    #pragma omp parallel for if (count * size > PARALLEL_FROM)
    for (int64_t i = 0; i < count; i++) norm_row(out + i * size, x + i * size, weight, size, epsilon);
}

// out (count, size) = silu(gate) * up, which stand side by side: gate_up (count, 2 * size).
void silu_and_multiply(float *out, const float *gate_up, int64_t count, int64_t size) {
    #pragma omp parallel for if (count * size > PARALLEL_FROM / 8)
    for (int64_t i = 0; i < count; i++) {
        const float *gate = gate_up + i * 2 * size;
        silu_row(out + i * size, gate, gate + size, size);
    }
}

// Queries and keys of qkv (count, (heads + 2 * kv_heads) * size), in place.
void norm_and_rotate(float *qkv, const Qkv *shape, const Rotary *rotary) {
    int64_t width = (shape->heads + 2 * shape->kv_heads) * rotary->size;
    #pragma omp parallel for if (rotary->count * width > PARALLEL_FROM)
    for (int64_t i = 0; i < rotary->count; i++) turn_row(qkv + i * width, shape, rotary, i);
}

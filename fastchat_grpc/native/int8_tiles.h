// multiply_panel of a file that has defined its multiply_rows: included after it, so that numbers of rows are constants.

// In tiles of nearly equal numbers of rows.
void multiply_panel(float *out, int64_t out_stride, const Rows *rows, const uint8_t *weights, const uint8_t *next) {
    (void)next;  // what comes next the processor sees by itself
    int64_t n = rows->count, groups = rows->groups, tiles = (n + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t i = n * t / tiles;
        const int8_t *levels = (const int8_t *)rows->levels + i * groups * GROUP;
        const Scale *scales = (const Scale *)rows->scales + i * groups;
        switch (n * (t + 1) / tiles - i) {
            #define CASE(r) \
                case r: multiply_rows(r, out + i * out_stride, out_stride, levels, scales, groups, weights); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
            #undef CASE
        }
    }
}

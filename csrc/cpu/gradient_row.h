// Where a kernel with a softmax split into targets and the rest puts a row's gradient, and its exponentials meanwhile.
// Included by sources compiled once per instruction set, like simd.h.
#pragma once

#include "rows.h"

namespace fused_kd {
namespace FKD_ISA {

template <class A>
struct GradientRow {
    char* data; // null when not wanted
    DType dtype;
    int64_t classes;
    A* exponentials;

    GradientRow(void* gradient, DType type, int64_t row, int64_t classes, A* spare)
        : data(gradient ? static_cast<char*>(gradient) + row * classes * element_size(type) : nullptr), dtype(type),
          classes(classes), exponentials(data && type == dtype_of<A>() ? reinterpret_cast<A*>(data) : spare) {}
    void put(int64_t j, A value) const { write(&value, 1, data + j * element_size(dtype), dtype); }
    A* block(int64_t j, A* staging) const { return dtype == dtype_of<A>() ? reinterpret_cast<A*>(data) + j : staging; }
    void finish(int64_t j, int64_t n, const A* staging) const {
        if (dtype != dtype_of<A>()) write(staging, n, data + j * element_size(dtype), dtype);
    }
    // The whole row, where it is wanted.
    void fill(A value, A* staging) const {
        if (!data) return;
        for (int64_t i = 0; i < kBlock<A>; ++i)
            staging[i] = value;
        for (int64_t j = 0; j < classes; j += kBlock<A>)
            write(staging, block_length<A>(classes, j), data + j * element_size(dtype), dtype);
    }
};

} // namespace FKD_ISA
} // namespace fused_kd

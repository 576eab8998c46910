// The gradient of a row, for kernels that split the softmax into targets and the rest. Meanwhile it holds the row's
// exponentials, if the dtypes allow. Included by sources compiled once per instruction set, like simd.h.
#pragma once

#include "rows.h"

namespace fused_kd {
namespace FKD_ISA {

template <class A>
struct GradientRow {
    char* data; // null if not wanted
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
    // For a row without a value: NaN, but 0 for classes with logit -inf. Does nothing if the gradient is not wanted.
    void fill_nan(const Matrix& logits, int64_t row, A* staging) const {
        for (int64_t j = 0; data && j < classes; j += kBlock<A>) {
            const int64_t n = block_length<A>(classes, j);
            const A* const x = read(logits, row, j, n, staging);
            for (int64_t i = 0; i < n; ++i)
                staging[i] = x[i] == -INFINITY ? A(0) : A(NAN);
            write(staging, n, data + j * element_size(dtype), dtype);
        }
    }
};

} // namespace FKD_ISA
} // namespace fused_kd

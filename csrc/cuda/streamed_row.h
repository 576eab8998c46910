// Rows that stay in memory: each visit reads them in aligned chunks. Kernels that read rows in this way are compiled
// for each dtype, and for anything else: choosing the conversion anew for each chunk took as many instructions as the
// rest.
#pragma once

#include <type_traits>

#include "memory.h"

namespace fused_kd {
namespace cuda {

// The type of contiguous rows of one dtype is that dtype. kAnyType: other strides, two dtypes, or float64.
constexpr int kAnyType = -1;

inline int type_of(const Matrix& m) {
    return m.col_stride == 1 && m.dtype != kFloat64 ? int(m.dtype) : kAnyType;
}

inline int type_of(const Matrix& a, const Matrix& b) {
    return type_of(a) == type_of(b) ? type_of(a) : kAnyType;
}

// f(std::integral_constant<int, type>()): a kernel's template argument from the type of a call.
template <class F>
auto with_type(int type, F&& f) {
    switch (type) {
    case kFloat32:
        return f(std::integral_constant<int, kFloat32>());
    case kBFloat16:
        return f(std::integral_constant<int, kBFloat16>());
    case kFloat16:
        return f(std::integral_constant<int, kFloat16>());
    default:
        return f(std::integral_constant<int, kAnyType>());
    }
}

// The row with its type as a constant, so that the compiler removes the code for others.
template <int kType, class Row>
__device__ __forceinline__ Row of_type(Row row) {
    if (kType != kAnyType) row.dtype = DType(kType);
    return row;
}

template <int kType>
__device__ __forceinline__ RowView typed_view(const Matrix& m, int64_t index, int before) {
    RowView row = of_type<kType>(row_view(m, index, before));
    if (kType != kAnyType) row.stride = 1;
    return row;
}

// Student and weak logits of a row. The weak ones use single elements if their chunks are not aligned as the student's.
template <class A, int kType>
struct StreamedRow {
    RowView student, weak;
    int classes, before;

    __device__ StreamedRow(const Matrix& s, const Matrix& w, int64_t index, int classes)
        : classes(classes), before(classes_before(s, index)) {
        student = typed_view<kType>(s, index, before);
        weak = typed_view<kType>(w, index, before);
    }

    template <class F>
    __device__ __forceinline__ void visit(F&& f) const {
        // Copies, because the row may lie in shared memory, which f may write.
        const RowView student_row = of_type<kType>(student), weak_row = of_type<kType>(weak);
        const int end = classes;
        for (int base = threadIdx.x * kChunk - before; base < end; base += blockDim.x * kChunk) {
            A s[kChunk], w[kChunk];
            load_chunk(student_row, base, end, s);
            load_chunk(weak_row, base, end, w);
            f(base, s, w);
        }
    }

    __device__ __forceinline__ GradientRow gradient(void* data, DType dtype, int64_t index) const {
        return gradient_row(data, kType != kAnyType ? DType(kType) : dtype, index, classes, before);
    }
};

} // namespace cuda
} // namespace fused_kd

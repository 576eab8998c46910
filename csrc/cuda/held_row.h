// A row of student and weak logits in the registers of its block.
#pragma once

#include "memory.h"

namespace fused_kd {
namespace cuda {

// Thread t holds the chunks t, t + threads, ... of four classes each.
template <int kThreads, int kItems>
struct HeldRow {
    static constexpr int kChunks = kItems / kChunk, before = 0;
    int classes;
    float s[kChunks][kChunk], w[kChunks][kChunk];

    __device__ __forceinline__ HeldRow(const UskdCall& call, int64_t index) : classes(call.classes) {
        const RowView student = row_view(call.student, index), weak = row_view(call.weak, index);
        RawChunk raw_s[kChunks], raw_w[kChunks];
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            raw_s[i] = load_raw(student, base(i), classes);
            raw_w[i] = load_raw(weak, base(i), classes);
        }
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            convert(raw_s[i], student, base(i), call.classes, s[i]);
            convert(raw_w[i], weak, base(i), call.classes, w[i]);
        }
    }

    template <class F>
    __device__ __forceinline__ void visit(F&& f) const {
#pragma unroll
        for (int i = 0; i < kChunks; ++i)
            f(base(i), s[i], w[i]);
    }

    __device__ __forceinline__ GradientRow gradient(void* data, DType dtype, int64_t index) const {
        return gradient_row(data, dtype, index, classes);
    }

  private:
    __device__ static int base(int i) { return (i * kThreads + int(threadIdx.x)) * kChunk; }
};

} // namespace cuda
} // namespace fused_kd

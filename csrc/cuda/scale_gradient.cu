// The backward pass: the stored gradient times the incoming gradient and the stored norm. A 0 stays 0.
#include "memory.h"

namespace fused_kd {
namespace cuda {
namespace {

static_assert(kScalingPiece % (kScalingThreads * kChunk) == 0, "whole chunks for each thread");

template <class A>
__global__ void __launch_bounds__(kScalingThreads) scale_rows(ScaleCall call) {
    const unsigned pieces = gridDim.x / unsigned(call.rows);
    const int64_t row = blockIdx.x / pieces, start = int64_t(blockIdx.x % pieces) * kScalingPiece;
    const double grad_output =
        load_one<double>(call.grad_output, call.grad_output_dtype, row * call.grad_output_stride);
    const A factor = A(grad_output * load_one<double>(call.norm, call.norm_dtype, 0));
    // GradScaler and gradient accumulation need this pass; a plain backward() returns here without touching the
    // gradient.
    if (factor == A(1) && call.out == call.gradient) return;
    const char* const from = static_cast<const char*>(call.gradient) + row * call.classes * element_size(call.dtype);
    const RowView in = {from, 1, call.dtype, aligned_for_chunks(from, call.dtype)};
    const GradientRow out = gradient_row(call.out, call.dtype, row, call.classes);
    // Relative to the piece, so that 32 bits index it.
    const int64_t offset = start * element_size(call.dtype);
    const RowView in_piece = {in.data + offset, 1, in.dtype, in.vectors};
    const GradientRow out_piece = {out.data + offset, out.dtype, out.vectors};
    const int length = int(call.classes - start < kScalingPiece ? call.classes - start : kScalingPiece);
    for (int base = threadIdx.x * kChunk; base < length; base += kScalingThreads * kChunk) {
        A x[kChunk];
        load_chunk(in_piece, base, length, x);
#pragma unroll
        for (int k = 0; k < kChunk; ++k)
            x[k] *= x[k] == A(0) ? A(0) : factor; // an infinite or NaN factor must not turn 0 into NaN
        store_chunk(out_piece, base, length, x);
    }
}

} // namespace

const char* scale_gradient(const Place& place, const ScaleCall& call) {
    if (const char* error = error_text(cudaSetDevice(place.device))) return error;
    if (call.rows == 0) return nullptr;
    ScaleCall flat = call;
    if (call.grad_output_stride == 0) { // one factor: treat as one long, aligned row
        flat.rows = 1;
        flat.classes = call.rows * call.classes;
    }
    return launch(call.dtype == kFloat64 ? scale_rows<double> : scale_rows<float>,
                  flat.rows * scaling_pieces(flat.classes), kScalingThreads, 0, place.stream, flat);
}

} // namespace cuda
} // namespace fused_kd

// The CUDA kernels as the bindings see them: plain structures and functions, no CUDA headers.
//
// Every function runs on the given stream, of the given device, allocates nothing and does not wait, so that it may be
// captured into a graph. It returns null, or what CUDA said was wrong.
#pragma once

#include "../cpu/kernels.h"

namespace fused_kd {
namespace cuda {

struct Place {
    int device;
    uintptr_t stream;
};

struct UskdCall {
    Matrix student, weak;
    Matrix target;                          // class indices (kInt64), or probabilities
    void *student_gradient, *weak_gradient; // contiguous, each of its logits' dtype; null when not wanted
    int64_t rows;
    int classes;
    HyperParameters hyper;
    int rank; // Rank of row_math.h
    bool square;
    int64_t ignore_index;
    Reduction reduction;
    double student_scale, weak_scale; // powers of two
    const double* batch_sums;
    const double* factors; // (3, rows) of parts and both gradients, 0 of a row that does not count; null for 1
    DType accumulate;
    void *loss, *parts, *norms[2]; // of the accumulating dtype
    void* workspace;
};

struct BatchSumsCall {
    Matrix student, target;
    int64_t rows;
    int classes;
    bool square;
    int64_t ignore_index;
    DType accumulate;
    double* sums;      // 3
    double* workspace; // 2 per row
};

struct ScaleCall {
    const void* gradient;
    void* out; // may be the gradient
    DType dtype;
    const void* grad_output; // per row, at a stride that may be 0
    DType grad_output_dtype;
    int64_t grad_output_stride;
    const void* norm;
    DType norm_dtype;
    int64_t rows, classes;
};

// Of UskdCall.workspace; asks the device for what a sort needs. Returns null, or what was wrong.
const char* uskd_workspace_bytes(int device, int64_t rows, int64_t classes, DType accumulate, int64_t& bytes);

const char* uskd(const Place& place, const UskdCall& call);
const char* uskd_batch_sums(const Place& place, const BatchSumsCall& call);
const char* scale_gradient(const Place& place, const ScaleCall& call);

// Null if the kernels can run on the current device; else why not, such as a driver older than this CUDA.
const char* problem();

} // namespace cuda
} // namespace fused_kd

// The interface of the CUDA kernels: plain structures and functions, no CUDA headers.
//
// Every function runs on the given stream and device, allocates nothing and does not wait, so a CUDA graph can capture
// it. It returns null or an error message.
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
    Matrix target;                          // class indices (kInt64) or probabilities
    void *student_gradient, *weak_gradient; // contiguous, with the dtype of their logits; null if not wanted
    int64_t rows;
    int classes;
    HyperParameters hyper;
    int rank; // Rank of row_math.h
    bool square;
    int64_t ignore_index;
    Reduction reduction;
    double student_scale, weak_scale; // powers of two
    const double* batch_sums;
    const double* factors; // (3, rows): of the parts and both gradients, 0 for a row that does not count; null means 1
    DType accumulate;
    void *loss, *parts, *norms[2]; // of dtype `accumulate`
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
    const void* grad_output; // one per row, or one for all with stride 0
    DType grad_output_dtype;
    int64_t grad_output_stride;
    const void* norm;
    DType norm_dtype;
    int64_t rows, classes;
};

// The size of UskdCall.workspace; asks CUB for the size that a sort needs. Returns null or an error message.
const char* uskd_workspace_bytes(int device, int64_t rows, int64_t classes, DType accumulate, int64_t& bytes);

const char* uskd(const Place& place, const UskdCall& call);
const char* uskd_batch_sums(const Place& place, const BatchSumsCall& call);
const char* scale_gradient(const Place& place, const ScaleCall& call);

// Return null if the kernels can run on the current device, else the reason, such as a driver older than this CUDA.
const char* problem();

} // namespace cuda
} // namespace fused_kd

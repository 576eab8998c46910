// What every CUDA source includes: the runtime, the shared formulas, and launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../row_math.h"
#include "arrangements.h"
#include "launch.h"

namespace fused_kd {
namespace cuda {

using common::Rank;
using common::SplitSoftmax;
using common::UskdKey;
using common::UskdParams;
using common::UskdRow;
using common::UskdStats;

// Null, or what CUDA said.
inline const char* said(cudaError_t error) {
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// As kernel<<<blocks, threads, shared, stream>>>(arguments).
template <class Arguments>
const char* launch(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared, uintptr_t stream,
                   Arguments arguments) {
    if (blocks > kMostBlocks) return "more rows than one launch has blocks";
    void* pointers[] = {&arguments};
    return said(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), pointers, shared,
                                 reinterpret_cast<cudaStream_t>(stream)));
}

} // namespace cuda
} // namespace fused_kd

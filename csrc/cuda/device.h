// What every CUDA source includes: the runtime, the shared formulas, and launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../common/row_math.h"
#include "../common/scales.h"
#include "arrangements.h"
#include "launch.h"

namespace fused_kd {
namespace cuda {

using common::element_size;
using common::Rank;
using common::SplitSoftmax;
using common::stored_norm;
using common::stored_scale;
using common::UskdKey;
using common::UskdParams;
using common::UskdRow;
using common::UskdStats;

// Null, or what CUDA said. CUDA also keeps a failed call's error as the thread's last, where CUB would find it at the
// next sort and take it for its own: told here, it is taken away. An error that has ruined the context stays, whoever
// takes it. The package has a runtime of its own (CUDA::cudart_static, whose symbols are hidden), and with it a last
// error of its own: none of PyTorch's is lost here, and none is reported as ours.
inline const char* said(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    return cudaGetErrorString(error);
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

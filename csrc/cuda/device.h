// Included by every CUDA source: the runtime, the shared formulas, and launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../common/row_math.h"
#include "../common/scales.h"
#include "arrangements.h"
#include "launch.h"

// The shared memory whose size a launch chooses; a stand-in for CUDA's headers defines its own.
#ifndef FKD_DYNAMIC_SHARED
#define FKD_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

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

// Return null or CUDA's error message. cudaGetLastError clears the error of a failed call: otherwise CUB would find it
// at the next sort and report it as its own. An error that has corrupted the context remains in any case. The package
// links its own runtime (CUDA::cudart_static, with hidden symbols), which has its own last error. So this clears no
// error of PyTorch's, and reports none as ours.
inline const char* error_text(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    return cudaGetErrorString(error);
}

// The shared memory that a block of this device may ask for.
inline const char* most_shared(int device, size_t& bytes) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    bytes = size_t(value);
    return error_text(error);
}

// kernel<<<blocks, threads, shared, stream>>>(arguments)
template <class Arguments>
const char* launch(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared, uintptr_t stream,
                   Arguments arguments) {
    if (blocks > kMostBlocks) return "more rows than one launch has blocks";
    void* pointers[] = {&arguments};
    return error_text(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), pointers, shared,
                                       reinterpret_cast<cudaStream_t>(stream)));
}

} // namespace cuda
} // namespace fused_kd

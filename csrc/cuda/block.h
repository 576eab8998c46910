// Reductions over a block of threads. Every thread gets the result. The order of additions depends only on the number
// of threads, so equal inputs give equal bits.
#pragma once

#include "device.h"

namespace fused_kd {
namespace cuda {

template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int mask) {
    static_assert(sizeof(T) % sizeof(int) == 0, "shuffled by words");
    int words[sizeof(T) / sizeof(int)];
    memcpy(words, &x, sizeof x);
#pragma unroll
    for (int& word : words)
        word = __shfl_xor_sync(0xffffffffu, word, mask);
    memcpy(&x, words, sizeof x);
    return x;
}

// Shared memory for the results of the warps.
template <class T>
struct WarpResults {
    T of[32];
};

// x.merge(y) must be commutative to the bit, so that all lanes of a butterfly get the same result. The number of warps
// must be a power of two.
template <class T>
__device__ __forceinline__ T block_reduce(T x, void* room) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1)
        x.merge(shuffle_xor(x, mask));
    const int warps = blockDim.x / 32;
    if (warps == 1) return x;
    T* const of = static_cast<WarpResults<T>*>(room)->of;
    __syncthreads(); // wait for earlier readers of the room
    if (threadIdx.x % 32 == 0) of[threadIdx.x / 32] = x;
    __syncthreads();
    x = of[threadIdx.x % warps];
    for (int mask = warps / 2; mask > 0; mask >>= 1)
        x.merge(shuffle_xor(x, mask));
    return x;
}

struct Count {
    int n;
    __device__ void merge(const Count& o) { n += o.n; }
};

} // namespace cuda
} // namespace fused_kd

// Ranks the classes of a short row with one block: CUB's radix sort, eight passes of four bits, with the keys and the
// classes in registers.
#pragma once

#include <cub/block/block_radix_sort.cuh>

#include "device.h"

namespace fused_kd {
namespace cuda {

// As LongRanking of cuda/rank_long.h.
template <int kThreads, int kItems>
struct ShortRanking {
    using Sort = cub::BlockRadixSort<uint32_t, kThreads, kItems, uint16_t>;
    static constexpr int kCapacity = kThreads * kItems;

    struct Storage {
        union {
            typename Sort::TempStorage sort;
            uint4 key_vectors[kCapacity / 4];
            uint32_t keys[kCapacity];
            float zipf[kCapacity];
        };
    };

    static __device__ __forceinline__ int held(int) { return kCapacity; }

    // The keys change from load order to a run of consecutive classes per thread. The sort is stable, so equal keys
    // keep the order of the classes.
    template <class Put>
    static __device__ __forceinline__ void rank(Storage& shared, int, Put&& put) {
        const int first = threadIdx.x * kItems;
        uint32_t keys[kItems];
        uint16_t order[kItems];
#pragma unroll
        for (int i = 0; i < kItems; i += 4) {
            const uint4 v = shared.key_vectors[(first + i) / 4];
            keys[i] = v.x;
            keys[i + 1] = v.y;
            keys[i + 2] = v.z;
            keys[i + 3] = v.w;
        }
#pragma unroll
        for (int i = 0; i < kItems; ++i)
            order[i] = uint16_t(first + i);
        __syncthreads();
        Sort(shared.sort).Sort(keys, order);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kItems; ++i)
            put(order[i], first + i);
    }
};

} // namespace cuda
} // namespace fused_kd

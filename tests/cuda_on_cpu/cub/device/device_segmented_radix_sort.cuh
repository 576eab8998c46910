// cub::DeviceSegmentedRadixSort on a CPU: stable and ascending, between the two buffers, the old ones left as nonsense.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "cuda_runtime.h"

namespace cub {

template <class T>
struct DoubleBuffer {
    T* d_buffers[2];
    int selector = 0;
    DoubleBuffer(T* current, T* alternate) : d_buffers{current, alternate} {}
    T* Current() { return d_buffers[selector]; }
    T* Alternate() { return d_buffers[selector ^ 1]; }
};

struct DeviceSegmentedRadixSort {
    template <class Key, class Value, class Starts>
    static cudaError_t SortPairs(void* temporary, size_t& bytes, DoubleBuffer<Key>& keys, DoubleBuffer<Value>& values,
                                 int items, int segments, Starts begin, Starts end, int, int, cudaStream_t) {
        // Whoever left it: CUB looks at the last error, not at what its launches return.
        if (const cudaError_t error = cudaGetLastError()) return error;
        if (!temporary) {
            bytes = 1000;
            return cudaSuccess;
        }
        if (bytes < 1000) return cudaErrorInvalidValue;
        memset(temporary, 0xa5, bytes);
        std::vector<int> order;
        for (int segment = 0; segment < segments; ++segment) {
            const int first = begin[segment], last = end[segment];
            order.resize(size_t(last - first));
            std::iota(order.begin(), order.end(), first);
            std::stable_sort(order.begin(), order.end(),
                             [&](int a, int b) { return keys.Current()[a] < keys.Current()[b]; });
            for (int i = first; i < last; ++i) {
                keys.Alternate()[i] = keys.Current()[order[size_t(i - first)]];
                values.Alternate()[i] = values.Current()[order[size_t(i - first)]];
            }
        }
        memset(keys.Current(), 0xa5, sizeof(Key) * size_t(items));
        memset(values.Current(), 0xa5, sizeof(Value) * size_t(items));
        keys.selector ^= 1;
        values.selector ^= 1;
        return cudaSuccess;
    }
};

} // namespace cub

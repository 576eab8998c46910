// cub::BlockRadixSort on a CPU: stable and ascending. Like CUB's it writes over its temporary storage, thread by
// thread, so that whoever reads something there without a barrier reads nonsense.
#pragma once

#include <algorithm>
#include <utility>

#include "cuda_runtime.h"

namespace cub {

template <class Key, int kThreads, int kItems, class Value>
class BlockRadixSort {
  public:
    struct TempStorage {
        Key words[kThreads * kItems];
    };
    explicit BlockRadixSort(TempStorage& storage) : storage_(storage) {}

    void Sort(Key (&keys)[kItems], Value (&values)[kItems]) {
        static std::pair<Key, Value> pairs[kThreads * kItems];
        const int first = int(threadIdx.x) * kItems;
        for (int i = 0; i < kItems; ++i)
            pairs[first + i] = {keys[i], values[i]};
        memset(&storage_, 0xa5, sizeof storage_);
        __syncthreads();
        if (threadIdx.x == 0)
            std::stable_sort(pairs, pairs + kThreads * kItems,
                             [](const auto& a, const auto& b) { return a.first < b.first; });
        __syncthreads();
        for (int i = 0; i < kItems; ++i) {
            keys[i] = pairs[first + i].first;
            values[i] = pairs[first + i].second;
        }
        memset(&storage_, 0xa5, sizeof storage_);
    }

  private:
    TempStorage& storage_;
};

} // namespace cub

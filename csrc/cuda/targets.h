// The target classes of a row, found by its block, and the number of rows that count.
#pragma once

#include "block.h"
#include "memory.h"

namespace fused_kd {
namespace cuda {

enum Standing { kCounts = 0, kIgnored = 1, kInvalid = 2 }; // kInvalid: an index out of range

template <class A>
struct Targets {
    int count, standing;
    int at[2]; // -1 if absent; the largest label first
    A label[2];
    A poison; // NaN if a probability is not finite, else 0
};

// The two largest probabilities, on ties the lower index first, and the smallest. Comparisons ignore NaN.
template <class A>
struct LargestTwo {
    A value[2];
    int at[2];
    A smallest, poison;

    __device__ void offer(A x, int i) {
        if (before(x, i, 0)) {
            value[1] = value[0];
            at[1] = at[0];
            value[0] = x;
            at[0] = i;
        } else if (before(x, i, 1)) {
            value[1] = x;
            at[1] = i;
        }
    }
    __device__ void merge(const LargestTwo& o) {
        offer(o.value[0], o.at[0]);
        offer(o.value[1], o.at[1]);
        smallest = fmin(smallest, o.smallest);
        poison += o.poison;
    }

  private:
    __device__ bool before(A x, int i, int k) const {
        return i >= 0 && (x > value[k] || (x == value[k] && (i < at[k] || at[k] < 0)));
    }
};

// Return the class index, or up to two largest probabilities that exceed the smallest of the row, to every thread.
template <class A>
__device__ Targets<A> find_targets(const Matrix& target, int64_t row, int classes, int64_t ignore_index, void* room) {
    if (target.dtype == kInt64) {
        const int64_t y = static_cast<const int64_t*>(target.data)[row * target.row_stride];
        if (y == ignore_index) return {0, kIgnored, {-1, -1}, {A(0), A(0)}, A(0)};
        if (y < 0 || y >= classes) return {0, kInvalid, {-1, -1}, {A(0), A(0)}, A(0)};
        return {1, kCounts, {int(y), -1}, {A(1), A(0)}, A(0)};
    }
    const RowView labels = row_view(target, row);
    LargestTwo<A> found = {{-A(INFINITY), -A(INFINITY)}, {-1, -1}, A(INFINITY), A(0)};
    for (int base = threadIdx.x * kChunk; base < classes; base += blockDim.x * kChunk) {
        A v[kChunk];
        load_chunk(labels, base, classes, v);
#pragma unroll
        for (int k = 0; k < kChunk; ++k)
            if (base + k < classes) {
                found.offer(v[k], base + k);
                found.smallest = fmin(found.smallest, v[k]);
                found.poison += A(0) * v[k];
            }
    }
    found = block_reduce(found, room);
    Targets<A> targets = {0, kCounts, {-1, -1}, {A(0), A(0)}, found.poison};
    for (int k = 0; k < 2; ++k)
        if (found.value[k] > found.smallest && targets.count == k) {
            targets.count = k + 1;
            targets.at[k] = found.at[k];
            targets.label[k] = found.value[k];
        }
    return targets;
}

// Count the rows with a class index other than ignore_index, with one block.
__device__ inline int64_t count_targets(const Matrix& target, int64_t rows, int64_t ignore_index, void* room) {
    Count count = {0};
    const int64_t* const indices = static_cast<const int64_t*>(target.data);
    for (int64_t row = threadIdx.x; row < rows; row += blockDim.x)
        count.n += indices[row * target.row_stride] != ignore_index;
    return block_reduce(count, room).n;
}

} // namespace cuda
} // namespace fused_kd

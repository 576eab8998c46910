// How calls are launched on a GPU: which kernel ranks a row of so many classes, blocks and threads, and how much memory
// a call needs. Plain host code, so that it is built and tested where there is no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_kd {
namespace cuda {

// A block of `threads` ranks one row of up to threads * items classes in shared memory. With `keep` the logits stay in
// registers through the sort; without, they are read again after it, from the cache: kept, they would spill.
struct Arrangement {
    int threads, items;
    bool keep;
};

// FKD_ARRANGEMENT(threads, items, keep), in ascending capacity.
#define FKD_FOR_EACH_ARRANGEMENT(FKD_ARRANGEMENT)                                                                      \
    FKD_ARRANGEMENT(32, 4, true)                                                                                       \
    FKD_ARRANGEMENT(64, 4, true)                                                                                       \
    FKD_ARRANGEMENT(128, 4, true)                                                                                      \
    FKD_ARRANGEMENT(128, 8, true)                                                                                      \
    FKD_ARRANGEMENT(256, 8, true)                                                                                      \
    FKD_ARRANGEMENT(512, 8, true)                                                                                      \
    FKD_ARRANGEMENT(512, 16, false)

#define FKD_ROW(threads, items, keep) {threads, items, keep},
constexpr Arrangement kArrangements[] = {FKD_FOR_EACH_ARRANGEMENT(FKD_ROW)};
#undef FKD_ROW
constexpr int kArrangementCount = sizeof(kArrangements) / sizeof(kArrangements[0]);

constexpr int capacity(const Arrangement& a) {
    return a.threads * a.items;
}

// An upper bound of an arrangement's shared memory; cuda/uskd_in_block.cu asserts it. The sort exchanges 32-bit keys
// with a word of padding in 32, and before that counts 16 digits per thread in 16 bits each, and scans them; a kilobyte
// and a half holds the rest.
constexpr int shared_bound(const Arrangement& a) {
    const int exchange = capacity(a) * 4 + capacity(a) / 8, count = a.threads * 40;
    return (exchange > count ? exchange : count) + 1536;
}

// The index of the arrangement for a row, or -1 where the row is sorted in global memory (cuda/uskd_sorted.cu). Double
// precision always is: its keys have 64 bits, and it is for checking, not for speed.
constexpr int arrangement_for(int64_t classes, bool double_precision) {
    for (int i = 0; !double_precision && i < kArrangementCount; ++i)
        if (classes <= capacity(kArrangements[i])) return i;
    return -1;
}

// Rows sorted in global memory go in passes of so many classes in all, so that the sort's buffers (16 bytes a class, 24
// in double precision) stay a few hundred megabytes however large the batch. The sort gives each row a block, so a pass
// should fill the GPU: these are 768 rows of 21841 and 130 of 128256. Tests define fewer.
#ifndef FKD_SORTED_AT_ONCE
#define FKD_SORTED_AT_ONCE (1 << 24)
#endif

constexpr int64_t rows_per_pass(int64_t rows, int64_t classes) {
    const int64_t most = FKD_SORTED_AT_ONCE / classes;
    return most < 1 ? 1 : rows < most ? rows : most;
}

// Up to so many rows each block counts the targets that do not count itself, while its logits are on their way; beyond,
// a launch before does.
constexpr int64_t kRowsCountedByEach = 2048;

// Threads of a block that streams a row; more would leave each too few registers.
constexpr int kMostStreamingThreads = 512;
constexpr int streaming_threads(int64_t classes) {
    return classes <= 512 ? 64 : classes <= 4096 ? 256 : kMostStreamingThreads;
}

// So that 32 bits index a row's classes and where its last thread's next four would be.
constexpr int64_t kMostClasses = (int64_t(1) << 31) - 1 - 4 * kMostStreamingThreads;

// In the first dimension of a grid.
constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;

// The parts of all rows are summed by one block, in an order that their number alone decides, or handed through by as
// many as they fill.
constexpr int kReducingThreads = 1024;
constexpr int kMostReducingBlocks = 1024;
constexpr int reducing_blocks(int64_t rows, bool per_row) {
    const int64_t blocks = (rows + kReducingThreads - 1) / kReducingThreads;
    return !per_row || blocks < 1 ? 1 : int(blocks < kMostReducingBlocks ? blocks : kMostReducingBlocks);
}

// Of the block that sums the targets' probabilities: a batch that is small makes it wait for fewer warps.
constexpr int summing_threads(int64_t rows) {
    return rows > 128 ? kReducingThreads : 128;
}

// A call's workspace begins with the number of rows that count, then has four parts of each row, then what a sort in
// global memory needs; each from a multiple of this many bytes on.
constexpr size_t kPlace = 256;
constexpr size_t parts_bytes(int64_t rows, int element_bytes) {
    return (size_t(rows) * 4 * size_t(element_bytes) + kPlace - 1) / kPlace * kPlace;
}

// Scaling a gradient: as large a piece of a row as a block takes, and the blocks of all.
constexpr int kScalingThreads = 256;
constexpr int64_t kScalingPiece = int64_t(kScalingThreads) * 4 * 8; // eight chunks of four a thread
constexpr int64_t scaling_pieces(int64_t classes) {
    return (classes + kScalingPiece - 1) / kScalingPiece;
}

} // namespace cuda
} // namespace fused_kd

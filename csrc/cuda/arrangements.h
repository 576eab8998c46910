// Launch parameters on a GPU: which kernel ranks a row of a number of classes, blocks, threads, and memory. This is
// plain host code, so builds without CUDA test it too.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_kd {
namespace cuda {

// A block of `threads` threads ranks one row of up to threads * items classes in shared memory. With `keep`, the logits
// stay in registers. Otherwise they would spill, and each visit reads them again, from a cache.
struct Arrangement {
    int threads, items;
    bool keep;
};

// FKD_ARRANGEMENT(threads, items), in ascending capacity: short rows are kept, long ones are not.
#define FKD_FOR_EACH_SHORT(FKD_ARRANGEMENT)                                                                            \
    FKD_ARRANGEMENT(32, 4)                                                                                             \
    FKD_ARRANGEMENT(64, 4)                                                                                             \
    FKD_ARRANGEMENT(128, 4)                                                                                            \
    FKD_ARRANGEMENT(128, 8)                                                                                            \
    FKD_ARRANGEMENT(256, 8)                                                                                            \
    FKD_ARRANGEMENT(512, 8)
#define FKD_FOR_EACH_LONG(FKD_ARRANGEMENT)                                                                             \
    FKD_ARRANGEMENT(512, 24)                                                                                           \
    FKD_ARRANGEMENT(1024, 24)

#define FKD_KEPT(threads, items) {threads, items, true},
#define FKD_STREAMED(threads, items) {threads, items, false},
constexpr Arrangement kArrangements[] = {FKD_FOR_EACH_SHORT(FKD_KEPT) FKD_FOR_EACH_LONG(FKD_STREAMED)};
#undef FKD_KEPT
#undef FKD_STREAMED
constexpr int kArrangementCount = sizeof(kArrangements) / sizeof(kArrangements[0]), kShortCount = 6;
static_assert(kArrangements[kShortCount - 1].keep && !kArrangements[kShortCount].keep, "the first long one");

constexpr int capacity(const Arrangement& a) {
    return a.threads * a.items;
}

// Blocks at once on a multiprocessor, which share its 65536 registers: a thread that keeps its row has 128, others 64.
constexpr int blocks_at_once(int threads, bool keep) {
    return (keep ? 512 : 1024) / threads;
}

// An upper bound of the shared memory of an arrangement, asserted where it is launched. CUB's sort exchanges 32-bit
// keys, with one word of padding per 32 words; before that, it counts and scans 16 digits per thread, of 16 bits each.
// The sort of long rows has a key and an index per class, and 256 counts of 16 bits per warp. 1.5 KB hold everything
// else.
constexpr size_t shared_bound(const Arrangement& a) {
    const int exchange = capacity(a) * 4 + capacity(a) / 8, count = a.threads * 40;
    const int sort = !a.keep ? capacity(a) * 6 + a.threads / 32 * 512 : exchange > count ? exchange : count;
    return size_t(sort) + 1536;
}

// What a block gets without asking, and what every GPU since compute capability 8.0 gives to one that asks. Some give
// more: 163 KB or 227.
constexpr size_t kSharedByDefault = 48 * 1024, kSharedEverywhere = 99 * 1024;

// The index of the arrangement for a row on a GPU that gives a block so much shared memory, or -1 to sort in global
// memory (cuda/uskd_sorted.cu). Double precision always sorts there: it has 64-bit keys, and serves to check, not to be
// fast.
constexpr int arrangement_for(int64_t classes, bool double_precision, size_t shared) {
    for (int i = 0; !double_precision && i < kArrangementCount; ++i)
        if (classes <= capacity(kArrangements[i])) return shared_bound(kArrangements[i]) <= shared ? i : -1;
    return -1;
}

// Rows sorted in global memory are processed in passes of this many classes in total. So the sort's buffers (16 bytes
// per class, 24 in double precision) stay within a few hundred megabytes for any batch. The sort uses one block per
// row, and a pass should fill the GPU: this is 768 rows of 21841 classes, or 130 of 128256. Tests define a smaller
// number.
#ifndef FKD_SORTED_AT_ONCE
#define FKD_SORTED_AT_ONCE (1 << 24)
#endif

constexpr int64_t rows_per_pass(int64_t rows, int64_t classes) {
    const int64_t most = FKD_SORTED_AT_ONCE / classes;
    return most < 1 ? 1 : rows < most ? rows : most;
}

// Up to this many rows, each block counts the rows that count, while its logits load. Beyond, a separate launch counts.
constexpr int64_t kRowsCountedByEach = 2048;

// Threads of a block that streams a row; with more, each has too few registers.
constexpr int kMostStreamingThreads = 512;
constexpr int streaming_threads(int64_t classes) {
    return classes <= 512 ? 64 : classes <= 4096 ? 256 : kMostStreamingThreads;
}

// So that 32 bits index all classes of a row, and the next four after those of its last thread.
constexpr int64_t kMostClasses = (int64_t(1) << 31) - 1 - 4 * kMostStreamingThreads;

// The limit of a grid's first dimension.
constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;

// One block sums the parts of all rows, in an order that depends only on the number of rows. Without a reduction, as
// many blocks as the rows fill copy the parts.
constexpr int kReducingThreads = 1024;
constexpr int kMostReducingBlocks = 1024;
constexpr int reducing_blocks(int64_t rows, bool per_row) {
    const int64_t blocks = (rows + kReducingThreads - 1) / kReducingThreads;
    return !per_row || blocks < 1 ? 1 : int(blocks < kMostReducingBlocks ? blocks : kMostReducingBlocks);
}

// Threads of the block that sums the targets' probabilities: a small batch then waits for fewer warps.
constexpr int summing_threads(int64_t rows) {
    return rows > 128 ? kReducingThreads : 128;
}

// The workspace of a call has the number of rows that count, four parts per row, and what a sort in global memory
// needs. Each starts at a multiple of this many bytes.
constexpr size_t kPlace = 256;
constexpr size_t parts_bytes(int64_t rows, int element_bytes) {
    return (size_t(rows) * 4 * size_t(element_bytes) + kPlace - 1) / kPlace * kPlace;
}

// Scaling a gradient: the piece of a row that one block scales, and the number of pieces.
constexpr int kScalingThreads = 256;
constexpr int64_t kScalingPiece = int64_t(kScalingThreads) * 4 * 8; // eight chunks of four per thread
constexpr int64_t scaling_pieces(int64_t classes) {
    return (classes + kScalingPiece - 1) / kScalingPiece;
}

} // namespace cuda
} // namespace fused_kd

// USKD for rows too large for a block, and for double precision: a kernel for statistics and keys, CUB's segmented
// radix sort in global memory, and a kernel that combines. The sort moves some hundred bytes per class, ten times as
// much as all else. So the other kernels are simple, and read their rows three times before it and twice after.
#include <cub/device/device_segmented_radix_sort.cuh>

#include "../common/key_bits.h"
#include "streamed_row.h"
#include "uskd_launch.h"

namespace fused_kd {
namespace cuda {
namespace {

using common::descending_bits;
using common::KeyBits;

// Blocks per multiprocessor. A thread then has 64 registers, or 128 in double precision, which needs more.
template <class A>
constexpr int kBlocksAtOnce = sizeof(A) == sizeof(float) ? 2 : 1;

// Writes the keys and class indices of one row per block, and its state for the kernel after the sort. A row without a
// ranking leaves the buffers unwritten; they are sorted but not read.
template <class A, int kType>
__global__ void __launch_bounds__(kMostStreamingThreads, kBlocksAtOnce<A>) write_keys(RowsArguments args) {
    __shared__ BlockState<A> state;
    const UskdCall& call = args.call;
    const int64_t index = args.first + blockIdx.x;
    RowState<A>& stored = static_cast<RowState<A>*>(args.states)[blockIdx.x];
    const Targets<A> targets = weighted_targets<A>(call, index, state.room);
    if (targets.standing != kCounts) {
        if (threadIdx.x == 0) stored.targets = targets;
        return;
    }
    const StreamedRow<A, kType> row(call.student, call.weak, index, call.classes);
    row_statistics<A>(call, index, row, targets, state);
    if (threadIdx.x == 0) stored = state.row;
    if (state.row.is_nan) return;
    const int64_t start = int64_t(blockIdx.x) * call.classes;
    auto* const keys = static_cast<KeyBits<A>*>(args.keys) + start;
    uint32_t* const order = args.order + start;
    row_keys<A>(row, state.row, call.classes, [&](int j, A key) {
        keys[j] = descending_bits(key);
        order[j] = uint32_t(j);
    });
}

// args.order has the classes by rank; args.spare receives the Zipf weights.
template <class A, int kType>
__global__ void __launch_bounds__(kMostStreamingThreads, kBlocksAtOnce<A>) combine(RowsArguments args) {
    __shared__ BlockState<A> state;
    const UskdCall& call = args.call;
    const int64_t index = args.first + blockIdx.x, start = int64_t(blockIdx.x) * call.classes;
    if (threadIdx.x == 0) state.row = static_cast<const RowState<A>*>(args.states)[blockIdx.x];
    __syncthreads();
    const int standing = state.row.targets.standing;
    if (standing != kCounts) return constant_row(args, index, standing == kIgnored ? A(0) : A(NAN));
    if (state.row.is_nan) return constant_row(args, index, A(NAN));
    const int64_t divisor = divisor_of(args, state.room);
    if (threadIdx.x == 0) state.divisor = divisor;
    A* const zipf = static_cast<A*>(args.spare) + start;
    const uint32_t* const order = args.order + start;
    for (int r = threadIdx.x; r < call.classes; r += blockDim.x)
        zipf[order[r]] = A(1) / A(r + 1);
    __syncthreads(); // also makes the block's global writes visible to all of it
    const StreamedRow<A, kType> row(call.student, call.weak, index, call.classes);
    finish_row<A>(args, index, row, zipf, state);
}

// The start of each row's classes, as an iterator for CUB.
struct RowStarts {
    int classes, first;
    __host__ __device__ int operator[](int64_t row) const { return int(first + row) * classes; }
};

template <class Key>
cudaError_t sort_rows(void* temporary, size_t& bytes, cub::DoubleBuffer<Key>& keys, cub::DoubleBuffer<uint32_t>& order,
                      int64_t rows, int classes, uintptr_t stream) {
    return cub::DeviceSegmentedRadixSort::SortPairs(temporary, bytes, keys, order, int(rows * classes), int(rows),
                                                    RowStarts{classes, 0}, RowStarts{classes, 1}, 0,
                                                    int(8 * sizeof(Key)), reinterpret_cast<cudaStream_t>(stream));
}

// The workspace of a pass: row states, two buffers each of keys and orders, and CUB's temporary storage.
template <class A>
struct Buffers {
    using Key = KeyBits<A>;
    char *states, *keys[2], *order[2], *temporary;
    size_t temporary_bytes = 0, total = 0;

    const char* place(char* base, int64_t rows, int classes) {
        cub::DoubleBuffer<Key> no_keys(nullptr, nullptr);
        cub::DoubleBuffer<uint32_t> no_order(nullptr, nullptr);
        if (const char* error =
                error_text(sort_rows<Key>(nullptr, temporary_bytes, no_keys, no_order, rows, classes, 0)))
            return error;
        const size_t elements = size_t(rows) * size_t(classes);
        char* at = base;
        states = take(at, size_t(rows) * sizeof(RowState<A>));
        for (int i = 0; i < 2; ++i) {
            keys[i] = take(at, elements * sizeof(Key));
            order[i] = take(at, elements * sizeof(uint32_t));
        }
        temporary = take(at, temporary_bytes);
        total = size_t(at - base);
        return nullptr;
    }

  private:
    static char* take(char*& at, size_t bytes) {
        char* const here = at;
        at += (bytes + kPlace - 1) / kPlace * kPlace;
        return here;
    }
};

template <class A, int kType>
const char* rank_typed(const Place& place, RowsArguments args) {
    using Key = KeyBits<A>;
    const int classes = args.call.classes;
    const int64_t rows = args.call.rows, per_pass = rows_per_pass(rows, classes);
    const int threads = streaming_threads(classes);
    Buffers<A> buffers;
    if (const char* error = buffers.place(static_cast<char*>(args.sorting), per_pass, classes)) return error;
    args.states = buffers.states;
    for (args.first = 0; args.first < rows; args.first += per_pass) {
        args.rows = rows - args.first < per_pass ? rows - args.first : per_pass;
        cub::DoubleBuffer<Key> keys(reinterpret_cast<Key*>(buffers.keys[0]), reinterpret_cast<Key*>(buffers.keys[1]));
        cub::DoubleBuffer<uint32_t> order(reinterpret_cast<uint32_t*>(buffers.order[0]),
                                          reinterpret_cast<uint32_t*>(buffers.order[1]));
        args.keys = keys.Current();
        args.order = order.Current();
        if (const char* error = launch(write_keys<A, kType>, args.rows, threads, 0, place.stream, args)) return error;
        size_t bytes = buffers.temporary_bytes;
        if (const char* error =
                error_text(sort_rows<Key>(buffers.temporary, bytes, keys, order, args.rows, classes, place.stream)))
            return error;
        args.order = order.Current();
        args.spare = keys.Alternate();
        if (const char* error = launch(combine<A, kType>, args.rows, threads, 0, place.stream, args)) return error;
    }
    return nullptr;
}

} // namespace

const char* rank_rows_sorted(const Place& place, const RowsArguments& args) {
    if (args.call.accumulate == kFloat64) return rank_typed<double, kAnyType>(place, args);
    return with_type(type_of(args.call.student, args.call.weak),
                     [&](auto type) { return rank_typed<float, decltype(type)::value>(place, args); });
}

const char* sorted_workspace_bytes(int64_t rows, int classes, DType accumulate, int64_t& bytes) {
    const int64_t per_pass = rows_per_pass(rows, classes);
    Buffers<float> single;
    Buffers<double> twice;
    const bool is_double = accumulate == kFloat64;
    const char* error = is_double ? twice.place(nullptr, per_pass, classes) : single.place(nullptr, per_pass, classes);
    bytes = int64_t(is_double ? twice.total : single.total);
    return error;
}

} // namespace cuda
} // namespace fused_kd

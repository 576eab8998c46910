// USKD with a row per block: statistics, keys, a radix sort in shared memory, Zipf weights, losses and both gradients
// in one launch. cuda/arrangements.h assigns numbers of classes to blocks.
#include <cub/block/block_radix_sort.cuh>

#include "../common/key_bits.h"
#include "uskd_launch.h"
#include "uskd_row.h"

namespace fused_kd {
namespace cuda {
namespace {

// A row in registers: thread t holds the chunks t, t + threads, ... of four classes each.
template <int kThreads, int kItems>
struct HeldRow {
    static constexpr int kChunks = kItems / kChunk;
    float s[kChunks][kChunk], w[kChunks][kChunk];

    __device__ __forceinline__ void load(const UskdCall& call, int64_t index) {
        const RowView student = row_view(call.student, index), weak = row_view(call.weak, index);
        RawChunk raw_s[kChunks], raw_w[kChunks];
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            raw_s[i] = load_raw(student, base(i), call.classes);
            raw_w[i] = load_raw(weak, base(i), call.classes);
        }
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            convert(raw_s[i], student, base(i), call.classes, s[i]);
            convert(raw_w[i], weak, base(i), call.classes, w[i]);
        }
    }

    template <class F>
    __device__ __forceinline__ void visit(F&& f) const {
#pragma unroll
        for (int i = 0; i < kChunks; ++i)
            f(base(i), s[i], w[i]);
    }

  private:
    __device__ static int base(int i) { return (i * kThreads + int(threadIdx.x)) * kChunk; }
};

// 16 bits index the classes of every arrangement. The keys, the sort's storage and the Zipf weights use the same
// memory, one after the other.
template <int kThreads, int kItems>
struct Shared {
    using Sort = cub::BlockRadixSort<uint32_t, kThreads, kItems, uint16_t>;
    union {
        typename Sort::TempStorage sort;
        uint4 key_vectors[kThreads * kItems / 4];
        uint32_t keys[kThreads * kItems];
        float zipf[kThreads * kItems];
    };
    BlockState<float> state;
};

template <int kThreads, int kItems, bool kKeep>
__global__ void __launch_bounds__(kThreads, kKeep ? 512 / kThreads : 0) rank_in_block(RowsArguments args) {
    using Shared = Shared<kThreads, kItems>;
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    BlockState<float>& state = shared.state;
    const UskdCall& call = args.call;
    const int64_t index = blockIdx.x;
    const int classes = call.classes;

    HeldRow<kThreads, kItems> row;
    row.load(call, index);
    const Targets<float> targets = weighted_targets<float>(call, index, state.room);
    if (targets.standing != kCounts) return constant_row(args, index, targets.standing == kIgnored ? 0.0f : NAN);
    const int64_t divisor = divisor_of(args, state.room);
    row_statistics<float>(call, index, row, targets, state);
    if (state.row.is_nan) return constant_row(args, index, NAN);

    // The keys change from load order to a run of consecutive classes per thread, through shared memory. The sort is
    // stable, so equal keys keep the order of the classes. Padding past the end of the row sorts last.
    row_keys<float>(row, state.row, classes, [&](int j, float key) { shared.keys[j] = common::descending_bits(key); });
    for (int j = classes + threadIdx.x; j < kThreads * kItems; j += kThreads)
        shared.keys[j] = UINT32_MAX;
    __syncthreads();
    uint32_t keys[kItems];
    uint16_t order[kItems];
#pragma unroll
    for (int i = 0; i < kItems; i += 4) {
        const uint4 v = shared.key_vectors[(threadIdx.x * kItems + i) / 4];
        keys[i] = v.x;
        keys[i + 1] = v.y;
        keys[i + 2] = v.z;
        keys[i + 3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i)
        order[i] = uint16_t(threadIdx.x * kItems + i);
    __syncthreads();
    typename Shared::Sort(shared.sort).Sort(keys, order);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i)
        shared.zipf[order[i]] = 1.0f / float(int(threadIdx.x * kItems) + i + 1);
    __syncthreads();
    if (!kKeep) row.load(call, index);
    finish_row<float>(args, index, row, shared.zipf, divisor, state);
}

template <int kThreads, int kItems, bool kKeep>
const char* launch_arrangement(const Place& place, const RowsArguments& args) {
    const auto kernel = rank_in_block<kThreads, kItems, kKeep>;
    constexpr size_t shared = sizeof(Shared<kThreads, kItems>);
    static_assert(shared <= size_t(shared_bound({kThreads, kItems, kKeep})), "see arrangements.h");
    static_assert(shared <= 48 * 1024, "more must be asked for with cudaFuncSetAttribute");
    return launch(kernel, args.rows, kThreads, shared, place.stream, args);
}

} // namespace

const char* rank_rows_in_block(const Place& place, const RowsArguments& args, int arrangement) {
    int i = 0;
#define FKD_TRY(threads, items, keep)                                                                                  \
    if (arrangement == i++) return launch_arrangement<threads, items, keep>(place, args);
    FKD_FOR_EACH_ARRANGEMENT(FKD_TRY)
#undef FKD_TRY
    return "no such arrangement";
}

} // namespace cuda
} // namespace fused_kd

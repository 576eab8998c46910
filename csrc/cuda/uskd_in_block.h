// USKD with a row per block: statistics, keys, their ranks by a sort in shared memory, Zipf weights, losses and both
// gradients in one launch. cuda/arrangements.h assigns numbers of classes to blocks.
#pragma once

#include "../common/key_bits.h"
#include "uskd_launch.h"
#include "uskd_row.h"

namespace fused_kd {
namespace cuda {

template <class Ranking>
struct InBlock {
    typename Ranking::Storage ranking;
    BlockState<float> state;
};

// Of a number in the middle of the range, without the branches of a division: the hardware's, corrected once.
__device__ __forceinline__ float reciprocal(float x) {
    const float r = __fdividef(1.0f, x);
    return fma(r, fma(-x, r, 1.0f), r);
}

// One block: the loss parts and gradients of row `index`.
template <class Ranking, class Row>
__device__ __forceinline__ void uskd_row_in_block(const RowsArguments& args, int64_t index, const Row& row,
                                                  InBlock<Ranking>& shared) {
    BlockState<float>& state = shared.state;
    const UskdCall& call = args.call;
    const int classes = call.classes;
    const Targets<float> targets = weighted_targets<float>(call, index, state.room);
    if (targets.standing != kCounts) return constant_row(args, index, targets.standing == kIgnored ? 0.0f : NAN);
    const int64_t divisor = divisor_of(args, state.room);
    if (threadIdx.x == 0) state.divisor = divisor;
    row_statistics<float>(call, index, row, targets, state);
    if (state.row.is_nan) return constant_row(args, index, NAN);

    // Equal keys keep the order of the classes, and padding past the end of the row comes last.
    uint32_t* const keys = shared.ranking.keys;
    row_keys<float>(row, state.row, classes, [&](int j, float key) { keys[j] = common::descending_bits(key); });
    for (int j = classes + threadIdx.x; j < Ranking::held(classes); j += blockDim.x)
        keys[j] = UINT32_MAX;
    __syncthreads();
    float* const zipf = shared.ranking.zipf;
    Ranking::rank(shared.ranking, classes, [&](int j, int place) { zipf[j] = reciprocal(float(place + 1)); });
    __syncthreads();
    finish_row<float>(args, index, row, zipf, state);
}

template <class Shared>
const char* launch_in_block(void (*kernel)(RowsArguments), int threads, const Place& place, const RowsArguments& args) {
    if (sizeof(Shared) > kSharedByDefault) {
        const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
        if (const char* error = error_text(cudaFuncSetAttribute(kernel, attribute, int(sizeof(Shared))))) return error;
    }
    return launch(kernel, args.rows, threads, sizeof(Shared), place.stream, args);
}

} // namespace cuda
} // namespace fused_kd

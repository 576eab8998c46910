// cub::MatchAny on a CPU.
#pragma once

#include "cuda_runtime.h"

namespace cub {

// The lanes of the warp whose labels have the same lowest bits.
template <int kBits>
uint32_t MatchAny(uint32_t label) {
    const int* const labels = emulated::exchange(int(label));
    uint32_t peers = 0;
    for (int lane = 0; lane < 32; ++lane)
        if (((uint32_t(labels[lane]) ^ label) & ((1u << kBits) - 1)) == 0) peers |= 1u << lane;
    return peers;
}

} // namespace cub

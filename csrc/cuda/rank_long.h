// Ranks the classes of a long row with one block: a stable radix sort of keys in shared memory, eight bits in each of
// four passes. In a pass each warp counts the digits of its own run of keys. A scan over the digits, and for each digit
// over the warps, tells where the first key of each warp and digit goes. Then each warp takes its keys 32 at a time, in
// order: lanes with the same digit find each other by ballots, and take the next places of their digit.
//
// A thread holds its keys and their classes in registers during a pass, so one buffer of 6 bytes a class is enough.
// That takes one and a half registers a key, where CUB's sort of a block takes three. After the last pass nothing
// moves: the caller is told the rank of each class. In a row shorter than the capacity every thread has fewer items.
#pragma once

#include <cub/util_ptx.cuh> // its MatchAny takes half of the instructions that ballots in C++ take

#include "device.h"

namespace fused_kd {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <int kThreads, int kItems>
struct LongRanking {
    static constexpr int kWarps = kThreads / 32, kCapacity = kThreads * kItems;
    static constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
    static constexpr int kWords = kDigits / 2; // of a warp's counts: two digits each, of 16 bits
    static_assert(kItems % 2 == 0 && kCapacity <= 1 << 15, "two classes share a register, and places have 16 bits");
    static_assert(kThreads >= kWords, "a thread scans a word");

    struct Storage {
        union {
            uint32_t keys[kCapacity]; // by class; the caller fills those below held(classes)
            float zipf[kCapacity];    // free for the caller while it is told the ranks
        };
        uint16_t order[kCapacity];
        uint32_t counts[kWarps][kWords];
        uint32_t totals[kWords / 32]; // of the warps that scan
    };

    // The classes that take part: of the row, and padding up to an even number of items for every thread.
    static __device__ __forceinline__ int held(int classes) {
        return (classes + 2 * kThreads - 1) / (2 * kThreads) * (2 * kThreads);
    }

    // Calls put(class, place) for each of held(classes), with its place in the ascending order of the keys, from 0. The
    // caller synchronizes the block when the keys are written, and after.
    template <class Put>
    static __device__ __forceinline__ void rank(Storage& shared, int classes, Put&& put) {
        const int items = held(classes) / kThreads;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = warp * 32 * items + lane;
        uint16_t* const places = reinterpret_cast<uint16_t*>(shared.counts[warp]);
        uint32_t keys[kItems], indices[kItems / 2];
#pragma unroll 1
        for (int shift = 0; shift < 32; shift += kDigitBits) {
            const bool is_first = shift == 0, is_last = shift == 32 - kDigitBits;
#pragma unroll
            for (int i = 0; i < kItems; i += 2) {
                if (i >= items) break;
                const int at = first + 32 * i;
                keys[i] = shared.keys[at];
                keys[i + 1] = shared.keys[at + 32];
                indices[i / 2] = is_first ? uint32_t(at) | uint32_t(at + 32) << 16
                                          : uint32_t(shared.order[at]) | uint32_t(shared.order[at + 32]) << 16;
            }
            count_digits(shared.counts[warp], keys, items, shift);
            __syncthreads(); // all keys are in registers, and all digits counted
            scan_counts(shared);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
                if (i >= items) break;
                const uint32_t digit = keys[i] >> shift & (kDigits - 1), peers = cub::MatchAny<kDigitBits>(digit);
                const int before = __popc(peers & ((1u << lane) - 1)), place = places[digit] + before;
                const int index = indices[i / 2] >> (i % 2 ? 16 : 0) & 0xffff;
                __syncwarp();
                if (before == 0) places[digit] = uint16_t(place + __popc(peers));
                __syncwarp();
                if (is_last) {
                    put(index, place);
                } else {
                    shared.keys[place] = keys[i];
                    shared.order[place] = uint16_t(index);
                }
            }
            if (!is_last) __syncthreads();
        }
    }

  private:
    static __device__ __forceinline__ void count_digits(uint32_t (&counts)[kWords], const uint32_t (&keys)[kItems],
                                                        int items, int shift) {
        for (int word = threadIdx.x % 32; word < kWords; word += 32)
            counts[word] = 0;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            if (i >= items) break;
            const uint32_t digit = keys[i] >> shift & (kDigits - 1);
            atomicAdd(&counts[digit / 2], digit % 2 ? 1u << 16 : 1u);
        }
    }

    // Each count becomes the place of the first key of that warp and digit. The halves of a word do not carry: no place
    // exceeds the capacity.
    static __device__ __forceinline__ void scan_counts(Storage& shared) {
        const int word = threadIdx.x, lane = word % 32;
        const bool scans = word < kWords;
        uint32_t both = 0, upto = 0; // the keys of the word's two digits; those of all digits up to these, in the warp
        if (scans) {
#pragma unroll
            for (int warp = 0; warp < kWarps; ++warp) {
                const uint32_t here = shared.counts[warp][word];
                shared.counts[warp][word] = both;
                both += here;
            }
            upto = (both & 0xffff) + (both >> 16);
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const uint32_t lower = __shfl_up_sync(kAllLanes, upto, step);
                if (lane >= step) upto += lower;
            }
            if (lane == 31) shared.totals[word / 32] = upto;
        }
        __syncthreads();
        if (!scans) return;
        uint32_t second = upto - (both >> 16); // the place of the second digit's first key
        for (int warp = 0; warp < word / 32; ++warp)
            second += shared.totals[warp];
        const uint32_t places = (second - (both & 0xffff)) | second << 16;
#pragma unroll 8
        for (int warp = 0; warp < kWarps; ++warp)
            shared.counts[warp][word] += places;
    }
};

} // namespace cuda
} // namespace fused_kd

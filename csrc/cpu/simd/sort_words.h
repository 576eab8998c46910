// Sorts up to 1024 words of 32 bits with Batcher's bitonic network on vectors. It is branchless, so its time depends
// only on the number of words. Included by sources compiled once per instruction set, like simd.h.
//
// Element i of V vectors is in vector i % V, lane i / V. A network compares elements whose indices differ in one bit,
// or in all bits up to one, and the lower bits far more often. In this layout the low bits select the vector, so most
// comparisons are between whole vectors, and only the last log2(lanes) stages move lanes.
#pragma once

#include "simd.h"

namespace fused_kd {
namespace FKD_ISA {

typedef uint32_t WordVec __attribute__((vector_size(kBytes)));
constexpr int kWordLanes = kBytes / 4;
constexpr int kMostWords = 1024, kMostVectors = kMostWords / kWordLanes;
// Vectors that a stage keeps in registers, half of all registers.
constexpr int kGroup = kBytes == 64 ? 16 : 8;

constexpr int smaller(int a, int b) {
    return a < b ? a : b;
}

// Lane l of the result is lane l ^ D of x.
template <int D>
FKD_INLINE WordVec xor_lanes(WordVec x) {
    WordVec from;
    for (int l = 0; l < kWordLanes; ++l)
        from[l] = uint32_t(l ^ D);
#if defined(__clang__)
    WordVec out;
    for (int l = 0; l < kWordLanes; ++l)
        out[l] = x[l ^ D];
    return out;
#else
    return __builtin_shuffle(x, from);
#endif
}

FKD_INLINE WordVec lane_numbers() {
    WordVec numbers;
    for (int l = 0; l < kWordLanes; ++l)
        numbers[l] = uint32_t(l);
    return numbers;
}

// Lane l of the result is lane l + 1 of x; the last lane gets any.
FKD_INLINE WordVec next_lane(WordVec x) {
#if defined(__clang__)
    WordVec out = x;
    for (int l = 0; l + 1 < kWordLanes; ++l)
        out[l] = x[l + 1];
    return out;
#else
    return __builtin_shuffle(x, lane_numbers() + 1);
#endif
}

FKD_INLINE void order_pair(WordVec& a, WordVec& b) {
    const WordVec low = a < b ? a : b;
    b = a < b ? b : a;
    a = low;
}

// In lanes without bit D the smaller of x and its partner, in the others the larger.
template <int D>
FKD_INLINE WordVec order_lanes(WordVec x, WordVec partner) {
    WordVec upper;
    for (int l = 0; l < kWordLanes; ++l)
        upper[l] = l & D ? ~0u : 0u;
    return upper ? (x < partner ? partner : x) : (x < partner ? x : partner);
}

// Finishes a merge inside each vector: compares lanes D apart, then D / 2 and so on.
template <int D>
FKD_INLINE WordVec merge_lanes(WordVec x) {
    if constexpr (D > 0)
        return merge_lanes<D / 2>(order_lanes<D>(x, xor_lanes<D>(x)));
    else
        return x;
}

// Finishes a merge across G vectors in registers: compares vectors J apart, then J / 2 and so on.
template <int G, int J>
FKD_INLINE void merge_vectors(WordVec (&x)[G]) {
    if constexpr (J > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < G; ++i)
            if (!(i & J)) order_pair(x[i], x[i + J]);
        merge_vectors<G, J / 2>(x);
    }
}

// Merges pairs of sorted runs of K / 2 vectors, up to one run of G.
template <int G, int K>
FKD_INLINE void sort_vectors(WordVec (&x)[G]) {
    if constexpr (K <= G) {
#pragma GCC unroll 16
        for (int i = 0; i < G; ++i)
            if ((i & (K - 1)) < K / 2) order_pair(x[i], x[i ^ (K - 1)]);
        merge_vectors<G, K / 4>(x);
        sort_vectors<G, 2 * K>(x);
    }
}

template <int G>
FKD_INLINE void load_group(const WordVec* from, WordVec (&x)[G]) {
#pragma GCC unroll 16
    for (int i = 0; i < G; ++i)
        x[i] = from[i];
}

template <int G>
FKD_INLINE void store_group(WordVec* to, const WordVec (&x)[G]) {
#pragma GCC unroll 16
    for (int i = 0; i < G; ++i)
        to[i] = x[i];
}

// Finishes a merge of runs of V vectors or more, starting with vectors J apart.
template <int V, int J>
FKD_INLINE void finish_merge(WordVec* words) {
    if constexpr (J >= kGroup) {
        for (int g = 0; g < V; g += 2 * J)
            for (int i = g; i < g + J; ++i)
                order_pair(words[i], words[i + J]);
        finish_merge<V, J / 2>(words);
    } else {
        constexpr int G = smaller(V, kGroup);
        for (int g = 0; g < V; g += G) {
            WordVec x[G];
            load_group(words + g, x);
            merge_vectors<G, smaller(J, G / 2)>(x);
            store_group(words + g, x);
        }
    }
}

// Merges runs of K / 2 vectors, more than fit in registers, up to one run of V.
template <int V, int K>
FKD_INLINE void merge_long_runs(WordVec* words) {
    if constexpr (K <= V) {
        for (int g = 0; g < V; g += K)
            for (int i = 0; i < K / 2; ++i)
                order_pair(words[g + i], words[g + K - 1 - i]);
        finish_merge<V, K / 4>(words);
        merge_long_runs<V, 2 * K>(words);
    }
}

// Merges runs of L / 2 lanes of V vectors, up to one run of all lanes.
template <int V, int L>
FKD_INLINE void merge_lane_runs(WordVec* words) {
    if constexpr (L <= kWordLanes) {
        if constexpr (V == 1) {
            words[0] = merge_lanes<L / 4>(order_lanes<L / 2>(words[0], xor_lanes<L - 1>(words[0])));
        } else {
            for (int i = 0; i < V / 2; ++i) {
                const WordVec a = words[i], b = words[V - 1 - i];
                words[i] = merge_lanes<L / 4>(order_lanes<L / 2>(a, xor_lanes<L - 1>(b)));
                words[V - 1 - i] = merge_lanes<L / 4>(order_lanes<L / 2>(b, xor_lanes<L - 1>(a)));
            }
            finish_merge<V, V / 2>(words);
        }
        merge_lane_runs<V, 2 * L>(words);
    }
}

// Sorts V vectors in ascending order, in the layout above.
template <int V>
FKD_NOINLINE void sort_words(WordVec* words) {
    constexpr int G = smaller(V, kGroup);
    for (int g = 0; g < V; g += G) {
        WordVec x[G];
        load_group(words + g, x);
        sort_vectors<G, 2>(x);
        store_group(words + g, x);
    }
    merge_long_runs<V, 2 * G>(words);
    merge_lane_runs<V, 2>(words);
}

// Sorts `vectors` vectors, a power of two up to kMostVectors.
template <int V = 1>
FKD_INLINE void sort_words(WordVec* words, int vectors) {
    if constexpr (V < kMostVectors) {
        if (vectors > V) return sort_words<2 * V>(words, vectors);
    }
    sort_words<V>(words);
}

} // namespace FKD_ISA
} // namespace fused_kd

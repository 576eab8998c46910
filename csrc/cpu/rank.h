// Stable descending sort of a row of keys: the leading bits select buckets, which a network sorts (sort_words.h).
// Included by sources compiled once per instruction set, like simd.h.
//
// Keys become unsigned integers: ascending integers are descending keys. A bucket's integers, minus the smallest and
// cut to 22 bits, go above the index within the bucket in 32-bit words: sorting these is stable. If bits were cut off,
// the few neighbours that agree in all kept bits are sorted afterwards.
#pragma once

#include "../common/key_bits.h"
#include "simd/sort_words.h"

namespace fused_kd {
namespace FKD_ISA {

constexpr int kIndexBits = 10, kPrefixBits = 32 - kIndexBits;
constexpr uint32_t kIndexMask = (1u << kIndexBits) - 1;
static_assert(kMostWords == 1 << kIndexBits, "a word has room for the index");
// Buckets should have about 2^6 keys: a fraction of a network, because keys crowd in the middle of their range. The
// counters of at most 2^11 buckets fit in the first-level cache, beside the ends of the buckets that are being filled.
constexpr int kBucketKeys = 6, kMostDigits = 11;
constexpr int kStep = 256; // keys converted to integers at a time, in vectors

FKD_INLINE int bit_length(uint64_t x) {
    return x ? 64 - __builtin_clzll(x) : 0;
}

// Integers of n keys: those at indices[start], indices[start + 1], ..., or keys[start], ... if `indices` is null.
template <class A>
FKD_INLINE void read_bits(const A* keys, const uint32_t* indices, int64_t start, int64_t n, KeyBits<A>* bits) {
    if (indices)
        for (int64_t i = 0; i < n; ++i)
            bits[i] = descending_bits(keys[indices[start + i]]);
    else
        for (int64_t i = 0; i < n; ++i)
            bits[i] = descending_bits(keys[start + i]);
}

template <class B>
struct Range {
    B low, high;
    FKD_INLINE void include(const B* bits, int64_t n) {
        B smallest = low, largest = high;
        for (int64_t i = 0; i < n; ++i) {
            smallest = bits[i] < smallest ? bits[i] : smallest;
            largest = bits[i] > largest ? bits[i] : largest;
        }
        low = smallest;
        high = largest;
    }
};

template <class B, class Emit>
FKD_INLINE void rank_bucket(const B* bits, int n, Emit emit);

// Orders the first n words, which are sorted, by their whole integers where all kept bits agree.
template <class B>
FKD_NOINLINE void order_ties(WordVec* vectors, int count, int n, const B* bits) {
    uint32_t* const words = reinterpret_cast<uint32_t*>(vectors);
    const int logarithm = bit_length(uint64_t(count)) - 1;
    const auto word = [=](int r) -> uint32_t& { return words[(r & (count - 1)) * kWordLanes + (r >> logarithm)]; };
    const auto tied = [&](int r) { return (word(r) ^ word(r + 1)) <= kIndexMask; }; // with the next word
    for (int v = 0; v < count; ++v) {
        const WordVec next = v + 1 < count ? vectors[v + 1] : next_lane(vectors[0]);
        const WordVec ties = (WordVec)((vectors[v] ^ next) <= kIndexMask);
        if (none(ties)) continue;
        for (int l = 0; l < kWordLanes; ++l) {
            const int start = l * count + v;
            if (!ties[l] || start + 1 >= n || !tied(start) || (start > 0 && tied(start - 1))) continue;
            int end = start + 2; // of the run of ties that starts here
            while (end < n && tied(end - 1))
                ++end;
            uint32_t indices[kMostWords];
            B own[kMostWords];
            for (int r = start; r < end; ++r) {
                indices[r - start] = word(r) & kIndexMask;
                own[r - start] = bits[indices[r - start]];
            }
            // These integers are close together, so few or no bits are cut off now.
            rank_bucket(own, end - start, [&](int i, int r) __attribute__((always_inline)) {
                word(start + r) = (word(start + r) & ~kIndexMask) | indices[i];
            });
        }
    }
}

// Calls emit(local index, rank from 0) for each of n <= kMostWords integers, in ascending order.
template <class B, class Emit>
FKD_INLINE void rank_bucket(const B* bits, int n, Emit emit) {
    Range<B> range = {~B(0), 0};
    range.include(bits, n);
    const B spread = range.high - range.low;
    if (spread == 0) {
        for (int i = 0; i < n; ++i)
            emit(i, i);
        return;
    }
    const int length = bit_length(spread), cut = length > kPrefixBits ? length - kPrefixBits : 0;
    WordVec vectors[kMostVectors];
    uint32_t* const words = reinterpret_cast<uint32_t*>(vectors);
    int count = 1;
    while (count * kWordLanes < n)
        count *= 2;
    for (int i = n - n % kWordLanes; i < count * kWordLanes; ++i)
        words[i] = ~0u;
    for (int i = 0; i < n; ++i)
        words[i] = uint32_t((bits[i] - range.low) >> cut) << kIndexBits | uint32_t(i);
    sort_words(vectors, count);

    if (cut) order_ties(vectors, count, n, bits);
    for (int first = 0, l = 0; first < n; first += count, ++l) {
        const int length = n - first < count ? n - first : count;
        for (int v = 0; v < length; ++v)
            emit(int(words[v * kWordLanes + l] & kIndexMask), first + v);
    }
}

// Frees its memory even if a deeper call runs out of memory. (Standard containers are templates, see simd.h.)
struct Copy {
    Copy(const uint32_t* from, int64_t n) : indices(new uint32_t[size_t(n)]) {
        __builtin_memcpy(indices, from, sizeof(uint32_t) * size_t(n));
    }
    Copy(const Copy&) = delete;
    ~Copy() { delete[] indices; }
    uint32_t* const indices;
};

// Calls emit(index, rank) for n keys in descending order: those at the indices `from`, or the first n if it is null.
// Ranks start at `first`. `order` has room for n indices and must not overlap `from`.
template <class A, class Emit>
FKD_NOINLINE void rank_keys(const A* keys, const uint32_t* from, int64_t n, int64_t first, uint32_t* order, Emit emit) {
    typedef KeyBits<A> B;
    B bits[kMostWords];
    if (n <= kMostWords) {
        read_bits<A>(keys, from, 0, n, bits);
        rank_bucket(bits, int(n), [=](int i, int r) __attribute__((always_inline)) {
            emit(from ? from[i] : uint32_t(i), first + r);
        });
        return;
    }
    Range<B> range = {~B(0), 0};
    for (int64_t start = 0; start < n; start += kStep) {
        const int64_t length = n - start < kStep ? n - start : kStep;
        read_bits<A>(keys, from, start, length, bits);
        range.include(bits, length);
    }
    const B spread = range.high - range.low;
    if (spread == 0) {
        for (int64_t i = 0; i < n; ++i)
            emit(from ? from[i] : uint32_t(i), first + i);
        return;
    }
    const int wanted = bit_length(uint64_t(n) >> kBucketKeys), digit = wanted < kMostDigits ? wanted : kMostDigits;
    const int length = bit_length(spread), shift = length > digit ? length - digit : 0;
    const int buckets = int(spread >> shift) + 1;
    uint32_t ends[(1 << kMostDigits) + 1];
    for (int b = 0; b <= buckets; ++b)
        ends[b] = 0;
    const auto for_digits = [&](auto step) __attribute__((always_inline)) {
        for (int64_t start = 0; start < n; start += kStep) {
            const int64_t count = n - start < kStep ? n - start : kStep;
            uint32_t digits[kStep];
            read_bits<A>(keys, from, start, count, bits);
            for (int64_t i = 0; i < count; ++i)
                digits[i] = uint32_t((bits[i] - range.low) >> shift);
            for (int64_t i = 0; i < count; ++i)
                step(digits[i], start + i);
        }
    };
    for_digits([&](uint32_t bucket, int64_t) __attribute__((always_inline)) { ++ends[bucket + 1]; });
    for (int b = 0; b < buckets; ++b)
        ends[b + 1] += ends[b];
    // A bucket's start moves to its end as it fills, where the next one starts.
    for_digits([&](uint32_t bucket, int64_t i)
                   __attribute__((always_inline)) { order[ends[bucket]++] = from ? from[i] : uint32_t(i); });
    int64_t start = 0;
    for (int b = 0; b < buckets; ++b) {
        const int64_t count = int64_t(ends[b]) - start;
        uint32_t* const bucket = order + start;
        if (count > kMostWords) { // most keys crowd in a small part of the range: split it again
            const Copy copy(bucket, count);
            rank_keys<A>(keys, copy.indices, count, first + start, bucket, emit);
        } else if (count == 1) {
            emit(bucket[0], first + start);
        } else if (count) {
            read_bits<A>(keys, bucket, 0, count, bits);
            rank_bucket(bits, int(count),
                        [=](int i, int r) __attribute__((always_inline)) { emit(bucket[i], first + start + r); });
        }
        start = ends[b];
    }
}

// Calls emit(index, rank from 0) for every key of a row in descending order; equal keys (0 and -0 are equal) in
// ascending order of index. Keys must not be NaN. emit may overwrite the key at its index. `order` has room for n
// indices.
template <class A, class Emit>
FKD_INLINE void rank_descending(const A* keys, int64_t n, uint32_t* order, Emit emit) {
    rank_keys<A>(keys, nullptr, n, 0, order, emit);
}

} // namespace FKD_ISA
} // namespace fused_kd

// Stable descending sort of a row of keys: the leading bits select buckets, which a network sorts (sort_words.h).
// Included by sources compiled once per instruction set, like simd.h.
//
// Keys become unsigned integers: ascending integers are descending keys. A word of 32 bits has as many leading bits of
// an integer as there is room for above its index: sorting words is stable. If bits were cut off, the few neighbours
// that agree in all kept bits are sorted afterwards.
#pragma once

#include "../common/key_bits.h"
#include "simd/sort_words.h"

namespace fused_kd {
namespace FKD_ISA {

// Bits of an index into a bucket, whose word has 22 bits of a key.
constexpr int kIndexBits = 10;
static_assert(kMostWords == 1 << kIndexBits, "a word has room for the index");
// Buckets should have about 2^6 keys: a fraction of a network, because keys crowd in the middle of their range. The
// counters of at most 2^11 buckets fit in the first-level cache, beside the ends of the buckets that are being filled.
constexpr int kBucketKeys = 6, kMostDigits = 11;
// Up to this many keys a bucket's words may lack bits. In longer rows there is less room for them, so more words tie.
constexpr int64_t kMostCut = 8192;
constexpr int kStep = 256; // keys converted to integers at a time, in vectors

FKD_INLINE int bit_length(uint64_t x) {
    return x ? 64 - __builtin_clzll(x) : 0;
}

FKD_INLINE uint32_t low_bits(int n) {
    return (1u << n) - 1;
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

// n words in a power of two of vectors, in the order of sort_words() once they are sorted. The words beyond n are the
// largest.
struct Bucket {
    WordVec vectors[kMostVectors];
    int n, count, logarithm; // of count

    FKD_INLINE explicit Bucket(int n) : n(n) {
        int vectors = 1, log2 = 0;
        for (; vectors * kWordLanes < n; ++log2)
            vectors *= 2;
        for (int i = n - n % kWordLanes; i < vectors * kWordLanes; ++i)
            words()[i] = ~0u;
        count = vectors;
        logarithm = log2;
    }
    FKD_INLINE uint32_t* words() { return reinterpret_cast<uint32_t*>(vectors); }
    FKD_INLINE uint32_t& word(int rank) { return words()[(rank & (count - 1)) * kWordLanes + (rank >> logarithm)]; }
    // The lanes of vector v whose word agrees above the index with the word of the next rank.
    FKD_INLINE WordVec ties(int v, uint32_t index_mask) const {
        const WordVec next = v + 1 < count ? vectors[v + 1] : next_lane(vectors[0]);
        const WordVec rank = lane_numbers() * uint32_t(count) + uint32_t(v);
        return (WordVec)((vectors[v] ^ next) <= index_mask) & (WordVec)(rank < uint32_t(n - 1));
    }
    FKD_INLINE bool any_ties(uint32_t index_mask) const {
        WordVec any = {};
        for (int v = 0; v < count; ++v)
            any |= ties(v, index_mask);
        return !none(any);
    }
};

// The integers of keys, by index: of a list, or of a row's keys (Row below).
template <class Integer>
struct Listed {
    typedef Integer B;
    const B* bits;
    FKD_INLINE B operator[](uint32_t i) const { return bits[i]; }
};

template <class B, class Emit>
FKD_INLINE void rank_few(const B* bits, int n, Emit emit);

// Orders sorted words by their whole integers where all kept bits agree.
template <class Integers>
FKD_NOINLINE void order_ties(Bucket& bucket, uint32_t index_mask, Integers integers) {
    typedef typename Integers::B B;
    const int n = bucket.n, count = bucket.count;
    const auto tied = [&](int r) { return (bucket.word(r) ^ bucket.word(r + 1)) <= index_mask; };
    for (int v = 0; v < count; ++v) {
        const WordVec ties = bucket.ties(v, index_mask);
        if (none(ties)) continue;
        for (int l = 0; l < kWordLanes; ++l) {
            const int start = l * count + v;
            if (!ties[l] || (start > 0 && tied(start - 1))) continue;
            int end = start + 2; // of the run of ties that starts here
            while (end < n && tied(end - 1))
                ++end;
            if (end - start == 2) { // as most runs
                const uint32_t first = bucket.word(start), second = bucket.word(start + 1);
                if (integers[second & index_mask] < integers[first & index_mask]) {
                    bucket.word(start) = second;
                    bucket.word(start + 1) = first;
                }
                continue;
            }
            uint32_t indices[kMostWords];
            B own[kMostWords];
            for (int r = start; r < end; ++r) {
                indices[r - start] = bucket.word(r) & index_mask;
                own[r - start] = integers[indices[r - start]];
            }
            // These integers are close together, so few or no bits are cut off now.
            rank_few(own, end - start, [&](uint32_t i, int r) __attribute__((always_inline)) {
                uint32_t& word = bucket.word(start + r);
                word = (word & ~index_mask) | indices[i];
            });
        }
    }
}

// Sorts the words of a bucket, and calls emit(index, rank from 0) for each.
template <class Integers, class Emit>
FKD_INLINE void rank_words(Bucket& bucket, uint32_t index_mask, bool cut, Integers integers, Emit emit) {
    const uint32_t* const words = bucket.words();
    const int n = bucket.n, count = bucket.count; // in registers: 7 % of the time
    sort_words(bucket.vectors, count);
    if (cut && bucket.any_ties(index_mask)) order_ties(bucket, index_mask, integers);
    for (int first = 0, l = 0; first < n; first += count, ++l) {
        const int length = n - first < count ? n - first : count;
        for (int v = 0; v < length; ++v)
            emit(words[v * kWordLanes + l] & index_mask, first + v);
    }
}

// Calls emit(index, rank from 0) for each of n <= kMostWords integers, in ascending order.
template <class B, class Emit>
FKD_INLINE void rank_few(const B* bits, int n, Emit emit) {
    Range<B> range = {~B(0), 0};
    range.include(bits, n);
    const B spread = range.high - range.low;
    if (spread == 0) {
        for (int i = 0; i < n; ++i)
            emit(uint32_t(i), i);
        return;
    }
    const int length = bit_length(spread), room = 32 - kIndexBits, cut = length > room ? length - room : 0;
    Bucket bucket{n};
    uint32_t* const words = bucket.words();
    for (int i = 0; i < n; ++i)
        words[i] = uint32_t((bits[i] - range.low) >> cut) << kIndexBits | uint32_t(i);
    rank_words(bucket, low_bits(kIndexBits), cut > 0, Listed<B>{bits}, emit);
}

// The indices of n words. Frees its memory even if a deeper call runs out of memory. (Standard containers are
// templates, see simd.h.)
struct Indices {
    Indices(const uint32_t* words, int64_t n, uint32_t index_mask) : indices(new uint32_t[size_t(n)]) {
        for (int64_t i = 0; i < n; ++i)
            indices[i] = words[i] & index_mask;
    }
    Indices(const Indices&) = delete;
    ~Indices() { delete[] indices; }
    uint32_t* const indices;
};

template <class A>
struct Row {
    typedef KeyBits<A> B;
    const A* keys;
    int index_bits; // of an index into the row

    FKD_INLINE B operator[](uint32_t index) const { return descending_bits(keys[index]); }
    // The integers of n keys: at indices[start], indices[start + 1], ..., or start, ... if `indices` is null.
    FKD_INLINE void read_bits(const uint32_t* indices, int64_t start, int64_t n, B* bits) const {
        if (indices)
            for (int64_t i = 0; i < n; ++i)
                bits[i] = descending_bits(keys[indices[start + i]]);
        else
            for (int64_t i = 0; i < n; ++i)
                bits[i] = descending_bits(keys[start + i]);
    }
};

// Calls emit(index, rank) for n keys in descending order: those at the indices `from`, or the first n if it is null.
// Ranks start at `first`. `order` has room for n words and must not overlap `from`.
template <class A, class Emit>
FKD_NOINLINE void rank_keys(const Row<A> row, const uint32_t* from, int64_t n, int64_t first, uint32_t* order,
                            Emit emit) {
    typedef KeyBits<A> B;
    B bits[kMostWords];
    if (n <= kMostWords) {
        row.read_bits(from, 0, n, bits);
        rank_few(bits, int(n),
                 [=](uint32_t i, int r) __attribute__((always_inline)) { emit(from ? from[i] : i, first + r); });
        return;
    }
    Range<B> range = {~B(0), 0};
    for (int64_t start = 0; start < n; start += kStep) {
        const int64_t length = n - start < kStep ? n - start : kStep;
        row.read_bits(from, start, length, bits);
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
    // A word has the bits below the digit, or the highest of these. If there is room it has bits of the digit too: they
    // are equal within a bucket.
    const int index_bits = row.index_bits, room = 32 - index_bits, cut = shift > room ? shift - room : 0;
    const auto for_each = [&](auto step) __attribute__((always_inline)) {
        for (int64_t start = 0; start < n; start += kStep) {
            const int64_t count = n - start < kStep ? n - start : kStep;
            uint32_t digits[kStep], words[kStep];
            row.read_bits(from, start, count, bits);
            for (int64_t i = 0; i < count; ++i) {
                const B above = bits[i] - range.low;
                digits[i] = uint32_t(above >> shift);
                words[i] = uint32_t(above >> cut) << index_bits | (from ? from[start + i] : uint32_t(start + i));
            }
            for (int64_t i = 0; i < count; ++i)
                step(digits[i], words[i], start + i);
        }
    };
    for_each([&](uint32_t digit, uint32_t, int64_t) __attribute__((always_inline)) { ++ends[digit + 1]; });
    for (int b = 0; b < buckets; ++b)
        ends[b + 1] += ends[b];
    // A bucket's start moves to its end as it fills, where the next one starts. It gets words, or indices alone, for
    // a second look at their keys.
    const bool look = cut && n > kMostCut;
    if (look)
        for_each([&](uint32_t digit, uint32_t, int64_t i)
                     __attribute__((always_inline)) { order[ends[digit]++] = from ? from[i] : uint32_t(i); });
    else
        for_each([&](uint32_t digit, uint32_t word, int64_t)
                     __attribute__((always_inline)) { order[ends[digit]++] = word; });
    const uint32_t index_mask = look ? ~0u : low_bits(index_bits);
    int64_t start = 0;
    for (int b = 0; b < buckets; ++b) {
        const int64_t count = int64_t(ends[b]) - start;
        uint32_t* const words = order + start;
        if (count > kMostWords) { // most keys crowd in a small part of the range: split it again
            const Indices indices(words, count, index_mask);
            rank_keys(row, indices.indices, count, first + start, words, emit);
        } else if (count == 1) {
            emit(words[0] & index_mask, first + start);
        } else if (count && look) {
            row.read_bits(words, 0, count, bits);
            rank_few(bits, int(count),
                     [=](uint32_t i, int r) __attribute__((always_inline)) { emit(words[i], first + start + r); });
        } else if (count) {
            Bucket bucket{int(count)};
            __builtin_memcpy(bucket.words(), words, sizeof(uint32_t) * size_t(count));
            rank_words(bucket, index_mask, cut > 0, row,
                       [=](uint32_t index, int r) __attribute__((always_inline)) { emit(index, first + start + r); });
        }
        start = ends[b];
    }
}

// Calls emit(index, rank from 0) for every key of a row in descending order; equal keys (0 and -0 are equal) in
// ascending order of index. Keys must not be NaN. emit may overwrite the key at its index. `order` has room for n
// words.
template <class A, class Emit>
FKD_INLINE void rank_descending(const A* keys, int64_t n, uint32_t* order, Emit emit) {
    rank_keys(Row<A>{keys, bit_length(uint64_t(n - 1))}, nullptr, n, 0, order, emit);
}

} // namespace FKD_ISA
} // namespace fused_kd

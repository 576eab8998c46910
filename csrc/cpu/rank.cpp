#include "rank.h"

#include <algorithm>
#include <cstring>

namespace fused_kd {

namespace {

constexpr int kMaxDigit = 11; // 2048 counters a pass: more spill the first-level cache, fewer need another pass

// Ascending in the result is descending in the key.
uint32_t descending_bits(float key) {
    key += 0.0f; // -0 becomes 0
    uint32_t bits;
    std::memcpy(&bits, &key, sizeof bits);
    return bits ^ ((bits >> 31) ? 0u : 0x7fffffffu);
}

int bit_length(uint32_t x) {
    int n = 0;
    for (; x; x >>= 1)
        ++n;
    return n;
}

// One stable pass per digit over words whose bits from `low` up, `bits` of them, are to be sorted by.
template <class Word>
Word* radix_sort(Word* from, Word* to, int64_t n, int low, int bits, uint32_t* counters) {
    const int passes = (bits + kMaxDigit - 1) / kMaxDigit;
    const int digit = passes ? (bits + passes - 1) / passes : 0;
    const uint32_t buckets = 1u << digit, mask = buckets - 1;
    std::memset(counters, 0, sizeof(uint32_t) * buckets * size_t(passes));
    if (passes == 2) { // the common one: both histograms in one visit
        for (int64_t i = 0; i < n; ++i) {
            ++counters[uint32_t(from[i] >> low) & mask];
            ++counters[buckets + (uint32_t(from[i] >> (low + digit)) & mask)];
        }
    } else {
        for (int64_t i = 0; i < n; ++i)
            for (int pass = 0; pass < passes; ++pass)
                ++counters[uint32_t(pass) * buckets + (uint32_t(from[i] >> (low + pass * digit)) & mask)];
    }
    for (int pass = 0; pass < passes; ++pass) {
        uint32_t* const count = counters + uint32_t(pass) * buckets;
        uint32_t sum = 0;
        for (uint32_t b = 0; b < buckets; ++b) {
            const uint32_t c = count[b];
            count[b] = sum;
            sum += c;
        }
        const int shift = low + pass * digit;
        for (int64_t i = 0; i < n; ++i) {
            const Word word = from[i];
            to[count[uint32_t(word >> shift) & mask]++] = word;
        }
        std::swap(from, to);
    }
    return from;
}

// Words of the key's 32 bits above the index.
const uint32_t* order_large(const float* keys, int64_t n, uint32_t smallest, uint32_t largest, uint64_t* words,
                            uint32_t* counters) {
    for (int64_t i = 0; i < n; ++i)
        words[i] = uint64_t(descending_bits(keys[i]) - smallest) << 32 | uint32_t(i);
    const uint64_t* sorted = radix_sort(words, words + n, n, 32, bit_length(largest - smallest), counters);
    uint32_t* const order = reinterpret_cast<uint32_t*>(sorted == words ? words + n : words);
    for (int64_t i = 0; i < n; ++i)
        order[i] = uint32_t(sorted[i]);
    return order;
}

// Up to 2^12 keys: words of 32 bits, a prefix of the key's bits above the index, so that half as many bytes move in two
// passes. Keys that share a prefix are put in order afterwards by insertion; prefixes span the keys' range, so there
// are few unless they are equal, which costs nothing, or crowd beside an outlier: then null, and the caller sorts all
// bits.
constexpr int kSmallIndexBits = 12, kPrefixBits = 20;

const uint32_t* order_small(const float* keys, int64_t n, uint32_t smallest, uint32_t largest, uint32_t* words,
                            uint32_t* counters) {
    const int spread = bit_length(largest - smallest);
    const int dropped = spread > kPrefixBits ? spread - kPrefixBits : 0;
    for (int64_t i = 0; i < n; ++i)
        words[i] = ((descending_bits(keys[i]) - smallest) >> dropped) << kSmallIndexBits | uint32_t(i);
    uint32_t* const sorted = radix_sort(words, words + n, n, kSmallIndexBits, spread - dropped, counters);
    constexpr uint32_t index_mask = (1u << kSmallIndexBits) - 1;
    uint32_t previous = sorted[0] >> kSmallIndexBits;
    int64_t moves = 8 * n;
    sorted[0] &= index_mask;
    for (int64_t i = 1; i < n; ++i) {
        const uint32_t prefix = sorted[i] >> kSmallIndexBits, index = sorted[i] & index_mask;
        sorted[i] = index;
        if (prefix == previous && dropped) { // insertion, stable
            const float key = keys[index];
            int64_t at = i;
            // The run of this prefix begins where a smaller prefix's keys, all larger than this one, end.
            for (; at > 0 && keys[sorted[at - 1]] < key; --at)
                sorted[at] = sorted[at - 1];
            sorted[at] = index;
            if ((moves -= i - at) < 0) return nullptr;
        }
        previous = prefix;
    }
    return sorted;
}

} // namespace

size_t order_scratch_bytes(int64_t n) {
    return sizeof(uint32_t) * (size_t(3) << kMaxDigit) + 2 * sizeof(uint64_t) * size_t(n);
}

const uint32_t* order_descending(const float* keys, int64_t n, void* scratch) {
    uint32_t* const counters = static_cast<uint32_t*>(scratch);
    uint32_t* const words = counters + (size_t(3) << kMaxDigit);
    uint32_t smallest = UINT32_MAX, largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = descending_bits(keys[i]);
        smallest = std::min(smallest, bits);
        largest = std::max(largest, bits);
    }
    if (n <= (1 << kSmallIndexBits))
        if (const uint32_t* order = order_small(keys, n, smallest, largest, words, counters)) return order;
    return order_large(keys, n, smallest, largest, reinterpret_cast<uint64_t*>(words), counters);
}

const uint32_t* order_descending(const double* keys, int64_t n, void* scratch) {
    uint32_t* const order = static_cast<uint32_t*>(scratch);
    for (int64_t i = 0; i < n; ++i)
        order[i] = uint32_t(i);
    // In place and O(n log n); stable because the index decides between equals.
    std::sort(order, order + n,
              [keys](uint32_t a, uint32_t b) { return keys[a] > keys[b] || (keys[a] == keys[b] && a < b); });
    return order;
}

} // namespace fused_kd

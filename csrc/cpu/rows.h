// What the row kernels share. Included by sources compiled once per instruction set, like simd.h.
#pragma once

#include "../common/row_math.h"
#include "kernels.h"
#include "simd/convert.h"
#include "simd/simd.h"

namespace fused_kd {
namespace FKD_ISA {

void row_losses(const RowArgs& args);
void dist_columns(const ColumnArgs& args);
void target_probs(const TargetProbsArgs& args);
void uskd(const UskdArgs& args);
void zipf_ls(const ZipfArgs& args);
void topk_rows(const TopKArgs& args);
void argsort_descending(const ArgsortArgs& args);

// Calls work(begin, end) for the threads' shares of [0, n), each a run of its own in the threads' order.
template <class Work>
FKD_INLINE void share_out(int threads, int64_t n, const Work& work) {
    const auto share = [&](int64_t thread, int64_t of) { work(n * thread / of, n * (thread + 1) / of); };
    const auto run = [](const void* data, int thread, int of) { (*static_cast<decltype(&share)>(data))(thread, of); };
    in_team(threads, run, &share);
}

// A gradient of so many bytes leaves the caches before anyone reads it, so it is written past them.
constexpr int64_t kStreamed = int64_t(8) << 20;

// Of a row that does not count, where a gradient is wanted.
inline void no_gradient(void* gradient, DType type, int64_t row, int64_t classes) {
    if (!gradient) return;
    const int64_t bytes = classes * element_size(type);
    __builtin_memset(static_cast<char*>(gradient) + row * bytes, 0, size_t(bytes));
}

// Fits the first-level cache with room to spare, and no lane adds up more than 128 terms before double
// precision takes over.
template <class A>
constexpr int64_t kBlock = 128 * kLanes<A>;

template <class A>
FKD_INLINE int64_t block_length(int64_t classes, int64_t start) {
    return classes - start < kBlock<A> ? classes - start : kBlock<A>;
}

template <class A>
FKD_INLINE A finite_or_zero(A x) {
    return x == -INFINITY ? A(0) : x;
}

// Largest logit of a block, the targets left out; -inf where none can occur.
template <class A, int K>
FKD_INLINE A block_max(const A* s, int64_t n, const Without<K>& y) {
    Vec<A> max = splat<A>(-INFINITY);
    const Vec<A> lowest = max;
    for_lanes<A>(n, y, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        max = max_of(keep(lanes, load(s + j, lanes), lowest), max);
    });
    return max_lanes<A>(max);
}

// The same of two matrices in one walk.
template <class A, int K>
FKD_INLINE void block_max(const A* s, const A* t, int64_t n, const Without<K>& y, A& s_largest, A& t_largest) {
    Vec<A> s_max = splat<A>(-INFINITY), t_max = s_max;
    const Vec<A> lowest = s_max;
    for_lanes<A>(n, y, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        s_max = max_of(keep(lanes, load(s + j, lanes), lowest), s_max);
        t_max = max_of(keep(lanes, load(t + j, lanes), lowest), t_max);
    });
    s_largest = max_lanes<A>(s_max);
    t_largest = max_lanes<A>(t_max);
}

// Softmax of a piece of a row, with some more digits than elsewhere, since differences are taken of it. Not inlined:
// what is stored is rounded, and so is the same wherever it is made. What is read next lies `ahead` elements further on.
template <class A>
FKD_NOINLINE void softmax_piece(const A* logits, int64_t n, const SoftmaxOrigin& of, A* out, int64_t ahead) {
    const A origin = A(of.origin);
    const double off = double(origin) - of.origin, factor = off == 0 ? of.by : of.by * exp(off * of.scale);
    const A by = A(factor), by_low = A(factor - double(by));
    const A scale = A(kLog2E * of.scale), scale_low = A(kLog2E * of.scale - double(scale));
    for_lanes<A>(n, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        __builtin_prefetch(logits + j + ahead);
        const Vec<A> x = load(logits + j, lanes), zero = {}, d = x - origin;
        const Vec<A> exponent = d * scale;
        // With fused multiply-add what the product was rounded by, without 0.
        const Vec<A> rounded = kFused ? mul_add<A>(d, scale, -exponent) : zero;
        const Vec<A> e = exp2_nonpositive<A>(exponent, mul_add<A>(d, scale_low, rounded));
        store(out + j, x == -A(INFINITY) ? zero : mul_add<A>(e, by, e * by_low), lanes);
    });
}

// The largest entry of a row, the lowest index first among equal ones; -1 where all are left out or none is above -inf.
// A NaN is passed over; `nan`, if given, becomes true.
template <class A>
FKD_NOINLINE int64_t argmax(const Matrix& m, int64_t row, int64_t classes, A* staging, int64_t without = -1,
                            bool* nan = nullptr) {
    int64_t best = -1;
    A largest = -INFINITY;
    for (int64_t j = 0; j < classes; j += kBlock<A>) {
        const int64_t n = block_length<A>(classes, j);
        const A* v = read(m, row, j, n, staging);
        Vec<A> top = splat<A>(-INFINITY);
        const Vec<A> lowest = top;
        Mask<A> bad = {}, at = {}; // where each lane's largest is, its own place in the vector left out
        for_lanes<A>(n, Without<1>{{without - j}}, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
            const Vec<A> x = keep(lanes, load(v + i, lanes), lowest);
            const Mask<A> larger = x > top;
            top = larger ? x : top;
            at = larger ? Mask<A>{} + typename Simd<A>::Int(i) : at;
            if (nan) bad |= x != x;
        });
        for (int l = 0; nan && l < kLanes<A>; ++l)
            *nan |= bad[l] != 0;
        const A block_top = max_lanes<A>(top);
        if (!(block_top > largest)) continue;
        largest = block_top;
        best = classes;
        for (int l = 0; l < kLanes<A>; ++l)
            if (top[l] == largest && j + at[l] + l < best) best = j + at[l] + l;
    }
    return best;
}

} // namespace FKD_ISA
} // namespace fused_kd

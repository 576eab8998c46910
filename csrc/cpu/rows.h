// Common code of the row kernels. Included by sources compiled once per instruction set, like simd.h.
#pragma once

#include "../common/row_math.h"
#include "kernels.h"
#include "simd/convert.h"
#include "simd/exp_log.h"
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

// Calls work(begin, end) in each thread for its share of [0, n): one range per thread, in the threads' order.
template <class Work>
FKD_INLINE void share_out(int threads, int64_t n, const Work& work) {
    const auto share = [&](int64_t thread, int64_t of) { work(n * thread / of, n * (thread + 1) / of); };
    const auto run = [](const void* data, int thread, int of) { (*static_cast<decltype(&share)>(data))(thread, of); };
    in_team(threads, run, &share);
}

// A gradient of at least this many bytes leaves the caches before it is read again, so it is written past them.
constexpr int64_t kStreamed = int64_t(8) << 20;

// The start of a row of the gradient.
FKD_INLINE char* row_of(const Gradient& gradient, DType type, int64_t row, int64_t classes) {
    return static_cast<char*>(gradient.data) + row * (classes + gradient.padding) * element_size(type);
}

// Zeroes the gradient, if wanted, of a row that does not count.
inline void no_gradient(const Gradient& gradient, DType type, int64_t row, int64_t classes) {
    if (!gradient.data) return;
    __builtin_memset(row_of(gradient, type, row, classes), 0, size_t(classes * element_size(type)));
}

// Zeroes the columns after a row's classes.
inline void zero_padding(const Gradient& gradient, DType type, int64_t row, int64_t classes) {
    if (!gradient.data || gradient.padding == 0) return;
    const int64_t size = element_size(type);
    __builtin_memset(row_of(gradient, type, row, classes) + classes * size, 0, size_t(gradient.padding * size));
}

// Fits in the first-level cache with room to spare. Each lane adds at most 128 terms before double precision takes
// over.
template <class A>
constexpr int64_t kBlock = 128 * kLanes<A>;

template <class A>
FKD_INLINE int64_t block_length(int64_t classes, int64_t start) {
    return classes - start < kBlock<A> ? classes - start : kBlock<A>;
}

template <class A>
FKD_INLINE bool is_finite(A x) {
    return x - x == 0;
}

template <class A>
FKD_INLINE A finite_or_zero(A x) {
    return x == -INFINITY ? A(0) : x;
}

// The largest non-target logit of a block; -inf if no class can occur.
template <class A, int K>
FKD_INLINE A block_max(const A* s, int64_t n, const Without<K>& y) {
    Vec<A> max = splat<A>(-INFINITY);
    const Vec<A> lowest = max;
    for_lanes<A>(n, y, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        max = max_of(keep(lanes, load(s + j, lanes), lowest), max);
    });
    return max_lanes<A>(max);
}

// Whether one loop can read a matrix and find the largest element.
template <class A>
FKD_INLINE bool reads_halves(const Matrix& m) {
    return kHalfVectors && sizeof(A) == 4 && m.col_stride == 1 && (m.dtype == kBFloat16 || m.dtype == kFloat16);
}

// Reads a block, and finds its largest non-target logit.
template <class A, int K>
FKD_INLINE const A* read_largest(const Matrix& m, int64_t row, int64_t j, int64_t n, const Without<K>& y, A* staging,
                                 A& largest) {
    if constexpr (kHalfVectors && sizeof(A) == 4) {
        if (reads_halves<A>(m)) {
            const uint16_t* const half = reinterpret_cast<const uint16_t*>(element(m, row, j));
            largest = m.dtype == kBFloat16 ? half_to_float<BFloat16>(half, n, y, staging)
                                           : half_to_float<Float16>(half, n, y, staging);
            return staging;
        }
    }
    const A* const x = read(m, row, j, n, staging);
    largest = block_max<A>(x, n, y);
    return x;
}

// A block of the student's logits and one of others, with the largest ones.
template <class A>
struct BothBlocks {
    const A *s, *t;
    A s_largest, t_largest;
};

// The same for two matrices. One loop finds both largest logits, which is faster than two while it reads memory.
template <class A, int K>
FKD_INLINE BothBlocks<A> read_largest(const Matrix& student, const Matrix& other, int64_t row, int64_t j, int64_t n,
                                      const Without<K>& y, A* s_staging, A* t_staging) {
    BothBlocks<A> out;
    if (reads_halves<A>(student) && reads_halves<A>(other)) {
        out.s = read_largest(student, row, j, n, y, s_staging, out.s_largest);
        out.t = read_largest(other, row, j, n, y, t_staging, out.t_largest);
        return out;
    }
    const A* const s = out.s = read(student, row, j, n, s_staging);
    const A* const t = out.t = read(other, row, j, n, t_staging);
    Vec<A> s_max = splat<A>(-INFINITY), t_max = s_max;
    const Vec<A> lowest = s_max;
    for_lanes<A>(n, y, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
        s_max = max_of(keep(lanes, load(s + i, lanes), lowest), s_max);
        t_max = max_of(keep(lanes, load(t + i, lanes), lowest), t_max);
    });
    out.s_largest = max_lanes<A>(s_max);
    out.t_largest = max_lanes<A>(t_max);
    return out;
}

// The softmax of a piece of a row. It is more precise than elsewhere, because differences are taken of it. It is not
// inlined, so that every caller gets the same rounded values. The next call will read `ahead` elements further on.
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
        // The rounding error of the product; 0 without fused multiply-add.
        const Vec<A> rounded = kFused ? mul_add<A>(d, scale, -exponent) : zero;
        const Vec<A> e = exp2_nonpositive<A>(exponent, mul_add<A>(d, scale_low, rounded));
        // 0 at -inf; but NaN, as everywhere in the row, if it has no softmax.
        store(out + j, x == -A(INFINITY) ? zero + by * A(0) : mul_add<A>(e, by, e * by_low), lanes);
    });
}

// The largest element of a block; -inf if there is none. Ignores NaN, but sets `nan` to true, if given. Each of several
// vectors has its own maximum, because each maximum waits for the previous one.
template <class A>
FKD_INLINE A largest_of(const A* v, int64_t n, bool* nan) {
    constexpr int64_t w = kLanes<A>, together = 4;
    const Vec<A> lowest = splat<A>(-INFINITY);
    Vec<A> top[together] = {lowest, lowest, lowest, lowest};
    Mask<A> bad = {};
    const Mask<A> ones = ~bad;
    const auto take = [&](Vec<A> x, Vec<A>& top) __attribute__((always_inline)) {
        top = max_of(x, top);
        if (nan) bad = x == x ? bad : ones;
    };
    int64_t j = 0;
    for (; j + together * w <= n; j += together * w) {
#pragma GCC unroll 4
        for (int k = 0; k < together; ++k) {
            __builtin_prefetch(v + j + k * w + kBlock<A>);
            take(load(v + j + k * w), top[k]);
        }
    }
    for (; j + w <= n; j += w)
        take(load(v + j), top[0]);
    if (j < n) {
        const auto lanes = lanes_below<A>(int(n - j), Without<1>{{-1}});
        take(keep(lanes, load(v + j, lanes), lowest), top[1]);
    }
    for (int l = 0; nan && l < kLanes<A>; ++l)
        *nan |= bad[l] != 0;
    return max_lanes<A>(max_of(max_of(top[0], top[1]), max_of(top[2], top[3])));
}

// The index of the first element equal to x; there must be one.
template <class A>
FKD_INLINE int64_t first_equal(const A* v, A x, int64_t n) {
    int64_t j = 0;
    while (j + kLanes<A> <= n && none(load(v + j) == x))
        j += kLanes<A>;
    while (v[j] != x)
        ++j;
    return j;
}

// The index of the largest entry of a row except `without`, the lowest index on ties; -1 if no entry is above -inf.
// Ignores NaN, but sets `nan` to true, if given.
template <class A>
FKD_NOINLINE int64_t argmax(const Matrix& m, int64_t row, int64_t classes, A* staging, int64_t without = -1,
                            bool* nan = nullptr) {
    int64_t best = -1;
    A largest = -INFINITY;
    const auto look = [&](int64_t j, int64_t n) {
        for (int64_t end = j + n; j < end; j += kBlock<A>) {
            const int64_t length = block_length<A>(end, j);
            const A* v = read(m, row, j, length, staging);
            const A top = largest_of<A>(v, length, nan);
            if (!(top > largest)) continue;
            largest = top;
            best = j + first_equal<A>(v, top, length);
        }
    };
    const bool apart = without >= 0 && without < classes;
    look(0, apart ? without : classes);
    if (apart) look(without + 1, classes - without - 1);
    return best;
}

} // namespace FKD_ISA
} // namespace fused_kd

// Vectors of floats or doubles, as wide as the instruction set that this file is compiled for. They use the compiler's
// vector extensions, and intrinsics only where those lack an operation (partial and half-precision loads). Included by
// sources compiled once per instruction set: everything is inside FKD_ISA, without library templates, because the
// linker would merge those of different builds.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__FAST_MATH__)
#error "fused_kd gives NaN, infinity and equal numbers a meaning: build it without -ffast-math"
#endif

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FKD_INLINE inline __attribute__((always_inline))
#define FKD_NOINLINE __attribute__((noinline))

namespace fused_kd {
namespace FKD_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef float FloatVec __attribute__((vector_size(kBytes)));
typedef int32_t Int32Vec __attribute__((vector_size(kBytes)));
typedef double DoubleVec __attribute__((vector_size(kBytes)));
typedef int64_t Int64Vec __attribute__((vector_size(kBytes)));

template <class A>
struct Simd;

template <>
struct Simd<float> {
    typedef FloatVec Vec;
    typedef Int32Vec Mask; // each lane all ones or all zeros
    typedef int32_t Int;
    // The polynomial with value 1 at 0 and the smallest maximal relative error against 2^r on |r| <= 1/2: 9.1e-8, less
    // than one ulp. With 1 at 0 the exponential of a maximum is 1, and sums of equal exponentials are exact.
    static constexpr int kDegree = 5;
    static constexpr float kPoly[6] = {1.0f, 0.693147004f, 0.240222424f, 0.055507336f, 0.009671513f, 0.0013264727f};
    // One degree more, error 1.9e-9, where only rounding may remain.
    static constexpr int kFineDegree = 6;
    static constexpr float kFinePoly[7] = {1.0f,         0.6931472f,    0.24022646f,   0.055503286f,
                                           0.009618489f, 0.0013399931f, 0.00015345812f};
    // 1.5 * 2^23 + 127: after adding it, the low bits hold round(x) plus the exponent's bias.
    static constexpr float kRound = 12583039.0f;
    static constexpr int kMantissa = 23;
    static constexpr float kLowest = -125.0f; // below this the power is taken as 0; above it 2^k is normal
};

template <>
struct Simd<double> {
    typedef DoubleVec Vec;
    typedef Int64Vec Mask;
    typedef int64_t Int;
    static constexpr int kDegree = 11; // largest relative error 3e-18
    static constexpr double kPoly[12] = {1.0,
                                         0.693147180559945309,
                                         0.240226506959101566,
                                         0.0555041086648199163,
                                         0.00961812910758818278,
                                         0.00133335581467906301,
                                         0.000154035304627137175,
                                         0.0000152527334897536966,
                                         1.32154329856828154e-6,
                                         1.01781979572133673e-7,
                                         7.0741242936979471e-9,
                                         4.43531463923002681e-10};
    static constexpr int kFineDegree = kDegree;
    static constexpr const double (&kFinePoly)[12] = kPoly;
    static constexpr double kRound = 6755399441056767.0; // 1.5 * 2^52 + 1023
    static constexpr int kMantissa = 52;
    static constexpr double kLowest = -1021.0;
};

template <class A>
using Vec = typename Simd<A>::Vec;
template <class A>
using Mask = typename Simd<A>::Mask;
template <class A>
constexpr int kLanes = kBytes / int(sizeof(A));

template <class A>
FKD_INLINE Vec<A> splat(A x) {
    return x - Vec<A>{}; // broadcasts x and keeps -0.0
}

// Whether all lanes of a mask or integer vector are 0.
template <class V>
FKD_INLINE bool none(V x) {
    static_assert(sizeof x == kBytes, "a whole vector");
#if defined(__AVX512F__)
    return _mm512_test_epi64_mask((__m512i)x, (__m512i)x) == 0;
#elif defined(__AVX2__)
    return _mm256_testz_si256((__m256i)x, (__m256i)x);
#else
    uint64_t parts[kBytes / 8], all = 0;
    __builtin_memcpy(parts, &x, sizeof x);
    for (int i = 0; i < kBytes / 8; ++i)
        all |= parts[i];
    return all == 0;
#endif
}

// x y + z, with one rounding if the processor has that, which halves the instructions. Written out where it pays,
// because contraction is off (CMakeLists.txt): a compiler that contracts decides separately in each copy of a loop
// (whole vectors, the last one, a target), and equal logits would get different results.
#if defined(__AVX512F__)
constexpr bool kFused = true;
FKD_INLINE FloatVec mul_add(FloatVec x, FloatVec y, FloatVec z) {
    return (FloatVec)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
}
FKD_INLINE DoubleVec mul_add(DoubleVec x, DoubleVec y, DoubleVec z) {
    return (DoubleVec)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)z);
}
#elif defined(__AVX2__) && defined(__FMA__)
constexpr bool kFused = true;
FKD_INLINE FloatVec mul_add(FloatVec x, FloatVec y, FloatVec z) {
    return (FloatVec)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
}
FKD_INLINE DoubleVec mul_add(DoubleVec x, DoubleVec y, DoubleVec z) {
    return (DoubleVec)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)z);
}
#elif defined(__aarch64__)
constexpr bool kFused = true;
FKD_INLINE FloatVec mul_add(FloatVec x, FloatVec y, FloatVec z) {
    return (FloatVec)vfmaq_f32((float32x4_t)z, (float32x4_t)x, (float32x4_t)y);
}
FKD_INLINE DoubleVec mul_add(DoubleVec x, DoubleVec y, DoubleVec z) {
    return (DoubleVec)vfmaq_f64((float64x2_t)z, (float64x2_t)x, (float64x2_t)y);
}
#else
constexpr bool kFused = false;
template <class V>
FKD_INLINE V mul_add(V x, V y, V z) {
    return x * y + z;
}
#endif

template <class A>
FKD_INLINE Vec<A> mul_add(Vec<A> x, A y, Vec<A> z) {
    return mul_add(x, splat(y), z);
}
template <class A>
FKD_INLINE Vec<A> mul_add(Vec<A> x, Vec<A> y, A z) {
    return mul_add(x, y, splat(z));
}
template <class A>
FKD_INLINE Vec<A> mul_add(Vec<A> x, A y, A z) {
    return mul_add(x, splat(y), splat(z));
}

// The lanes that a step works on: all, without the cost of masks, or some.
struct AllLanes {};
template <class A>
struct SomeLanes {
    Mask<A> on;
    int count; // elements that exist from the start of the vector on
};

// Up to K indices that a loop leaves out, ascending; negative for none.
template <int K>
struct Without {
    int64_t at[K];
    FKD_INLINE Without<K> from(int64_t start) const {
        Without<K> shifted;
        for (int k = 0; k < K; ++k)
            shifted.at[k] = at[k] - start;
        return shifted;
    }
};

template <class A, int K>
FKD_INLINE SomeLanes<A> lanes_below(int count, const Without<K>& without) {
    typedef typename Simd<A>::Int Int;
    alignas(64) static constexpr Int kOrder[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Mask<A> index;
    __builtin_memcpy(&index, kOrder, sizeof index);
    Mask<A> on = index < Int(count);
    for (int k = 0; k < K; ++k)
        on &= index != Int(without.at[k]);
    return {on, count};
}

template <class A>
FKD_INLINE Vec<A> load(const A* p, AllLanes = {}) {
    Vec<A> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class A>
FKD_INLINE Vec<A> load(const A* p, const SomeLanes<A>& lanes) {
    if (lanes.count >= kLanes<A>) return load(p);
    Vec<A> v = {};
    __builtin_memcpy(&v, p, sizeof(A) * size_t(lanes.count));
    return v;
}

template <class A>
FKD_INLINE void store(A* p, Vec<A> v, AllLanes = {}) {
    __builtin_memcpy(p, &v, sizeof v);
}

template <class A>
FKD_INLINE void store(A* p, Vec<A> v, const SomeLanes<A>& lanes) {
    if (lanes.count >= kLanes<A>)
        store(p, v);
    else
        __builtin_memcpy(p, &v, sizeof(A) * size_t(lanes.count));
}

#if defined(__AVX512F__)
FKD_INLINE Vec<float> load(const float* p, const SomeLanes<float>& lanes) {
    return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << lanes.count) - 1u), p);
}
FKD_INLINE void store(float* p, Vec<float> v, const SomeLanes<float>& lanes) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << lanes.count) - 1u), (__m512)v);
}
#endif

// v where the mask is on, else other.
template <class V>
FKD_INLINE V keep(AllLanes, V v, V) {
    return v;
}
template <class A, class V>
FKD_INLINE V keep(const SomeLanes<A>& lanes, V v, V other) {
    return lanes.on ? v : other;
}

// The larger of two; acc if x is NaN.
template <class V>
FKD_INLINE V max_of(V x, V acc) {
    return x > acc ? x : acc;
}

// 16 bytes of a vector.
template <class A>
struct Sixteen {
    typedef A Part __attribute__((vector_size(16)));
};
template <class A>
using Part = typename Sixteen<A>::Part;

// x > y ? x : y. By intrinsics, because compilers make a branch of that for one lane, which is often mispredicted.
#if defined(__AVX512F__) || defined(__AVX2__)
FKD_INLINE Part<float> larger(Part<float> x, Part<float> y) {
    return (Part<float>)_mm_max_ps((__m128)x, (__m128)y);
}
FKD_INLINE Part<double> larger(Part<double> x, Part<double> y) {
    return (Part<double>)_mm_max_pd((__m128d)x, (__m128d)y);
}
#else
template <class P>
FKD_INLINE P larger(P x, P y) {
    return x > y ? x : y;
}
#endif

// Folds a vector to one value in a fixed order: its halves, then the halves of what is left.
template <class A, class Fold>
FKD_INLINE A fold_lanes(Vec<A> v, Fold fold) {
    Part<A> part[kBytes / 16];
    __builtin_memcpy(part, &v, sizeof v);
#pragma GCC unroll 4
    for (int width = kBytes / 32; width > 0; width /= 2)
#pragma GCC unroll 4
        for (int i = 0; i < width; ++i)
            part[i] = fold(part[i], part[i + width]);
    const Part<A>& all = part[0];
    if constexpr (sizeof(A) == 4) {
        const Part<A> half = fold(all, Part<A>{all[2], all[3], all[0], all[1]});
        return fold(half, Part<A>{half[1], half[0], half[3], half[2]})[0];
    } else {
        return fold(all, Part<A>{all[1], all[0]})[0];
    }
}

template <class A>
FKD_INLINE A sum_lanes(Vec<A> v) {
    return fold_lanes<A>(v, [](auto x, auto y) { return x + y; });
}

template <class A>
FKD_INLINE A max_lanes(Vec<A> v) {
    return fold_lanes<A>(v, [](auto x, auto y) { return larger(x, y); });
}

// Calls step(lanes, j) for the vectors that cover [0, n), with masks only at left-out elements and at the end.
template <class A, int K, class Step>
FKD_INLINE void for_lanes(int64_t n, const Without<K>& without, Step step) {
    constexpr int64_t w = kLanes<A>;
    int64_t j = 0;
#pragma GCC unroll 2
    for (int k = 0; k < K; ++k) {
        const int64_t y = without.at[k];
        if (y < j || y >= n - n % w) continue; // in another block, in the last vector, or already done
        for (; j + w <= y; j += w)
            step(AllLanes{}, j);
        step(lanes_below<A>(int(w), without.from(j)), j);
        j += w;
    }
    for (; j + w <= n; j += w)
        step(AllLanes{}, j);
    if (j < n) step(lanes_below<A>(int(n - j), without.from(j)), j);
}

template <class A, class Step>
FKD_INLINE void for_lanes(int64_t n, Step step) {
    for_lanes<A>(n, Without<1>{{-1}}, step);
}

} // namespace FKD_ISA
} // namespace fused_kd

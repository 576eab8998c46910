// Exponentials and logarithms of vectors. Included by sources compiled once per instruction set, like simd.h.
#pragma once

#include "simd.h"

namespace fused_kd {
namespace FKD_ISA {

// x = k + r with an integer k and |r| <= 1/2.
template <class A>
struct Reduced {
    Vec<A> r, k; // without AVX-512, k is in the low bits of a larger number

    explicit FKD_INLINE Reduced(Vec<A> x);
    // power * 2^k, for k of a normal number.
    FKD_INLINE Vec<A> scale(Vec<A> power) const;
};

#if defined(__AVX512F__)
template <>
FKD_INLINE Reduced<float>::Reduced(FloatVec x) : k((FloatVec)_mm512_roundscale_ps((__m512)x, 8)) {
    r = x - k;
}
template <>
FKD_INLINE Reduced<double>::Reduced(DoubleVec x) : k((DoubleVec)_mm512_roundscale_pd((__m512d)x, 8)) {
    r = x - k;
}
template <>
FKD_INLINE FloatVec Reduced<float>::scale(FloatVec power) const {
    return (FloatVec)_mm512_scalef_ps((__m512)power, (__m512)k);
}
template <>
FKD_INLINE DoubleVec Reduced<double>::scale(DoubleVec power) const {
    return (DoubleVec)_mm512_scalef_pd((__m512d)power, (__m512d)k);
}
#else
template <class A>
FKD_INLINE Reduced<A>::Reduced(Vec<A> x) : k(x + Simd<A>::kRound) {
    r = x - (k - Simd<A>::kRound);
}
template <class A>
FKD_INLINE Vec<A> Reduced<A>::scale(Vec<A> power) const {
    return power * (Vec<A>)((Mask<A>)k << Simd<A>::kMantissa);
}
#endif

// 2^r, times 2^k.
template <class A, int degree>
FKD_INLINE Vec<A> exp2_scaled(const A (&poly)[degree + 1], const Reduced<A>& x) {
    Vec<A> power = splat<A>(poly[degree]);
#pragma GCC unroll 16
    for (int i = degree - 1; i >= 0; --i)
        power = mul_add<A>(power, x.r, poly[i]);
    return x.scale(power);
}

// 2^x for x up to about 1, within about 2 ulp, or 1 ulp if `fine`. Exactly 0 at -inf and below the range; NaN stays
// NaN, because it is multiplied. Base 2 makes the reduction to |r| <= 1/2 exact, and the factor log2(e) merges with the
// subtraction of the maximum (see Shift).
template <class A, bool fine = false>
FKD_INLINE Vec<A> exp2_nonpositive(Vec<A> x) {
    typedef Simd<A> S;
    const Reduced<A> reduced(x);
    const Vec<A> e =
        fine ? exp2_scaled<A, S::kFineDegree>(S::kFinePoly, reduced) : exp2_scaled<A, S::kDegree>(S::kPoly, reduced);
    return x < S::kLowest ? Vec<A>{} : e;
}

// The same with subnormal results, for results that decide an order. They are rare.
template <class A>
FKD_INLINE Vec<A> exp2_gradual(Vec<A> x) {
    typedef Simd<A> S;
    const Vec<A> e = exp2_scaled<A, S::kDegree>(S::kPoly, Reduced<A>(x));
    const Mask<A> low = x < S::kLowest;
    if (__builtin_expect(none(low), 1)) return e;
    return low ? exp2_nonpositive<A>(x + A(64)) * A(0x1p-64) : e;
}

// 2^(x + low), where x is a rounded number and low its rounding error; within about an ulp; not for -inf.
template <class A>
FKD_INLINE Vec<A> exp2_nonpositive(Vec<A> x, Vec<A> low) {
    typedef Simd<A> S;
    Reduced<A> reduced(x);
    reduced.r += low;
    return x < S::kLowest ? Vec<A>{} : exp2_scaled<A, S::kFineDegree>(S::kFinePoly, reduced);
}

// log x for normal x, within about an ulp: x = 2^e m, m near 1, f = m - 1. In single precision P is the polynomial of
// degree 6 with the smallest maximal relative error of f - f^2 / 2 + f^3 P(f) against log m, 3e-8. In double precision
// log m = 2 artanh(f / (f + 2)).
template <class A>
FKD_INLINE Vec<A> log_positive(Vec<A> x) {
    typedef Simd<A> S;
    typedef typename S::Int Int;
    constexpr Int kSqrtHalf = sizeof(A) == 4 ? Int(0x3f3504f3) : Int(0x3fe6a09e667f3bcd);
    const Mask<A> exponent = ((Mask<A>)x - kSqrtHalf) >> S::kMantissa; // so m is in [sqrt(1/2), sqrt(2))
    const Vec<A> f = (Vec<A>)((Mask<A>)x - (exponent << S::kMantissa)) - A(1);
    Vec<A> of_m;
    if constexpr (sizeof(A) == 4) {
        constexpr float kPoly[7] = {0.3333391f,  -0.25001338f, 0.199630633f, -0.16577585f,
                                    0.14914767f, -0.14267486f, 0.0870043635f};
        // In pairs, because Horner's rule would be one long dependency chain.
        const Vec<A> square = f * f;
        const auto pair = [&](int k) __attribute__((always_inline)) { return mul_add<A>(f, kPoly[k + 1], kPoly[k]); };
        const Vec<A> high = mul_add<A>(square, kPoly[6], pair(4));
        const Vec<A> series = mul_add(mul_add(high, square, pair(2)), square, pair(0));
        of_m = mul_add(square, mul_add<A>(series, f, A(-0.5)), f);
    } else {
        const Vec<A> s = f / (f + A(2)), square = s * s;
        constexpr int kTerms = 12;
        Vec<A> series = splat<A>(A(1) / A(2 * kTerms - 1));
#pragma GCC unroll 12
        for (int k = kTerms - 2; k >= 0; --k)
            series = mul_add<A>(series, square, A(1) / A(2 * k + 1));
        of_m = (s + s) * series;
    }
    return mul_add<A>(__builtin_convertvector(exponent, Vec<A>), A(0.693147180559945309417), of_m);
}

constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.693147180559945309417;

// Maps logits x to (x - origin) * scale * log2(e). The origin is a maximum, or with fused multiply-add the nearby point
// that one fused instruction maps to 0; sums relative to "the maximum" are relative to the origin. Not for double: far
// from 0, a double cannot hold that point. The exact form takes any maximum, and clamps a difference that overflows.
// The other form needs |max * scale| < kLargestShift, else the origin is too far from the maximum.
constexpr double kLargestShift = 1048576.0;

template <class A, bool exact>
struct Shift {
    A by, minus;
    double origin;
    static constexpr bool fused = kFused && !exact && sizeof(A) == 4;
    explicit FKD_INLINE Shift(A max, double scale = 1) : by(A(kLog2E * scale)), minus(fused ? -max * by : max) {
        origin = fused ? -double(minus) / double(by) : double(max);
    }
    FKD_INLINE Vec<A> operator()(Vec<A> x) const {
        if constexpr (fused) return mul_add<A>(x, by, splat(minus));
        const Vec<A> y = (x - minus) * by;
        constexpr A lowest = sizeof(A) == 4 ? A(-3e38) : A(-1e308);
        if constexpr (exact) return y < lowest ? splat<A>(lowest) : y;
        return y;
    }
};

} // namespace FKD_ISA
} // namespace fused_kd

// Policies of the pointwise losses: the functions of each class's probabilities that are summed, and the slopes.
// pointwise.h includes this; csrc/losses/row_losses.h computes the loss and the coefficients from the sums.
#pragma once

#include "../losses/row_losses.h"
#include "rows.h"

namespace fused_kd {
namespace FKD_ISA {
namespace {

// One vector of classes: their probabilities; log(q / p), which stays finite if they underflow; exp(-|log(q / p)|).
template <class A>
struct Probabilities {
    Vec<A> p, q, log_ratio, ratio;
};

template <class A>
FKD_INLINE Vec<A> smaller_ratio(Vec<A> log_ratio) {
    const Mask<A> sign = (Mask<A>)splat<A>(A(-0.0));
    return exp2_nonpositive<A, true>((Vec<A>)((Mask<A>)log_ratio | sign) * A(kLog2E));
}

// A policy's `terms` computes the terms of PointwiseSums.of that kTerms selects, and the kSlopes slopes of h. The
// policy says whether it reads log_ratio and ratio. Terms that it does not compute are 0. With kKept, for a loss with
// one slope that is slow to compute, p f_1 is also the first term and is kept in place of the teacher's exponentials.

// What such a loss is, unless it says otherwise.
template <class A>
struct OneSlope {
    static constexpr bool kKept = true, kLogRatio = true, kRatio = false;
    static constexpr bool kTerms[3] = {true, false, false};
    static constexpr int kSlopes = 1;
    typedef A Number;
};

template <class A>
struct Dist {
    static constexpr bool kKept = false, kLogRatio = false, kRatio = false;
    static constexpr bool kTerms[3] = {true, true, true};
    static constexpr int kSlopes = 2;
    typedef A Number;
    A mean_p, mean_q; // over a row
    // Centres before multiplying: sum p^2 - 1 / C would cancel.
    FKD_INLINE void terms(const Probabilities<A>& x, Vec<A> (&sums)[3], Vec<A> (&slopes)[2]) const {
        const Vec<A> a = x.p - mean_p, b = x.q - mean_q;
        sums[0] = a * b;
        sums[1] = a * a;
        sums[2] = b * b;
        slopes[0] = b;
        slopes[1] = a;
    }
};

// If beta = 1 (`reverse`), the mixture is q and log(q / m) = 0.
template <class A, bool reverse>
struct Js : OneSlope<A> {
    static constexpr bool kRatio = !reverse;
    static constexpr bool kTerms[3] = {true, false, true};
    A b, rest;
    explicit Js(const RowParams& params) : b(weight(params.beta)), rest(weight(1 - params.beta)) {}
    // The smaller weight is 1 minus the rounded larger one, which is exact. If they did not sum to 1, m would be off by
    // the difference, and so would the loss; a sum of 1 leaves an error of second order. A weight that this makes 0
    // would leave log m without a bound.
    static A weight(double exact) {
        const A rest = A(1) - A(1 - exact);
        return exact < 0.5 && rest > 0 ? rest : A(exact);
    }
    // log(p / m) and log(q / m) use the smaller of p / q and q / p, which cannot overflow. It is the exponential of the
    // rounded log(q / p), not the quotient of p and q: then an error of that logarithm changes the loss only in second
    // order. A probability of 0 contributes 0.
    FKD_INLINE void terms(const Probabilities<A>& x, Vec<A> (&sums)[3], Vec<A> (&slopes)[2]) const {
        const Vec<A> zero = {}, d = x.log_ratio;
        Vec<A> of_p = -d, of_q = zero;
        if constexpr (!reverse) {
            const Mask<A> up = ~(d <= A(0)); // also for NaN, which the logarithm would lose
            const Vec<A> own = splat<A>(b), other = splat<A>(rest);
            const Vec<A> l = log_positive<A>(mul_add(x.ratio, up ? other : own, up ? own : other));
            of_p = (up ? -d : zero) - l;
            of_q = (up ? zero : d) - l;
        }
        slopes[0] = x.p == A(0) ? zero : of_p;
        sums[0] = x.p * slopes[0];
        sums[2] = x.q == A(0) ? zero : x.q * of_q;
    }
};

// Calls f with the policy of a loss, for a row of type A. Its numbers are of type N: A or, for the target, double. Dist
// has no use for more digits.
template <class N, class A, class F>
FKD_INLINE void with_policy(const RowParams& params, const A (&row_means)[2], F f) {
    switch (params.number >> kKindShift) {
    case kDist:
        return f(Dist<A>{row_means[0], row_means[1]});
    case kJs:
        return params.beta == 1 ? f(Js<N, true>(params)) : f(Js<N, false>(params));
    }
    __builtin_trap(); // a pointwise loss in the catalogue that has no policy
}

} // namespace
} // namespace FKD_ISA
} // namespace fused_kd

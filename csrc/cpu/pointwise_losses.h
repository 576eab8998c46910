// The policies of losses that are functions of each class's probabilities: what of them is summed, and their slopes.
// See pointwise.h, which includes this, and csrc/losses/row_losses.h, which makes loss and coefficients of the sums.
#pragma once

#include "../losses/row_losses.h"
#include "rows.h"

namespace fused_kd {
namespace FKD_ISA {
namespace {

// One vector of classes: their probabilities, log(q / p), which stays finite where those underflow, and the exponential
// of minus its magnitude.
template <class A>
struct Probabilities {
    Vec<A> p, q, log_ratio, ratio;
};

template <class A>
FKD_INLINE Vec<A> smaller_ratio(Vec<A> log_ratio) {
    return exp2_nonpositive<A, true>((log_ratio <= A(0) ? log_ratio : -log_ratio) * A(kLog2E));
}

// A policy's `terms` gives the terms of PointwiseSums.of, those of kTerms, and the kSlopes slopes of h. It says whether
// it reads log_ratio and ratio, and what is to take the target's terms, itself or its like in double precision. A loss
// of one slope that takes long to compute keeps p f_1, which is then its first term as well, where the teacher's
// exponentials were.
template <class A>
struct Dist {
    static constexpr bool kKept = false, kLogRatio = false, kRatio = false;
    static constexpr bool kTerms[3] = {true, true, true};
    static constexpr int kSlopes = 2;
    typedef A Number;
    typedef Dist OfTarget;
    A mean_p, mean_q; // of a row
    Dist(A mean_p, A mean_q) : mean_p(mean_p), mean_q(mean_q) {}
    Dist(const Dist& of, const RowParams&) : Dist(of) {}
    // Centred before they are multiplied: sum p^2 - 1 / C would cancel.
    FKD_INLINE void terms(const Probabilities<A>& x, Vec<A> (&sums)[3], Vec<A> (&slopes)[2]) const {
        const Vec<A> a = x.p - mean_p, b = x.q - mean_q;
        sums[0] = a * b;
        sums[1] = a * a;
        sums[2] = b * b;
        slopes[0] = b;
        slopes[1] = a;
    }
};

// Of beta = 1 the mixture is q, and log(q / m) 0.
template <class A, bool reverse>
struct Js {
    static constexpr bool kKept = true, kLogRatio = true, kRatio = !reverse;
    static constexpr bool kTerms[3] = {true, false, true};
    static constexpr int kSlopes = 1;
    typedef A Number;
    typedef Js<double, reverse> OfTarget;
    A b, rest;
    explicit Js(const RowParams& params) : b(A(params.beta)), rest(A(1 - params.beta)) {}
    template <class Of>
    Js(const Of&, const RowParams& params) : Js(params) {}
    // log(p / m) and log(q / m) are of the smaller of p / q and q / p, which cannot overflow. It is the exponential of
    // what log(q / p) was rounded to, and not the quotient of p and q, since then an error of that logarithm changes
    // the loss in the second order only. Of what is 0 there is 0.
    FKD_INLINE void terms(const Probabilities<A>& x, Vec<A> (&sums)[3], Vec<A> (&slopes)[2]) const {
        const Vec<A> zero = {}, d = x.log_ratio;
        Vec<A> of_p = -d, of_q = zero;
        if constexpr (!reverse) {
            const Mask<A> up = ~(d <= A(0)); // NaN too, which the logarithm would not keep
            const Vec<A> own = splat<A>(b), other = splat<A>(rest);
            const Vec<A> l = log_positive<A>(mul_add(x.ratio, up ? other : own, up ? own : other));
            of_p = (up ? -d : zero) - l;
            of_q = (up ? zero : d) - l;
        }
        slopes[0] = x.p == A(0) ? zero : of_p;
        slopes[1] = zero;
        sums[0] = x.p * slopes[0];
        sums[1] = zero;
        sums[2] = x.q == A(0) ? zero : x.q * of_q;
    }
};

} // namespace
} // namespace FKD_ISA
} // namespace fused_kd

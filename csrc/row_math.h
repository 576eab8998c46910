// Per-row formulas of the losses: from the statistics of a row to its loss parts and the coefficients of its gradient.
// Shared by every backend that compiles C++, so plain scalars only: no vectors, no allocation, no library beyond
// <math.h>.
//
// Notation (y the target, "nt" the classes other than y):
//   max_nt           the largest non-target logit, to which all sums of a row refer; 0 if every one is -inf
//   sum              sum over nt of exp(x_j - max_nt)
//   sum_t            sum over nt of exp((x_j - max_nt) / T)
// The target never enters a sum: p_y - 1 = -sum / Z and the non-target softmax come out without cancellation, however
// close p_y is to 1, and a target logit far above the rest does not make the rest underflow.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define FKD_HD __host__ __device__ inline
#else
#define FKD_HD static inline
#endif

// The files in cpu/ that are compiled once per instruction set define FKD_ISA, so that the linker cannot merge one
// build's inline functions into another's and run AVX-512 code where there is none.
#ifndef FKD_ISA
#define FKD_ISA common
#endif

namespace fused_kd {
namespace FKD_ISA {

// Softmax of one row, split at its target.
template <class R>
struct SplitSoftmax {
    R log_p_target;   // log p_y
    R p_target;       // p_y
    R rest;           // 1 - p_y
    R p_scale;        // p_j = p_scale * exp(x_j - max_nt) for j != y
    R log_normalizer; // log p_j = (x_j - max_nt) - log_normalizer for j != y
};

template <class R>
FKD_HD SplitSoftmax<R> split_softmax(R target_logit, R max_nt, R sum) {
    const R above = target_logit - max_nt;
    SplitSoftmax<R> out;
    if (above <= R(0)) {
        const R e = exp(above);
        const R z = sum + e;
        out.log_p_target = above - log(z);
        out.p_target = e / z;
        out.rest = sum / z;
        out.p_scale = R(1) / z;
        out.log_normalizer = log(z);
    } else { // also NaN
        const R e = exp(-above);
        const R below = sum * e;
        const R z = R(1) + below;
        out.log_p_target = -log1p(below);
        out.p_target = R(1) / z;
        out.rest = below / z;
        out.p_scale = e / z;
        out.log_normalizer = above + log1p(below);
        if (target_logit == INFINITY) out.log_p_target = out.p_target = out.rest = out.p_scale = NAN;
    }
    return out;
}

// weight * value with 0 * inf = 0: a class that cannot occur costs nothing where it has no weight. NaN stays.
template <class R>
FKD_HD R weighted(R weight, R value) {
    return (weight == R(0) && (value == INFINITY || value == -INFINITY)) ? R(0) : weight * value;
}

struct NkdParams {
    double gamma, temperature, ce_weight;
    bool single_non_target; // C = 2: the non-target softmax is the constant 1
};

template <class R>
struct NkdStats {
    R s_max, s_sum, s_sum_t, s_target;
    R t_max, t_sum, t_sum_t, t_target;
    R cross;   // sum over nt with s_j > -inf of exp((t_j - t_max) / T) * (s_j - s_max)
    R blocked; // sum over nt with s_j = -inf of exp((t_j - t_max) / T)
    // Of probability targets V only; of class indices v_target = v_sum = 1 and the rest 0.
    R v_target, v_sum;            // V_y, and the sum of all V_j
    R v_cross, v_free, v_blocked; // over nt: sum V_j (s_j - s_max), sum V_j where s_j > -inf, and where s_j = -inf
};

// Loss parts, already weighted, and the gradient:
//   d/ds_j = a exp(s_j - s_max) + b exp((s_j - s_max) / T) + c exp((t_j - t_max) / T) - v V_j   for j != y
template <class R>
struct NkdRow {
    R target, non_target, ce;
    R a, b, c, v;
    R gradient_target;
};

// MATH: d/ds_j = q_y (p_j - [j=y]) + gamma T (p^_j - q^_j)[j!=y] + ce_weight (p_j sum(V) - V_j)
template <class R>
FKD_HD NkdRow<R> nkd_row(const NkdStats<R>& x, const NkdParams& params) {
    const R temperature = R(params.temperature), ce_weight = R(params.ce_weight);
    const SplitSoftmax<R> p = split_softmax(x.s_target, x.s_max, x.s_sum);
    const SplitSoftmax<R> q = split_softmax(x.t_target, x.t_max, x.t_sum);
    NkdRow<R> out;
    out.target = -weighted(q.p_target, p.log_p_target);
    out.a = (q.p_target + ce_weight * x.v_sum) * p.p_scale;

    const bool teacher_has_rest = x.t_sum_t != R(0); // NaN counts, so that it spreads
    if (params.single_non_target || !teacher_has_rest) {
        out.non_target = out.b = out.c = R(0);
    } else {
        // - sum q^_j log p^_j = log(sum_t) - sum q^_j (s_j - s_max) / T
        const R weight = R(params.gamma) * temperature;
        const R entropy = log(x.s_sum_t) - x.cross / (x.t_sum_t * temperature);
        out.non_target = x.blocked > R(0) ? weighted(weight, R(INFINITY)) : weight * temperature * entropy;
        out.b = x.s_sum_t == R(0) ? R(0) : weight / x.s_sum_t;
        out.c = -weight / x.t_sum_t;
    }

    R ce = -weighted(x.v_target, p.log_p_target);
    if (x.v_free != R(0)) ce += x.v_free * p.log_normalizer - x.v_cross;
    if (x.v_blocked > R(0)) ce = INFINITY;
    out.ce = weighted(ce_weight, ce);
    out.v = ce_weight;

    // A class that cannot occur has no gradient, the target included.
    out.gradient_target =
        x.s_target == -INFINITY ? R(0) * out.a : ce_weight * (p.p_target * x.v_sum - x.v_target) - q.p_target * p.rest;
    if (x.v_sum == x.v_target && x.v_target == R(1)) // (q_y + ce)(p_y - 1), without the subtraction
        out.gradient_target = x.s_target == -INFINITY ? R(0) * out.a : -(q.p_target + ce_weight) * p.rest;
    return out;
}

} // namespace FKD_ISA
} // namespace fused_kd

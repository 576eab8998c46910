// Formulas of a row: from its statistics to its loss parts and the coefficients of its gradient. Every backend that
// compiles C++ shares them, so they use plain scalars: no vectors, no allocation, no library beyond <math.h>.
//
// Notation (y the target, "nt" the classes other than y):
//   max_nt           the largest non-target logit, the reference of all sums of a row; 0 if all are -inf
//   sum              sum over nt of exp(x_j - max_nt)
//   sum_t            sum over nt of exp((x_j - max_nt) / T)
// The target never enters a sum. So p_y - 1 = -sum / Z and the non-target softmax do not cancel, however close p_y is
// to 1, and the rest does not underflow under a target logit far above it.
#pragma once

#include <math.h>

#include "compile.h"
#include "hyper_parameters.h"

namespace fused_kd {
namespace FKD_ISA {

// Softmax of one row, split into its K targets and the rest. An absent target has logit -inf.
template <class R, int K>
struct SplitSoftmax {
    R log_p[K];       // of the targets
    R p[K];           //
    R rest;           // 1 - the sum of p
    R p_scale;        // p_j = p_scale * exp(x_j - max_nt) for j not a target
    R log_normalizer; // log p_j = (x_j - max_nt) - log_normalizer for j not a target
};

template <class R, int K>
FKD_HD SplitSoftmax<R, K> split_softmax(const R (&logits)[K], R max_nt, R sum) {
    const bool no_rest = sum == R(0); // false for NaN
    R top = no_rest ? -R(INFINITY) : max_nt;
    int at = -1;
    for (int k = 0; k < K; ++k)
        if (logits[k] > top) {
            top = logits[k];
            at = k;
        }
    const R scale = no_rest ? R(0) : at < 0 ? R(1) : exp(max_nt - top);
    const R nt = sum * scale;
    R below = nt; // everything but the largest, which has exponential 1
    R e[K];
    for (int k = 0; k < K; ++k) {
        e[k] = k == at ? R(1) : exp(logits[k] - top);
        if (k != at) below += e[k];
    }
    const R z = at < 0 ? below : R(1) + below;
    const R log_z = at < 0 ? log(z) : log1p(below);
    const R invalid = top == INFINITY ? R(NAN) : R(0);
    SplitSoftmax<R, K> out;
    for (int k = 0; k < K; ++k) {
        out.log_p[k] = (logits[k] - top) - log_z;
        out.p[k] = e[k] / z + invalid;
    }
    out.rest = nt / z + invalid;
    out.p_scale = scale / z + invalid;
    out.log_normalizer = (no_rest ? R(0) * log_z : (top - max_nt) + log_z) + invalid; // NaN where p is NaN
    return out;
}

// weight * value with 0 * inf = 0: a class of probability 0 costs nothing at weight 0. NaN stays NaN.
template <class R>
FKD_HD R weighted(R weight, R value) {
    return (weight == R(0) && (value == INFINITY || value == -INFINITY)) ? R(0) : weight * value;
}

// What the CE of a row needs, with up to two targets set apart.
template <class R>
struct LabelStats {
    int targets; // how many there are; an absent one has logit -inf and label 0
    int unused;  // in place of padding, which a GPU would read unwritten when it copies words
    R s_target[2], label[2];
    R s_linear; // sum over nt of s_j - s_max; only with label smoothing
    // For probability targets V; class indices have v_sum = 1 and 0 elsewhere.
    R v_sum;                      // sum of all V_j
    R v_cross, v_free, v_blocked; // over nt: sum V_j (s_j - s_max), sum V_j where s_j > -inf, and where s_j = -inf
};

// w CE(s, V"), V" = (1 - e) V + e / C, e the label smoothing. d/ds_j = sum p_j - v V_j - constant
template <class R>
struct CrossEntropy {
    R loss, sum, v, constant;
    R target[2]; // d/ds at the targets
};

template <class R>
FKD_HD CrossEntropy<R> cross_entropy(const LabelStats<R>& x, const HyperParameters& params, double classes,
                                     const SplitSoftmax<R, 2>& p) {
    if (params.ce_weight == 0) return {}; // without the CE, a row need not have a softmax
    const R weight = R(params.ce_weight), kept = R(1 - params.label_smoothing);
    const R share = R(params.label_smoothing / classes);
    R ce = R(0);
    for (int k = 0; k < 2; ++k) // a constant trip count keeps the arrays in registers on a GPU
        if (k < x.targets) ce -= weighted(x.label[k], p.log_p[k]);
    if (x.v_free != R(0)) ce += x.v_free * p.log_normalizer - x.v_cross;
    if (x.v_blocked > R(0)) ce = R(INFINITY) + R(0) * p.rest; // NaN if no class can occur
    if (share != R(0)) {
        // Every class has a share, so a class with logit -inf makes the CE infinite.
        const R rest = R(classes) - R(x.targets);
        R all = x.s_linear == -INFINITY ? R(INFINITY) : rest * p.log_normalizer - x.s_linear;
        for (int k = 0; k < 2; ++k)
            if (k < x.targets) all -= p.log_p[k];
        ce = weighted(kept, ce) + share * all;
    }
    const R sum = kept * x.v_sum + R(params.label_smoothing);
    CrossEntropy<R> out = {weighted(weight, ce), weight * sum, weight * kept, weight * share, {R(0), R(0)}};
    for (int k = 0; k < 2; ++k) {
        // p_k sum V" - V"_k = p_k (sum of the others) - V"_k (1 - p_k), and 1 - p_k is the probability of the others
        const R label = kept * x.label[k] + share;
        out.target[k] = weight * (p.p[k] * (sum - label) - label * (p.rest + p.p[1 - k]));
    }
    return out;
}

enum Rank { kNormalized = 0, kClsKd = 1, kWeak = 2, kFinal = 3, kSum = 4 };

struct UskdParams : HyperParameters {
    double mean[2]; // mean over the batch of p_k^2, or p_k, for each target column
    double classes;
    bool square;
};

template <class R>
struct UskdStats : LabelStats<R> {
    R s_max, s_sum, w_max, w_sum; // maxima and sums as above, of student and weak logits
    R w_target[2];
    R w_linear;       // sum over nt of w_j - w_max
    R v_weak, v_rest; // for probability targets, over nt: sum V_j (w_j - w_max), sum V_j
};

// The rank key of a class is weak * exp(w_j - w_max) + student * exp(s_j - s_max) + linear * (s_j - s_max) + constant.
// A target uses the same formula, so that ties stay ties. But if a ranked logit of the target is above the rest, its
// exponential may overflow, and it cannot tie except by rounding; then `target` is its key.
template <class R>
struct UskdKey {
    R weak, student, linear, constant;
    R target[2]; // if above
    int above[2];
};

// Whether a target's logit is above the rest: above their maximum, or above -inf if their exponentials sum to 0.
template <class R>
FKD_HD bool above_rest(R logit, R max, R sum) {
    return logit > (sum == R(0) ? -R(INFINITY) : max);
}

// Eq. 10 and its variants (paper Table 9). `rest` is 1 - sum of p over the targets, without the subtraction.
template <class R>
FKD_HD UskdKey<R> uskd_key(const UskdStats<R>& x, const SplitSoftmax<R, 2>& p, const SplitSoftmax<R, 2>& v, Rank rank) {
    const R small = R(1e-6);
    const R by_weak = rank == kNormalized || rank == kClsKd ? R(1) / (v.rest + small) : R(rank != kFinal);
    const R by_student = rank == kNormalized ? R(1) / (p.rest + small) : R(rank == kFinal || rank == kSum);
    UskdKey<R> key = {by_weak * v.p_scale, by_student * p.p_scale, R(0), R(0), {R(0), R(0)}, {0, 0}};
    // A constant trip count, here and in uskd_row, keeps the arrays in registers on a GPU.
    if (rank == kClsKd) {
        R divisor = R(1) + small;
        for (int k = 0; k < 2; ++k)
            if (k < x.targets) divisor -= p.log_p[k];
        key.linear = divisor == INFINITY ? R(0) : R(1) / divisor;
        key.constant = -key.linear * p.log_normalizer;
    }
    const bool of_weak = by_weak != R(0), of_student = by_student != R(0) || key.linear != R(0);
    for (int k = 0; k < 2; ++k) {
        if (k >= x.targets) continue;
        key.target[k] = by_weak * v.p[k] + by_student * p.p[k] + weighted(key.linear, p.log_p[k]);
        key.above[k] = (of_weak && above_rest(x.w_target[k], x.w_max, x.w_sum)) ||
                       (of_student && above_rest(x.s_target[k], x.s_max, x.s_sum));
    }
    return key;
}

// Loss parts, already weighted, and the gradients for j not a target:
//   d/ds_j = student * exp(s_j - s_max) + zipf * z_j - v V_j - constant
//   d/dw_j = weak * exp(w_j - w_max) - weak_constant - weak_v V_j
template <class R>
struct UskdRow {
    R target, non_target, weak_part, ce;
    R student, zipf, v, constant;
    R weak, weak_constant, weak_v;
    R student_target[2], weak_target[2];
};

// zipf_sum and zipf_cross: sum z_j and sum z_j (s_j - s_max) over the non-target classes with logits > -inf.
// d/ds_j = alpha (p_j sum P - P_k [j=y_k]) + beta (p^_j - z^_j)[j not in Y] + d CE/ds_j
template <class R>
FKD_HD UskdRow<R> uskd_row(const UskdStats<R>& x, const UskdParams& params, const SplitSoftmax<R, 2>& p,
                           const SplitSoftmax<R, 2>& v, R zipf_sum, R zipf_cross) {
    const R alpha = R(params.alpha), mu = R(params.mu);
    const CrossEntropy<R> ce = cross_entropy<R>(x, params, params.classes, p);
    const R uniform = R(0.1 / params.classes), kept = R(0.9); // V' = 0.9 V + 0.1 / C
    UskdRow<R> out;
    R soft[2] = {R(0), R(0)}, target = R(0), weak = R(0);
    for (int k = 0; k < 2; ++k) {
        if (k >= x.targets) continue;
        soft[k] = (params.square ? p.p[k] * p.p[k] : p.p[k]) + x.label[k] - R(params.mean[k]);
        target -= weighted(soft[k], p.log_p[k]);
        weak -= (kept * x.label[k] + uniform) * v.log_p[k];
    }
    out.target = weighted(alpha, target);

    const R rest = R(params.classes) - R(x.targets);
    const bool has_rest = rest > R(1) && zipf_sum != R(0) && x.s_sum != R(0);
    out.non_target = has_rest ? weighted(R(params.beta), log(x.s_sum) - zipf_cross / zipf_sum) : R(0);
    out.zipf = has_rest ? -R(params.beta) / zipf_sum : R(0);

    // Every class has a share of the smoothed label, so a weak logit of -inf makes the term infinite.
    if (x.w_linear == -INFINITY)
        weak = INFINITY;
    else
        weak -= kept * (x.v_weak - x.v_rest * v.log_normalizer) + uniform * (x.w_linear - rest * v.log_normalizer);
    out.weak_part = weighted(mu, weak);

    out.student = (alpha * (soft[0] + soft[1]) + ce.sum) * p.p_scale + (has_rest ? R(params.beta) / x.s_sum : R(0));
    out.ce = ce.loss;
    out.v = ce.v;
    out.constant = ce.constant;
    const R label_sum = kept * x.v_sum + R(0.1);
    out.weak = mu * label_sum * v.p_scale;
    out.weak_constant = mu * uniform;
    out.weak_v = mu * kept;
    for (int k = 0; k < 2; ++k) {
        const int o = 1 - k;
        // alpha (p_k (P_k + P_o) - P_k), where 1 - p_k = rest + p_o
        const R by_target = alpha * (soft[o] * p.p[k] - soft[k] * (p.rest + p.p[o]));
        out.student_target[k] = x.s_target[k] == -INFINITY ? R(0) : by_target + ce.target[k];
        out.weak_target[k] =
            x.w_target[k] == -INFINITY ? R(0) : mu * (v.p[k] * label_sum - kept * x.label[k] - uniform);
    }
    return out;
}

} // namespace FKD_ISA
} // namespace fused_kd

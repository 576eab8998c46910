// Losses whose gradient is, row by row, a combination of a few exponentials. Each loss is one function, from the
// statistics of a row to its loss parts and the coefficients of its gradient. The CPU kernel cpu/row_losses.cpp runs
// them all; fused_kd/backends/triton/kernels/losses.py has the same formulas in Triton.
//
// Notation beyond row_math.h: logits are relative to the largest non-target logit of their row. A softmax at
// temperature 1 is "sharp", one at T is "soft". With logit standardization the distillation terms use z-scores: both
// softmaxes then take the raw logits at scales 1 / (deviation + 1e-7) and 1 / (T (deviation + 1e-7)) of their row. The
// CE always uses the raw logits.
#pragma once

#include "../common/row_math.h"

namespace fused_kd {
namespace FKD_ISA {

enum RowLoss { kNkd = 0, kKd = 1, kDkd = 2, kWsld = 3, kTfKd = 4, kDist = 5, kJs = 6 };
// What a loss needs: the lower bits of its number, as in fused_kd/core/catalogue.py. The upper half is the RowLoss.
enum RowNeed {
    kTeacher = 1,
    kSharp = 2,
    kDivergence = 4,
    kLinear = 8,
    kAtOne = 16,
    kTeacherCe = 32,
    kPointwise = 64,
    kOneSlope = 128,
    kFine = 256,
    kColumns = 512
};
constexpr int kKindShift = 16;
constexpr int kRowParts = 3;

struct RowParams : HyperParameters {
    int number; // of the loss, with its needs
    double classes;
    bool standardize;
};

// What a row must provide besides the soft exponentials.
struct RowNeeds {
    bool teacher;    // a teacher
    bool sharp;      // the sharp softmaxes
    bool raw;        // the CE's own exponentials, because standardization makes the sharp ones differ
    bool divergence; // cross is the sum of q (log p - log q), not of q log p, up to constants
    bool linear;     // the sum of the student's logits
    bool pointwise;  // the gradient is not a combination of exponentials, see PointwiseSums
    bool fine;       // in some rows, the student's probabilities as well as the exponentials
    bool steep;      // slopes without bound, as of reverse KL: a class with the whole probability must have p = 1
};

FKD_HD RowNeeds row_needs(const RowParams& params) {
    const bool ce = params.ce_weight != 0;
    RowNeeds needs = {};
    needs.teacher = params.number & kTeacher;
    needs.sharp = params.number & kSharp || ce;
    needs.raw = params.number & kSharp && ce && params.standardize;
    needs.divergence = params.number & kDivergence;
    needs.linear = params.number & kLinear || (ce && params.label_smoothing != 0);
    needs.pointwise = params.number & kPointwise;
    needs.fine = params.number & kFine;
    needs.steep = params.number >> kKindShift == kJs && params.beta == 1;
    return needs;
}

// The gradient of a pointwise loss, with the softmaxes p and q at T over all classes, is
//   p_j (h_j - sum_k p_k h_k) / T,   h_j = c_1 f_1j + c_2 f_2j.
// The slopes f are functions of p_j, q_j and their logarithms (cpu/pointwise.h). The coefficients c come from sums of
// three more such functions. A third slope, with c_3 = 1, is the contribution of the batch's columns to h, if any.
struct PointwiseSums {
    double of[3];
    double slopes[3];     // sum p_k f_k; in a row with one p = 1 it equals that f to the bit, so the gradient is 0
    double centred[3], z; // with standardization, over j != y: sums of p_j (s_j - mean) times f_j - slopes, and times 1
    double column;        // f_3 at the target
};

// Sums over the non-target classes.
struct RowStats {
    double s_target, t_target; // relative to the largest non-target logit
    double soft_s, soft_t;     // scales: exponents are (x - max) * scale
    double sharp_s, sharp_t;   //
    double s_soft, t_soft;     // sums of the exponentials
    double s_sharp, t_sharp, s_raw;
    double cross;   // sum of e_t (s - max) soft_s, or of e_t ((s - max) soft_s - (t - max) soft_t), over s_j > -inf
    double blocked; // sum of e_t where s_j = -inf
    double linear;  // sum of s - max
    // For probability targets V; class indices have v_target = v_sum = 1 and 0 elsewhere.
    double v_target, v_sum;            // V_y, and the sum of all V_j
    double v_cross, v_free, v_blocked; // sum V_j (s_j - max), sum V_j where s_j > -inf, and where s_j = -inf
    double v_cross_t;                  // sum V_j (t_j - max)
    PointwiseSums pointwise;           // over all classes
};

// Loss parts, already weighted, and the gradient of a non-target class:
//   soft e_s(T) + sharp e_s(1) + teacher e_t(T) for the distillation, plus raw e_s + constant - v V_j for the CE.
// A pointwise loss replaces the first three terms by p_j sum_k slopes_k (f_kj - sum p f_k).
struct RowResult {
    double parts[kRowParts];
    double soft, sharp, teacher, target; // target: the gradient of the distillation at the target
    double raw, v, constant, raw_target;
    double slopes[3];
};

typedef SplitSoftmax<double, 1> Split;

FKD_HD Split split_at(double target, double scale, double sum) {
    const double logit[1] = {target * scale};
    return split_softmax<double, 1>(logit, 0.0, sum);
}

// log(1 - p_y), from the sum over the other classes, which stays precise as p_y -> 1.
FKD_HD double log_rest(const Split& p, double sum) {
    return sum == 0 ? -INFINITY : log(sum) - p.log_normalizer;
}

// p_y - q_y, in the form that does not cancel.
FKD_HD double target_difference(const Split& p, const Split& q) {
    return p.p[0] > 0.5 && q.p[0] > 0.5 ? q.rest - p.rest : p.p[0] - q.p[0];
}

// weight * sum_k b_k (log b_k - log c_k) over (target, rest), with 0 log 0 = 0.
FKD_HD double binary_divergence(double weight, const Split& p, double p_log_rest, const Split& q, double q_log_rest) {
    const double by_target = weighted(weight * q.p[0], q.log_p[0]) - weighted(weight * q.p[0], p.log_p[0]);
    return by_target + weighted(weight * q.rest, q_log_rest) - weighted(weight * q.rest, p_log_rest);
}

// CE(softmax, V), unweighted. log_normalizer and v_cross belong to the same logits at the same scale.
FKD_HD double cross_entropy(const RowStats& x, const Split& p, double v_cross) {
    double ce = -weighted(x.v_target, p.log_p[0]);
    if (x.v_free != 0) ce += x.v_free * p.log_normalizer - v_cross;
    return x.v_blocked > 0 ? INFINITY + 0 * p.rest : ce; // NaN where no class can occur
}

// parts[2] = w CE(s, V'), V' = (1 - e) V + e / C; d/ds_j = w (p_j sum V' - V'_j).
FKD_HD void add_cross_entropy(const RowStats& x, const RowParams& params, const Split& p, RowResult& out) {
    const double w = params.ce_weight, smoothing = params.label_smoothing;
    if (w == 0) return;
    double ce = cross_entropy(x, p, x.v_cross);
    if (smoothing != 0) {
        const double rest = params.classes - 1;
        const double all = -p.log_p[0] - (x.linear == -INFINITY ? x.linear : x.linear - rest * p.log_normalizer);
        ce = weighted(1 - smoothing, ce) + smoothing / params.classes * all;
    }
    out.parts[2] = weighted(w, ce);
    const double kept = 1 - smoothing, uniform = smoothing / params.classes;
    const double label = kept * x.v_target + uniform, sum = kept * x.v_sum + smoothing;
    out.raw = w * sum * p.p_scale;
    out.v = w * kept;
    out.constant = -w * uniform;
    // (p_y - 1) for a whole label, without the subtraction.
    out.raw_target = sum == label ? -w * label * p.rest : w * (p.p[0] * sum - label);
    if (sum == 1 && label > 0.5) out.raw_target = w * ((1 - label) - p.rest);
}

// -q_y log p_y at 1, -gamma T^2 sum q^ log p^ at T (paper Eq. 4, 5).
// d/ds_j = q_y (p_j - [j=y]) + gamma T (p^_j - q^_j)[j!=y]
FKD_HD void nkd(const RowStats& x, const RowParams& params, RowResult& out) {
    const Split p = split_at(x.s_target, x.sharp_s, x.s_sharp), q = split_at(x.t_target, x.sharp_t, x.t_sharp);
    out.parts[0] = -weighted(q.p[0], p.log_p[0]);
    out.sharp = q.p[0] * p.p_scale;
    out.target = -q.p[0] * p.rest;
    if (params.classes == 2 || x.t_soft == 0) return; // a NaN is not 0, and spreads
    const double weight = params.gamma * params.temperature;
    const double entropy = log(x.s_soft) - x.cross / x.t_soft;
    out.parts[1] = weighted(weight * params.temperature, x.blocked > 0 ? double(INFINITY) : entropy);
    out.soft = x.s_soft == 0 ? 0 : weight / x.s_soft;
    out.teacher = -weight / x.t_soft;
}

// T^2 (alpha KL(b_t || b_s) + beta KL(q^ || p^)) at T, b = (p_y, 1 - p_y); KD is alpha = 1, beta = 1 - q_y.
// d/ds_j = T (alpha (p_y - q_y)([j=y] - p^_j [j!=y]) + beta (p^_j - q^_j)[j!=y])
FKD_HD void decoupled(const RowStats& x, const RowParams& params, bool whole, RowResult& out) {
    const double T = params.temperature;
    const Split p = split_at(x.s_target, x.soft_s, x.s_soft), q = split_at(x.t_target, x.soft_t, x.t_soft);
    const double alpha = whole ? 1 : params.alpha, beta = whole ? q.rest : params.beta;
    const double p_rest = log_rest(p, x.s_soft), q_rest = log_rest(q, x.t_soft);
    out.parts[0] = binary_divergence(alpha * T * T, p, p_rest, q, q_rest);
    const double difference = target_difference(p, q);
    out.target = alpha * T * difference;
    const bool has_rest = params.classes > 2 && x.t_soft != 0;
    double non_target = 0;
    if (has_rest) {
        non_target = log(x.s_soft) - log(x.t_soft) - x.cross / x.t_soft;
        non_target = weighted(beta * T * T, x.blocked > 0 ? double(INFINITY) : non_target);
        out.teacher = -beta * T / x.t_soft;
    }
    if (x.s_soft != 0) out.soft = T * ((has_rest ? beta : 0) - alpha * difference) / x.s_soft;
    (whole ? out.parts[0] : out.parts[1]) += non_target;
}

// alpha T^2 u (-sum q log p) at T, u = 1 - exp(-CE(s) / (CE(t) + 1e-7)) a constant. d/ds_j = alpha T u (p_j - q_j)
FKD_HD void wsld(const RowStats& x, const RowParams& params, RowResult& out) {
    const double T = params.temperature;
    const Split sharp_p = split_at(x.s_target, x.sharp_s, x.s_sharp);
    const Split sharp_q = split_at(x.t_target, x.sharp_t, x.t_sharp);
    const double s_ce = cross_entropy(x, sharp_p, x.v_cross * x.sharp_s);
    const double t_ce = cross_entropy(x, sharp_q, x.v_cross_t * x.sharp_t);
    // A student that excludes the target has everything to learn. The formula would give inf / inf if the teacher
    // excludes it too.
    const double u = s_ce == INFINITY ? 1 : -expm1(-s_ce / (t_ce + 1e-7));
    const Split p = split_at(x.s_target, x.soft_s, x.s_soft), q = split_at(x.t_target, x.soft_t, x.t_soft);
    const double weight = params.alpha * T * u;
    double ce = -weighted(weight * q.p[0], p.log_p[0]);
    if (x.t_soft != 0) {
        const double entropy = x.blocked > 0 ? double(INFINITY) : log(x.s_soft) - x.cross / x.t_soft;
        ce += weighted(weight * q.rest, entropy - log_rest(p, x.s_soft));
    }
    out.parts[0] = T * ce;
    out.soft = weight * p.p_scale;
    out.teacher = -weight * q.p_scale;
    out.target = weight * target_difference(p, q);
}

// KL(softmax(u / T) || p), u_y = correct, u_j = (1 - correct) / (C - 1). d/ds_j = p_j - softmax(u / T)_j
FKD_HD void tf_kd(const RowStats& x, const RowParams& params, RowResult& out) {
    const double rest = params.classes - 1, correct = params.correct;
    const double gap = (correct - (1 - correct) / rest) / params.temperature;
    const double log_others = -(gap > 0 ? gap + log1p(rest * exp(-gap)) : log(exp(gap) + rest)); // log u_j, j != y
    const double others = exp(log_others), own = exp(log_others + gap);
    const Split p = split_at(x.s_target, x.sharp_s, x.s_sharp);
    const double logs = x.linear == -INFINITY ? x.linear : x.linear - rest * p.log_normalizer;
    out.parts[0] = weighted(own, log_others + gap - p.log_p[0]) + weighted(others, rest * log_others - logs);
    out.raw += p.p_scale;
    out.constant -= others;
    out.raw_target += own > 0.5 ? rest * others - p.rest : p.p[0] - own;
}

// Pearson's correlation ab / (|a| |b| + 1e-8), and its derivative b_j by_b - a_j by_a.
struct Correlation {
    double value, by_b, by_a;
};

FKD_HD Correlation correlation(double ab, double aa, double bb) {
    const double a = sqrt(aa), b = sqrt(bb), denominator = a * b + 1e-8, value = ab / denominator;
    // A constant a has no gradient.
    return {value, 1 / denominator, a == 0 ? 0 : value * b / (a * denominator)};
}

// T^2 beta (1 - correlation of p - 1/C with q - 1/C); f_1 = q - 1/C, f_2 = p - 1/C.
FKD_HD void dist(const RowStats& x, const RowParams& params, RowResult& out) {
    const double weight = params.beta * params.temperature;
    const Correlation r = correlation(x.pointwise.of[0], x.pointwise.of[1], x.pointwise.of[2]);
    out.parts[0] = weight * params.temperature * (1 - r.value);
    out.slopes[0] = -weight * r.by_b;
    out.slopes[1] = weight * r.by_a;
}

// T^2 (b KL(q || m) + (1 - b) KL(p || m)), m = b q + (1 - b) p; b = 1 is T^2 KL(p || q), and b = 0 KD.
// f_1 = log(p / m); the sums are of p log(p / m) and, in of[2], of q log(q / m).
FKD_HD void js(const RowStats& x, const RowParams& params, RowResult& out) {
    const double T = params.temperature, b = params.beta, of_p = b == 1 ? 1 : 1 - b;
    out.parts[0] = T * T * (of_p * x.pointwise.of[0] + b * x.pointwise.of[2]);
    out.slopes[0] = T * of_p;
}

FKD_HD RowResult row_loss(const RowStats& x, const RowParams& params) {
    RowResult out = {};
    const double raw_scale = 1;
    const bool apart = params.standardize && params.number & kSharp;
    if (params.ce_weight != 0)
        add_cross_entropy(x, params, split_at(x.s_target, raw_scale, apart ? x.s_raw : x.s_sharp), out);
    switch (params.number >> kKindShift) {
    case kNkd:
        nkd(x, params, out);
        break;
    case kKd:
        decoupled(x, params, true, out);
        break;
    case kDkd:
        decoupled(x, params, false, out);
        break;
    case kWsld:
        wsld(x, params, out);
        break;
    case kTfKd:
        tf_kd(x, params, out);
        break;
    case kDist:
        dist(x, params, out);
        break;
    case kJs:
        js(x, params, out);
        break;
    default:
        __builtin_trap(); // a loss in the catalogue that has no case
    }
    out.slopes[2] = 1;
    // A NaN in the labels reaches loss and gradient, whatever the weights.
    const double valid = 1 + 0 * x.v_sum;
    out.parts[0] *= valid;
    out.soft *= valid;
    out.sharp *= valid;
    out.raw *= valid;
    out.target *= valid;
    for (int k = 0; k < 3; ++k)
        out.slopes[k] *= valid;
    // A class with logit -inf has no gradient. This holds for the target too, and in rows without a value.
    if (x.s_target == -INFINITY) out.target = out.raw_target = 0;
    return out;
}

} // namespace FKD_ISA
} // namespace fused_kd

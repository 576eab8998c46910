// The row losses with a top-k teacher, which keeps only some classes of each row. From the logits and log-probabilities
// of the kept classes, and a few sums over the others, they compute the loss parts and the gradient.
// fused_kd/reference/topk.py has the same formulas.
//
// Notation beyond row_losses.h: K are the kept classes; the rest are the classes neither in K nor the target. Sums over
// the rest are never differences. The probability that the teacher leaves is spread evenly over the C - |K| classes
// outside K, a share u each. This fixes the normalizer at every temperature.
#pragma once

#include "row_losses.h"

#include <stdint.h>

namespace fused_kd {
namespace FKD_ISA {

// How a loss treats the rest of the teacher; numbered as in fused_kd/backends/native/boundary.py.
enum TopKRest { kDrop = 0, kRenormalize = 1, kBucket = 2, kUniform = 3 };

// Sums over other classes: of exp((s_j - max) / T), exp(s_j - max) and s_j - max. The last is -inf if a class has logit
// -inf, and arbitrary if the loss does not use it. Then, of probability targets V, as in RowStats: the sums of V_j, of
// V_j (s_j - max) where s_j > -inf, and of V_j where s_j = -inf.
struct Others {
    double number, max, soft, sharp, linear, v, v_cross, v_blocked;
};

// The target, if kept, is the last kept entry. The arrays have room for kept + 1 entries.
struct TopKRow {
    int64_t kept; // without the target
    bool target_kept;
    const double *s, *t; // logits of the student (s[kept] is the target's), log-probabilities of the teacher
    double *e, *f;       // room for exponentials
    double* by;          // gradients; by[kept] is the target's, even if it was not kept
    const double* v;     // probabilities of these classes (v[kept] is the target's); null for class indices
    double s_target;
    Others rest;
    double v_sum;     // of all labels
    double log_share; // log u; -inf if nothing is left, or with renormalization
};

// The gradient of a class of the rest is soft exp((s_j - max) / T) + sharp exp(s_j - max) + constant - v V_j.
struct TopKResult {
    double parts[kRowParts];
    double soft, sharp, constant, v;
};

FKD_HD double larger_of(double x, double y) {
    return x > y ? x : y;
}

// The including file defines these with vectors: they take half of the time of a short row.
static double largest_of(const double* x, int64_t n); // -inf if n = 0; ignores NaN
static double exponentials(const double* x, int64_t n, double top, double scale, double* e); // returns their sum

// Exponentials of student or teacher at one scale, relative to the largest logit: `own` sums the entries, `rest` the
// others, and `moved` is the factor that rescales the others' sum.
struct TopKSide {
    double scale, top, own, moved, rest, log_rest, sum, log_sum; // log_sum is 0 if no class can occur
};

FKD_HD TopKSide topk_side(const double* x, double* e, int64_t entries, double others, double others_max, double scale) {
    TopKSide side = {scale, others != 0 ? others_max : -INFINITY, 0, 0, 0, -INFINITY, 0, 0};
    side.top = larger_of(largest_of(x, entries), side.top);
    if (side.top == -INFINITY) side.top = 0;
    side.own = exponentials(x, entries, side.top, scale, e); // exp((x_i - top) scale)
    if (others != 0) {
        const double moved = (others_max - side.top) * scale;
        side.moved = exp(moved);
        side.rest = others * side.moved;
        side.log_rest = log(others) + moved;
    }
    side.sum = side.own + side.rest;
    if (side.sum != 0) side.log_sum = log(side.sum);
    return side;
}

FKD_HD TopKSide student_side(const TopKRow& x, int64_t entries, const Others& rest, double sums, double scale) {
    return topk_side(x.s, x.e, entries, sums, rest.max, scale);
}

FKD_HD TopKSide teacher_side(const TopKRow& x, int64_t entries, double others, double scale) {
    return topk_side(x.t, x.f, entries, others, x.log_share, scale);
}

// The rest together with a target that was not kept.
FKD_HD Others with_target(const Others& rest, double s_target, double scale) {
    Others out = rest;
    out.number += 1;
    if (s_target == -INFINITY) {
        out.linear = -INFINITY;
        return out;
    }
    const bool some = rest.soft != 0;
    out.max = some ? larger_of(s_target, rest.max) : s_target;
    const double own = s_target - out.max, moved = some ? rest.max - out.max : 0;
    out.soft = (some ? rest.soft * exp(moved * scale) : 0) + exp(own * scale);
    out.sharp = (some ? rest.sharp * exp(moved) : 0) + exp(own);
    out.linear = rest.linear + rest.number * moved + own;
    return out;
}

// The value of a loss term, and the gradient of the other classes as in TopKResult.
struct TopKTerm {
    double value, soft, constant;
};

// weight T sum q_j (log q_j - log p_j) over the entries and the others, or without log q_j. d/ds_j = weight (p_j sum q
// - q_j). With kBucket the others are one class, and share its gradient in proportion to their probabilities.
FKD_HD TopKTerm soft_term(const TopKRow& x, int64_t entries, const Others& rest, TopKRest kind, const TopKSide& s,
                          const TopKSide& t, double weight, bool entropy) {
    const double T = 1 / s.scale, log_s = s.log_sum, log_t = t.log_sum;
    // Less than 1 with kDrop; 1 with kRenormalize, or NaN if the teacher is NaN.
    const double counting = kind == kDrop || kind == kRenormalize ? t.own / t.sum : 1;
    const double by_q = weight / t.sum, by_p = s.sum == 0 ? 0 : weight * counting / s.sum;
    TopKTerm out = {0, by_p * s.moved, 0};
    // One sum only: each addition waits for the previous one.
    const auto add = [&](double q, double log_q, double log_p) {
        if (log_q != -INFINITY) out.value += weighted(T * q, entropy ? log_q - log_p : -log_p);
    };
    for (int64_t i = 0; i < entries; ++i) {
        const double q = by_q * x.f[i];
        add(q, (x.t[i] - t.top) * t.scale - log_t, (x.s[i] - s.top) * s.scale - log_s);
        x.by[i] += by_p * x.e[i] - q;
    }
    if (rest.number == 0) return out;
    const double q = by_q * t.rest;
    if (kind == kBucket) {
        add(q, t.log_rest - log_t, s.log_rest - log_s);
        out.soft = rest.soft == 0 ? 0 : (by_p * s.rest - q) / rest.soft;
    } else if (kind == kUniform) {
        const double mean = rest.linear / rest.number + (rest.max - s.top);
        add(q, (x.log_share - t.top) * t.scale - log_t, mean * s.scale - log_s);
        out.constant = -q / rest.number;
    }
    return out;
}

// Jensen-Shannon as in row_losses.h, over the entries and the others as one more class.
FKD_HD TopKTerm jensen_shannon(const TopKRow& x, int64_t entries, const Others& rest, const TopKSide& s,
                               const TopKSide& t, double b) {
    const double T = 1 / s.scale, log_s = s.log_sum, log_t = t.log_sum, of_p = b == 1 ? 1 : 1 - b;
    const double log_b = log(b), log_of_p = log1p(-b);
    double value = 0, mean = 0;
    const auto slope = [&](double p, double q, double log_p, double log_q) {
        const double by_q = log_b + log_q, by_p = log_of_p + log_p;
        const bool more_q = by_q > by_p;
        const double mixed = more_q ? by_q + log1p(exp(by_p - by_q)) : by_p + log1p(exp(by_q - by_p));
        const double log_m = b == 1 ? log_q : mixed, h = p == 0 ? 0 : of_p * (log_p - log_m);
        value += p * h + (q == 0 || b == 1 ? 0 : b * q * (log_q - log_m));
        mean += p * h;
        return h;
    };
    for (int64_t i = 0; i < entries; ++i) {
        const double log_p = (x.s[i] - s.top) * s.scale - log_s, log_q = (x.t[i] - t.top) * t.scale - log_t;
        x.f[i] = slope(x.e[i] / s.sum, x.f[i] / t.sum, log_p, log_q);
    }
    TopKTerm out = {0, 0, 0};
    if (rest.number > 0) {
        const double p = s.rest / s.sum, h = slope(p, t.rest / t.sum, s.log_rest - log_s, t.log_rest - log_t);
        if (rest.soft != 0) out.soft = T * p * (h - mean) / rest.soft;
    }
    for (int64_t i = 0; i < entries; ++i)
        x.by[i] += T * (x.e[i] / s.sum) * (x.f[i] - mean);
    out.value = T * T * value;
    return out;
}

// weight T sum b_t (log b_t - log b_s) over (target, all others); kDrop omits the dropped probability from b_t. Return
// D = p_y sum b_t - q_y. d/ds_y = weight D and d/ds_j = -weight D p^_j.
FKD_HD double binary_term(const TopKRow& x, TopKRest kind, const TopKSide& s, const TopKSide& t, double weight,
                          double& value) {
    const Split p = split_at(x.s_target - s.top, s.scale, s.sum);
    Split q = split_at((x.target_kept ? x.t[x.kept] : x.log_share) - t.top, t.scale, t.sum);
    double q_log_rest = log_rest(q, t.sum);
    if (kind == kDrop) {
        q_log_rest = log_rest(q, t.own);
        if (t.sum != 0) q.rest *= t.own / t.sum;
        if (!x.target_kept) {
            q.p[0] = 0;
            q.log_p[0] = -INFINITY;
        }
    }
    value = binary_divergence(weight / s.scale, p, log_rest(p, s.sum), q, q_log_rest);
    const double total = q.p[0] + q.rest;
    return p.p[0] > 0.5 && q.p[0] > 0.5 ? q.rest - total * p.rest : total * p.p[0] - q.p[0];
}

FKD_HD double target_label(const TopKRow& x) {
    return x.v ? x.v[x.kept] : 1;
}

FKD_HD double sum_of_labels(const TopKRow& x) {
    double sum = target_label(x) + x.rest.v;
    for (int64_t i = 0; x.v && i < x.kept; ++i)
        sum += x.v[i];
    return sum;
}

// The labels' numbers; sums are relative to `top`.
FKD_HD RowStats label_stats(const TopKRow& x, double top) {
    RowStats stats = {};
    stats.v_target = target_label(x);
    stats.v_sum = x.v_sum;
    stats.v_blocked = x.rest.v_blocked;
    stats.v_free = x.rest.v - x.rest.v_blocked;
    if (stats.v_free != 0) stats.v_cross = x.rest.v_cross + stats.v_free * (x.rest.max - top);
    for (int64_t i = 0; x.v && i < x.kept; ++i) {
        const bool blocked = x.s[i] == -INFINITY;
        (blocked ? stats.v_blocked : stats.v_free) += x.v[i];
        if (!blocked) stats.v_cross += x.v[i] * (x.s[i] - top);
    }
    return stats;
}

// The teacher's log q_y and its cross-entropy with the labels, at temperature 1. Outside K, log q is -inf if `kind`
// drops or renormalizes.
struct TeacherAtOne {
    double log_target, cross_entropy;
};

FKD_HD TeacherAtOne teacher_at_one(const TopKRow& x, TopKRest kind) {
    const TopKSide t = teacher_side(x, x.kept + x.target_kept, x.rest.number + !x.target_kept, 1);
    double outside = x.log_share - t.top - t.log_sum;
    if (kind == kDrop || kind == kRenormalize) outside = t.sum == t.sum ? -INFINITY : t.sum;
    const double log_target = x.target_kept ? x.t[x.kept] - t.top - t.log_sum : outside;
    double ce = -weighted(target_label(x), log_target) - weighted(x.rest.v, outside);
    for (int64_t i = 0; x.v && i < x.kept; ++i)
        ce -= weighted(x.v[i], x.t[i] - t.top - t.log_sum);
    return {log_target, ce};
}

// The terms with the student's softmax at temperature 1: the CE and NKD's target term. Return WSLD's weight.
FKD_HD double sharp_terms(const TopKRow& x, const RowParams& params, TopKRest kind, TopKResult& out) {
    const int number = params.number >> kKindShift;
    const bool distilled = number == kNkd || number == kWsld;
    if (!distilled && params.ce_weight == 0) return 1;
    const TeacherAtOne t = distilled ? teacher_at_one(x, kind) : TeacherAtOne{};
    const TopKSide s = student_side(x, x.kept, x.rest, x.rest.sharp, 1);
    const Split p = split_at(x.s_target - s.top, 1, s.sum);
    RowStats stats = label_stats(x, s.top);
    if (params.label_smoothing != 0) {
        if (x.rest.number > 0) stats.linear = x.rest.linear + x.rest.number * (x.rest.max - s.top);
        for (int64_t i = 0; i < x.kept; ++i)
            stats.linear += x.s[i] - s.top;
    }
    RowResult ce = {};
    add_cross_entropy(stats, params, p, ce);
    out.parts[2] = ce.parts[2];
    double by_p = ce.raw, at_target = ce.raw_target, weight = 1;
    if (number == kNkd) {
        const double q = exp(t.log_target);
        out.parts[0] = -weighted(q, p.log_p[0]);
        by_p += q * p.p_scale;
        at_target -= q * p.rest;
    } else if (number == kWsld) {
        const double of_student = cross_entropy(stats, p, stats.v_cross);
        if (of_student != INFINITY) weight = -expm1(-of_student / (1e-7 + t.cross_entropy));
    }
    for (int64_t i = 0; i < x.kept; ++i)
        x.by[i] += by_p * x.e[i] + (x.v ? ce.constant - ce.v * x.v[i] : ce.constant);
    x.by[x.kept] += at_target;
    out.sharp = by_p * s.moved;
    out.constant = ce.constant;
    out.v = ce.v;
    return weight;
}

// A term over all classes at T: weight T times KL or the cross-entropy, or Jensen-Shannon.
FKD_HD double whole_term(const TopKRow& x, const RowParams& params, TopKRest kind, double weight, bool entropy,
                         TopKResult& out) {
    const double scale = 1 / params.temperature;
    const int64_t entries = x.kept + x.target_kept;
    const Others rest = x.target_kept ? x.rest : with_target(x.rest, x.s_target, scale);
    const TopKSide s = student_side(x, entries, rest, rest.soft, scale);
    const TopKSide t = teacher_side(x, entries, rest.number, scale);
    const bool js = params.number >> kKindShift == kJs;
    const TopKTerm term = js ? jensen_shannon(x, entries, rest, s, t, params.beta)
                             : soft_term(x, entries, rest, kind, s, t, weight, entropy);
    if (x.rest.soft != 0) out.soft += term.soft * exp((x.rest.max - rest.max) * scale);
    out.constant += term.constant;
    if (!x.target_kept) x.by[x.kept] += term.soft * exp((x.s_target - rest.max) * scale) + term.constant;
    return s.sum == 0 ? NAN : term.value + 0 * s.log_sum; // NaN if no class can occur, or the student is NaN
}

// A term over the non-target classes at T: weight T times KL or the cross-entropy. The softmaxes q^ and p^ renormalize,
// also with kDrop. DKD, whose term has the entropy, also has a term of the target against all others.
FKD_HD void hat_terms(const TopKRow& x, const RowParams& params, TopKRest kind, double weight, bool entropy,
                      TopKResult& out) {
    const double scale = 1 / params.temperature;
    const TopKSide s = student_side(x, x.kept, x.rest, x.rest.soft, scale);
    TopKSide t = teacher_side(x, x.kept, x.rest.number, scale);
    if (entropy) { // whatever alpha is: a NaN reaches the target too
        const double alpha = params.alpha * params.temperature;
        const double difference = binary_term(x, kind, s, t, alpha, out.parts[0]);
        const double by_p = s.sum == 0 ? 0 : -alpha * difference / s.sum;
        for (int64_t i = 0; i < x.kept; ++i)
            x.by[i] += by_p * x.e[i];
        out.soft += by_p * s.moved;
        x.by[x.kept] += alpha * difference;
    }
    if (kind == kDrop) {
        t.sum = t.own;
        t.log_sum = log(t.own);
        kind = kRenormalize;
    }
    if (params.classes == 2 || t.sum == 0) return; // a NaN is not 0, and spreads
    const TopKTerm term = soft_term(x, x.kept, x.rest, kind, s, t, weight, entropy);
    out.parts[1] = term.value;
    out.soft += term.soft;
    out.constant += term.constant;
}

// Whether a row has no value: a label is NaN, or no class of the teacher can occur, since all kept ones have
// probability 0 and the others have no share.
FKD_HD bool is_nothing(const TopKRow& x) {
    if (x.v_sum != x.v_sum) return true;
    if (x.log_share != -INFINITY) return false;
    for (int64_t i = 0; i < x.kept + x.target_kept; ++i)
        if (x.t[i] != -INFINITY) return false;
    return true;
}

FKD_HD TopKResult topk_loss(const TopKRow& x, const RowParams& params, TopKRest kind) {
    TopKResult out = {};
    const double T = params.temperature;
    if (is_nothing(x)) {
        for (double& part : out.parts)
            part = NAN;
        for (int64_t i = 0; i <= x.kept; ++i)
            x.by[i] = x.s[i] == -INFINITY ? 0 : NAN;
        out.soft = NAN;
        return out;
    }
    for (int64_t i = 0; i <= x.kept; ++i)
        x.by[i] = 0;
    const double weight = sharp_terms(x, params, kind, out);
    switch (params.number >> kKindShift) {
    case kNkd:
        hat_terms(x, params, kind, params.gamma * T, false, out);
        break;
    case kDkd:
        hat_terms(x, params, kind, params.beta * T, true, out);
        break;
    case kWsld:
        out.parts[0] = whole_term(x, params, kind, params.alpha * T * weight, false, out);
        break;
    case kKd:
    case kJs:
        out.parts[0] = whole_term(x, params, kind, T, true, out);
        break;
    default:
        __builtin_trap(); // a loss whose `rests` in the catalogue name a kernel that it has not
    }
    // A class with logit -inf has no gradient. This holds for the target too, and in rows without a value.
    for (int64_t i = 0; i <= x.kept; ++i)
        if (x.s[i] == -INFINITY) x.by[i] = 0;
    return out;
}

} // namespace FKD_ISA
} // namespace fused_kd

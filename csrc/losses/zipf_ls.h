// Zipf's label smoothing: from the statistics of a row to its loss parts and the coefficients of its gradient.
// fused_kd/backends/triton/kernels/zipf_ls.py has the same formulas in Triton.
//
// Notation beyond row_math.h: d_j = s_j - s_max. z_j = (best / rank_j)^power is the Zipf weight of a class, relative to
// the best rank among the non-target classes with logits > -inf; so no power makes it overflow, or makes all of them
// vanish. Nearly all classes have no vote and share the weight z_0. So each sum over z_j is a sum over all classes with
// weight z_0, plus what the voted classes add to it:
//   total = sum z_j    = z_0 number + more,           more         = sum of z_j - z_0 over the voted ones
//   sum z_j d_j        = z_0 linear + more_cross,     more_cross   = sum of (z_j - z_0) d_j
//   sum z_j log z_j    = z_0 log z_0 number + more_entropy
#pragma once

#include "../common/row_math.h"

namespace fused_kd {
namespace FKD_ISA {

struct ZipfWeight {
    double z, z_log_z;
};

// ratio: best / rank, at most 1 for a class that counts
FKD_HD ZipfWeight zipf_weight(double ratio, double power) {
    const double z = pow(ratio, power);
    return {z, weighted(z, power * log(ratio))};
}

struct ZipfStats : LabelStats<double> {
    double sum, number, linear; // over the non-target classes with logits > -inf: sums of exp(d_j), 1, d_j
    double more, more_cross, more_entropy;
    ZipfWeight unvoted; // z_0
};

// Loss parts, already weighted, and the gradient for j not a target:
//   d/ds_j = student * exp(d_j) + zipf * z_j - v V_j - constant
struct ZipfRow {
    double divergence, ce;
    double student, zipf, v, constant;
    double student_target[2];
};

// With z^ = z / total and p^ = exp(d) / sum, the softmax over the non-target classes:
//   beta KL(z^ || p^) = beta sum z^_j (log z_j - log total - d_j + log sum)
//                     = beta ((sum z_j log z_j - sum z_j d_j) / total + log(sum / total))
//   d/ds_j            = beta (p^_j - z^_j)[j not in Y] + d CE/ds_j
FKD_HD ZipfRow zipf_row(const ZipfStats& x, const HyperParameters& params, double classes,
                        const SplitSoftmax<double, 2>& p) {
    const CrossEntropy<double> ce = cross_entropy<double>(x, params, classes, p);
    ZipfRow out = {0, ce.loss, ce.sum * p.p_scale, 0, ce.v, ce.constant, {0, 0}};
    if (x.number > 1) { // the divergence over a single class is 0
        const double total = x.unvoted.z * x.number + x.more;
        const double entropy = x.unvoted.z_log_z * x.number + x.more_entropy;
        const double cross = x.unvoted.z * x.linear + x.more_cross;
        out.divergence = weighted(params.beta, (entropy - cross) / total + log(x.sum / total));
        out.student += params.beta / x.sum;
        out.zipf = -params.beta / total;
    }
    for (int k = 0; k < 2; ++k) // a class with logit -inf has no gradient
        out.student_target[k] = x.s_target[k] == -INFINITY ? 0 : ce.target[k];
    return out;
}

} // namespace FKD_ISA
} // namespace fused_kd

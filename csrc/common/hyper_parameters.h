// Hyper-parameters of all losses, by the names in their functions; each loss reads its own. fused_kd/core/options.py
// has the same fields in the same order.
#pragma once

namespace fused_kd {

struct HyperParameters {
    double alpha, beta, gamma, mu; // weights of terms
    double correct;                // Tf-KD: the probability of the target
    double power;                  // Zipf's label smoothing: the exponent of the rank
    double temperature, ce_weight, label_smoothing;
};

} // namespace fused_kd

// The target classes of a row. Included by sources compiled once per instruction set, like simd.h.
#pragma once

#include "rows.h"

namespace fused_kd {
namespace FKD_ISA {

// The targets of a row and their label values. targets_of puts the largest label first.
struct Targets {
    int count;
    Without<2> at;
    double label[2];
    double poison; // NaN if one of the probabilities is not finite, else 0
};

// For probabilities: the largest two entries that exceed the row's smallest, or fewer; the lower index first on ties.
template <class A>
FKD_NOINLINE Targets targets_of(const Matrix& target, int64_t row, int64_t classes, A* staging) {
    if (target.dtype == kInt64) {
        const int64_t y = *reinterpret_cast<const int64_t*>(element(target, row, 0));
        return {1, {{y, -1}}, {1, 0}, 0};
    }
    double smallest = INFINITY, poison = 0;
    for (int64_t j = 0; j < classes; j += kBlock<A>) {
        const int64_t n = block_length<A>(classes, j);
        const A* v = read(target, row, j, n, staging);
        Vec<A> low = splat<A>(-INFINITY);
        const Vec<A> lowest = low;
        Vec<A> nothing = {};
        for_lanes<A>(n, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
            const Vec<A> label = load(v + i, lanes);
            low = max_of(keep(lanes, -label, lowest), low);
            nothing = mul_add<A>(label, A(0), nothing);
        });
        poison += sum_lanes<A>(nothing);
        const double block_low = -double(max_lanes<A>(low));
        if (block_low < smallest) smallest = block_low;
    }
    Targets found = {0, {{-1, -1}}, {0, 0}, poison};
    for (int k = 0; k < 2; ++k) {
        const int64_t y = argmax(target, row, classes, staging, k ? found.at.at[0] : -1);
        if (y < 0) break;
        const double label = *read(target, row, y, 1, staging);
        if (!(label > smallest)) break;
        found.at.at[k] = y;
        found.label[k] = label;
        found.count = k + 1;
    }
    return found;
}

// Sorts a row's targets by class, as loops need them. Returns whether it swapped them.
FKD_INLINE bool sort_targets(Targets& targets) {
    if (targets.count < 2 || targets.at.at[0] < targets.at.at[1]) return false;
    targets = {2, {{targets.at.at[1], targets.at.at[0]}}, {targets.label[1], targets.label[0]}, targets.poison};
    return true;
}

// Reads a row's sorted targets into its statistics. LabelSums adds the rest of the probabilities.
template <class A>
FKD_INLINE void read_targets(const Matrix& student, int64_t row, const Targets& targets, A* staging,
                             LabelStats<double>& x) {
    x.targets = targets.count;
    for (int k = 0; k < 2; ++k) {
        const bool there = k < targets.count;
        x.s_target[k] = there ? double(*read(student, row, targets.at.at[k], 1, staging)) : -INFINITY;
        x.label[k] = targets.label[k];
        x.v_sum += targets.label[k];
    }
}

// Sums over the non-target probabilities p of a row's blocks; ds is log2(e) (s - s_max).
template <class A>
struct LabelSums {
    Vec<A> sum = {}, cross = {}, blocked = {};

    FKD_INLINE void add(Vec<A> p, Vec<A> ds, Mask<A> impossible) {
        const Vec<A> zero = {};
        sum += p;
        cross += impossible ? zero : p * ds;
        blocked += impossible ? p : zero;
    }
    FKD_INLINE void into(LabelStats<double>& x) const {
        const double of_all = sum_lanes<A>(sum), of_blocked = sum_lanes<A>(blocked);
        x.v_sum += of_all;
        x.v_blocked += of_blocked;
        x.v_free += of_all - of_blocked;
        x.v_cross += kLn2 * sum_lanes<A>(cross);
    }
};

} // namespace FKD_ISA
} // namespace fused_kd

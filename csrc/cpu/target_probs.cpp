// USKD's first pass: the targets' probabilities, because each row needs their means over the batch. Compiled once per
// instruction set.
#include "targets.h"

namespace fused_kd {
namespace FKD_ISA {
namespace {

template <class A>
void target_probs_typed(const TargetProbsArgs& args) {
    const int threads = useful_threads(args.threads, args.rows, args.classes);
    share_out(threads, args.rows, [&](int64_t begin, int64_t end) {
        A student[kBlock<A>], labels[kBlock<A>];
        for (int64_t row = begin; row < end; ++row) {
            double* const values = args.values + 2 * row;
            values[0] = values[1] = 0;
            if (!row_counts(args, row)) continue;
            Targets targets = targets_of<A>(args.target, row, args.classes, labels);
            values[0] = values[1] = targets.poison;
            const bool swapped = sort_targets(targets);
            double max = -INFINITY, sum = 0;
            for (int64_t j = 0; j < args.classes; j += kBlock<A>) {
                const int64_t n = block_length<A>(args.classes, j);
                const A* s = read(args.student, row, j, n, student);
                const Shift<A, true> shift(finite_or_zero(block_max<A>(s, n, targets.at.from(j))));
                const Vec<A> zero = {};
                Vec<A> part = zero;
                for_lanes<A>(n, targets.at.from(j), [&](auto lanes, int64_t l) __attribute__((always_inline)) {
                    const Vec<A> sj = load(s + l, lanes);
                    part += keep(lanes, sj == -A(INFINITY) ? zero : exp2_nonpositive<A>(shift(sj)), zero);
                });
                const double block_sum = sum_lanes<A>(part);
                if (block_sum == 0) continue;
                if (shift.origin > max) {
                    sum *= max == -INFINITY ? 0 : exp(max - shift.origin);
                    max = shift.origin;
                }
                sum += block_sum * exp(shift.origin - max);
            }
            double logits[2] = {-INFINITY, -INFINITY};
            for (int k = 0; k < targets.count; ++k)
                logits[k] = *read(args.student, row, targets.at.at[k], 1, student);
            const SplitSoftmax<double, 2> p = split_softmax<double, 2>(logits, finite_or_zero(max), sum);
            for (int k = 0; k < targets.count; ++k) {
                const double value = args.square ? p.p[k] * p.p[k] : p.p[k];
                values[swapped ? 1 - k : k] += value;
            }
        }
    });
}

} // namespace

void target_probs(const TargetProbsArgs& args) {
    args.accumulate == kFloat64 ? target_probs_typed<double>(args) : target_probs_typed<float>(args);
}

} // namespace FKD_ISA
} // namespace fused_kd

// USKD on rows: ranking, loss parts and both gradients in one visit to each row. Compiled once per instruction set.
//
// The exponentials of a row stay where the gradients will be, as in row_losses.cpp. But they are relative to the row's
// maxima, found in an earlier pass: relative to a block's maximum, equal logits in different blocks would get keys that
// differ by rounding. The exponentials give the rank keys, a sort (rank.h) the order of the classes, and a table of 1 /
// rank the Zipf weights. Then one pass sums the weights against the logits, and one writes the gradients. Sorting takes
// most of the time, so the loops here have one form only, with the exact shift and tests for logits -inf.
//
// A class with student logit -inf has a rank but no Zipf mass: the rest is renormalized and the loss stays finite.
#include "gradient_row.h"
#include "rank.h"
#include "targets.h"

namespace fused_kd {
namespace FKD_ISA {
namespace {

// The first pass: the targets' probabilities, because each row needs their means over the batch.
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

// Scratch of a thread: rows of exponentials, if the gradient's row cannot hold them, of keys and later Zipf weights,
// and of indices for the sort; a block of each input for conversion.
template <class A>
struct Scratch {
    A *e_s, *e_w, *keys, *student, *weak, *probs;
    uint32_t* order;

    explicit Scratch(int64_t classes) {
        const int64_t row = (classes + 63) / 64 * 64;
        const int64_t floats = (3 * row + 3 * kBlock<A>)*int64_t(sizeof(A));
        const int64_t indices = row * int64_t(sizeof(uint32_t));
        char* base = static_cast<char*>(thread_scratch(size_t(floats + indices)));
        e_s = reinterpret_cast<A*>(base);
        e_w = e_s + row;
        keys = e_w + row;
        student = keys + row;
        weak = student + kBlock<A>;
        probs = weak + kBlock<A>;
        order = reinterpret_cast<uint32_t*>(base + floats);
    }
};

// Computes the exponentials of a block, and adds its sums to the row's.
template <class A>
FKD_NOINLINE void block_sums(const A* s, const A* w, const A* v, int64_t n, const Without<2>& y, bool linear, A* e_s,
                             A* e_w, UskdStats<double>& row) {
    const Shift<A, true> s_shift(A(row.s_max)), w_shift(A(row.w_max));
    const Vec<A> zero = {};
    Vec<A> s_sum = zero, w_sum = zero, w_linear = zero, s_linear = zero, v_weak = zero;
    LabelSums<A> labels;
    for_lanes<A>(n, y, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        __builtin_prefetch(s + j + kBlock<A>);
        __builtin_prefetch(w + j + kBlock<A>);
        const Vec<A> sj = load(s + j, lanes), wj = load(w + j, lanes);
        const Vec<A> ds = s_shift(sj), dw = w_shift(wj);
        const Vec<A> es = keep(lanes, exp2_gradual<A>(ds), zero), ew = keep(lanes, exp2_gradual<A>(dw), zero);
        store(e_s + j, es, lanes);
        store(e_w + j, ew, lanes);
        s_sum += es;
        w_sum += ew;
        w_linear += keep(lanes, wj == -A(INFINITY) ? wj : dw, zero);
        if (linear) s_linear += keep(lanes, sj == -A(INFINITY) ? sj : ds, zero);
        if (v) {
            const Vec<A> p = keep(lanes, load(v + j, lanes), zero);
            labels.add(p, keep(lanes, ds, zero), sj == -A(INFINITY));
            v_weak = mul_add(p, keep(lanes, dw, zero), v_weak);
        }
    });
    row.s_sum += sum_lanes<A>(s_sum);
    row.w_sum += sum_lanes<A>(w_sum);
    row.w_linear += kLn2 * sum_lanes<A>(w_linear);
    row.s_linear += kLn2 * sum_lanes<A>(s_linear);
    if (!v) return;
    labels.into(row);
    row.v_rest += sum_lanes<A>(labels.sum);
    row.v_weak += kLn2 * sum_lanes<A>(v_weak);
}

// The exponential of a target's logit, as for other classes; 0 if the logit is above them.
template <class A>
FKD_INLINE A exponential(double logit, double max) {
    const Shift<A, true> shift{A(max)};
    return logit <= max && logit > -INFINITY ? exp2_gradual<A>(shift(splat(A(logit))))[0] : A(0);
}

// Computes the Zipf weights 1 / rank of all classes, targets too, ranked by key; e_s and e_w are the exponentials.
template <class A>
FKD_NOINLINE void weights_by_keys(const UskdArgs& args, const Scratch<A>& scratch, int64_t row, const Targets& targets,
                                  const UskdStats<double>& x, const SplitSoftmax<double, 2>& p,
                                  const SplitSoftmax<double, 2>& v, A* e_s, A* e_w) {
    const int64_t classes = args.classes;
    A* const z = scratch.keys;
    for (int k = 0; k < targets.count; ++k) {
        e_s[targets.at.at[k]] = exponential<A>(x.s_target[k], x.s_max);
        e_w[targets.at.at[k]] = exponential<A>(x.w_target[k], x.w_max);
    }
    const UskdKey<double> key = uskd_key(x, p, v, Rank(args.rank));
    const A by_student = A(key.student), by_weak = A(key.weak);
    for (int64_t j = 0; j < classes; j += kBlock<A>) {
        const int64_t n = block_length<A>(classes, j);
        if (key.linear != 0) {
            const A* s = read(args.student, row, j, n, scratch.student);
            const A linear = A(key.linear), constant = A(key.constant - key.linear * x.s_max);
            for_lanes<A>(n, [&](auto lanes, int64_t l) __attribute__((always_inline)) {
                const Vec<A> by_logit = mul_add<A>(load(s + l, lanes), linear, constant);
                store(z + j + l, mul_add<A>(load(e_w + j + l, lanes), by_weak, by_logit), lanes);
            });
        } else {
            for_lanes<A>(n, [&](auto lanes, int64_t l) __attribute__((always_inline)) {
                const Vec<A> of_student = load(e_s + j + l, lanes) * by_student;
                store(z + j + l, mul_add<A>(load(e_w + j + l, lanes), by_weak, of_student), lanes);
            });
        }
    }
    for (int k = 0; k < targets.count; ++k)
        if (key.above[k]) z[targets.at.at[k]] = A(key.target[k]);

    // The Zipf weights 1 / rank replace the keys.
    const A* const reciprocals = static_cast<const A*>(args.reciprocals);
    rank_descending(z, classes, scratch.order,
                    [=](uint32_t index, int64_t rank) __attribute__((always_inline)) { z[index] = reciprocals[rank]; });
}

template <class A>
FKD_NOINLINE void uskd_row_pass(const UskdArgs& args, const Scratch<A>& scratch, int64_t row, Targets targets) {
    const int64_t classes = args.classes;
    const bool with_probs = args.target.dtype != kInt64;
    const GradientRow<A> student(args.student_gradient.data, args.student.dtype, row, classes, scratch.e_s);
    const GradientRow<A> weak(args.weak_gradient.data, args.weak.dtype, row, classes, scratch.e_w);
    A *const e_s = student.exponentials, *const e_w = weak.exponentials, *const z = scratch.keys;
    double* const parts = args.parts + 4 * row;

    UskdStats<double> x = {};
    const bool swapped = sort_targets(targets); // the batch means are in order of the labels, the largest first
    const UskdParams params = {args.hyper, {args.mean[swapped], args.mean[!swapped]}, double(classes), args.square};
    const bool smoothed = args.hyper.ce_weight != 0 && args.hyper.label_smoothing != 0;
    read_targets(args.student, row, targets, scratch.student, x);
    for (int k = 0; k < 2; ++k)
        x.w_target[k] =
            k < targets.count ? double(*read(args.weak, row, targets.at.at[k], 1, scratch.weak)) : -INFINITY;

    A s_max = -A(INFINITY), w_max = s_max;
    for (int64_t j = 0; j < classes; j += kBlock<A>) {
        const int64_t n = block_length<A>(classes, j);
        const BothBlocks<A> both =
            read_largest(args.student, args.weak, row, j, n, targets.at.from(j), scratch.student, scratch.weak);
        s_max = both.s_largest > s_max ? both.s_largest : s_max;
        w_max = both.t_largest > w_max ? both.t_largest : w_max;
    }
    x.s_max = finite_or_zero(s_max);
    x.w_max = finite_or_zero(w_max);
    for (int64_t j = 0; j < classes; j += kBlock<A>) {
        const int64_t n = block_length<A>(classes, j);
        const A* s = read(args.student, row, j, n, scratch.student);
        const A* w = read(args.weak, row, j, n, scratch.weak);
        const A* v = with_probs ? read(args.target, row, j, n, scratch.probs) : nullptr;
        block_sums<A>(s, w, v, n, targets.at.from(j), smoothed, e_s + j, e_w + j, x);
    }
    if (args.label_sums) args.label_sums[row] = x.v_sum;
    const SplitSoftmax<double, 2> p = split_softmax<double, 2>(x.s_target, x.s_max, x.s_sum);
    const SplitSoftmax<double, 2> v = split_softmax<double, 2>(x.w_target, x.w_max, x.w_sum);

    // Without the batch means: a NaN there comes from another row, and reaches only the student's gradient.
    const double probe = p.rest + v.rest + x.v_sum;
    if (probe != probe) { // NaN: the row has no ranking and no value
        for (int k = 0; k < 4; ++k)
            parts[k] = NAN;
        student.fill_nan(args.student, row, scratch.student);
        weak.fill_nan(args.weak, row, scratch.weak);
        return;
    }

    weights_by_keys<A>(args, scratch, row, targets, x, p, v, e_s, e_w);

    double zipf_sum = 0, zipf_cross = 0;
    const A origin = A(x.s_max);
    const Vec<A> zero = {};
    for (int64_t j = 0; j < classes; j += kBlock<A>) {
        const int64_t n = block_length<A>(classes, j);
        const A* s = read(args.student, row, j, n, scratch.student);
        Vec<A> sum = zero, cross = zero;
        for_lanes<A>(n, targets.at.from(j), [&](auto lanes, int64_t l) __attribute__((always_inline)) {
            const Vec<A> sj = load(s + l, lanes);
            const Mask<A> impossible = sj == -A(INFINITY);
            const Vec<A> zj = keep(lanes, impossible ? zero : load(z + j + l, lanes), zero);
            store(z + j + l, zj, lanes);
            sum += zj;
            cross += impossible ? zero : zj * keep(lanes, sj - origin, zero);
        });
        zipf_sum += sum_lanes<A>(sum);
        zipf_cross += sum_lanes<A>(cross);
    }
    const UskdRow<double> result = uskd_row(x, params, p, v, zipf_sum, zipf_cross);

    const double* const factors = args.factors ? args.factors + row : nullptr;
    const double factor = factors ? factors[0] : 1;
    const double s_scale = args.student_gradient.scale * (factors ? factors[args.rows] : 1);
    const double w_scale = args.weak_gradient.scale * (factors && weak.data ? factors[2 * args.rows] : 1);
    for (int64_t j = 0; j < classes; j += kBlock<A>) {
        const int64_t n = block_length<A>(classes, j);
        const A* labels = with_probs ? read(args.target, row, j, n, scratch.probs) : nullptr;
        if (student.data) {
            const A a = A(result.student * s_scale), b = A(result.zipf * s_scale);
            // A class with logit -inf has no gradient: its exponential and weight are 0, but labels, smoothing or a
            // factor that is not finite may contribute.
            const bool look = labels || smoothed || !is_finite(a) || !is_finite(b);
            const A* s = look ? read(args.student, row, j, n, scratch.student) : nullptr;
            A* const out = student.block(j, scratch.weak);
            const A c = A(result.v * s_scale), constant = A(result.constant * s_scale);
            for_lanes<A>(n, [&](auto lanes, int64_t l) __attribute__((always_inline)) {
                Vec<A> g = mul_add<A>(load(e_s + j + l, lanes), a, load(z + j + l, lanes) * b);
                if (s) {
                    Vec<A> label = zero + constant;
                    if (labels) label = mul_add<A>(load(labels + l, lanes), c, label);
                    g = load(s + l, lanes) == -A(INFINITY) ? zero : g - label;
                }
                store(out + l, g, lanes);
            });
            student.finish(j, n, out);
        }
        if (weak.data) {
            const A* w = read(args.weak, row, j, n, scratch.weak);
            A* const out = weak.block(j, scratch.student);
            const A a = A(result.weak * w_scale);
            const A b = A(result.weak_constant * w_scale), c = A(result.weak_v * w_scale);
            for_lanes<A>(n, [&](auto lanes, int64_t l) __attribute__((always_inline)) {
                Vec<A> g = mul_add<A>(load(e_w + j + l, lanes), a, -b);
                if (labels) g = mul_add<A>(load(labels + l, lanes), -c, g);
                store(out + l, load(w + l, lanes) == -A(INFINITY) ? zero : g, lanes);
            });
            weak.finish(j, n, out);
        }
    }
    for (int k = 0; k < targets.count; ++k) {
        if (student.data) student.put(targets.at.at[k], A(result.student_target[k] * s_scale));
        if (weak.data) weak.put(targets.at.at[k], A(result.weak_target[k] * w_scale));
    }
    parts[0] = factor * result.target;
    parts[1] = factor * result.non_target;
    parts[2] = factor * result.weak_part;
    parts[3] = factor * result.ce;
}

template <class A>
void uskd_typed(const UskdArgs& args) {
    const int threads = useful_threads(args.threads, args.rows, args.classes);
    share_out(threads, args.rows, [&](int64_t begin, int64_t end) {
        const Scratch<A> scratch(args.classes);
        for (int64_t row = begin; row < end; ++row) {
            if (!row_counts(args, row)) {
                for (int k = 0; k < 4; ++k)
                    args.parts[4 * row + k] = 0;
                no_gradient(args.student_gradient, args.student.dtype, row, args.classes);
                no_gradient(args.weak_gradient, args.weak.dtype, row, args.classes);
                continue;
            }
            uskd_row_pass<A>(args, scratch, row, targets_of<A>(args.target, row, args.classes, scratch.probs));
        }
    });
}

} // namespace

void target_probs(const TargetProbsArgs& args) {
    args.accumulate == kFloat64 ? target_probs_typed<double>(args) : target_probs_typed<float>(args);
}

void uskd(const UskdArgs& args) {
    args.accumulate == kFloat64 ? uskd_typed<double>(args) : uskd_typed<float>(args);
}

} // namespace FKD_ISA
} // namespace fused_kd

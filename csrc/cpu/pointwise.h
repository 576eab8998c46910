// Losses whose gradient is not a combination of exponentials (row_losses.h). Once the softmaxes of a row are known,
// another loop sums functions of each class's probabilities; the gradient combines more such functions. Each loss is a
// policy in pointwise_losses.h and a function in row_losses.h. Included only by row_losses.cpp.
#pragma once

#include "pieces.h"
#include "pointwise_losses.h"

namespace fused_kd {
namespace FKD_ISA {
namespace {

// The softmax of a row, from the exponentials that block_stats stored.
struct RowSoftmax {
    double max, scale, p_scale, log_normalizer;

    // The factor of a block's exponentials.
    double by(double block_max) const { return scaled_exp(block_max - max, scale) * p_scale; }
};

// log(q / p) from logits: ((t - t_max) - ratio (s - s_max)) times the teacher's scale, plus a constant. If both have
// the same scale, the ratio is 1 and the difference is rounded once.
template <class A>
struct LogRatio {
    A s_max, t_max, minus_ratio, scale, constant;

    static LogRatio of(const RowSoftmax& s, const RowSoftmax& t) {
        const A s_max = A(s.max), t_max = A(t.max);
        const double moved = (s.max - double(s_max)) * s.scale - (t.max - double(t_max)) * t.scale;
        return {s_max, t_max, A(-s.scale / t.scale), A(t.scale), A(s.log_normalizer - t.log_normalizer + moved)};
    }
    FKD_INLINE Vec<A> operator()(Vec<A> s, Vec<A> t) const {
        return mul_add<A>(mul_add<A>(s - s_max, minus_ratio, t - t_max), scale, splat(constant));
    }
};

// What the batch's columns add to a row's h (ColumnArgs); mean_p is null if they add nothing.
template <class A>
struct Columns {
    const A *mean_p, *mean_q, *by_q, *by_p, *rounding;

    template <class Lanes>
    FKD_INLINE Vec<A> at(int64_t j, const Probabilities<A>& x, Lanes lanes) const {
        return mul_add(load(by_q + j, lanes), x.q - load(mean_q + j, lanes),
                       mul_add(load(by_p + j, lanes), x.p - load(mean_p + j, lanes), load(rounding + j, lanes)));
    }
    A at(int64_t j, A p, A q) const { return by_q[j] * (q - mean_q[j]) + by_p[j] * (p - mean_p[j]) + rounding[j]; }
};

template <class A>
Columns<A> columns_of(const void* data, int64_t classes) {
    const A* const first = static_cast<const A*>(data);
    if (!first) return {};
    return {first, first + classes, first + 2 * classes, first + 3 * classes, first + 4 * classes};
}

// A block of a row, and how to get the probabilities of its classes.
template <class A>
struct PointwiseBlock {
    const A *s, *t, *e_s;
    A* e_t;
    A by_s, by_t;
    LogRatio<A> log_ratio;
    A *log_ratios, *ratios; // written by prepare()
    int64_t start;          // in the row

    // A separate loop: together they are a chain of instructions longer than a processor looks ahead.
    template <class Policy>
    FKD_INLINE void prepare(int64_t n) const {
        const LogRatio<A> of = log_ratio;
        for_lanes<A>(n, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
            const Vec<A> d = of(load(s + j, lanes), load(t + j, lanes));
            store(log_ratios + j, d, lanes);
            if (Policy::kRatio) store(ratios + j, smaller_ratio<A>(d), lanes);
        });
    }
    template <class Lanes>
    FKD_INLINE Probabilities<A> at(int64_t j, Lanes lanes) const {
        return {load(e_s + j, lanes) * by_s, load(e_t + j, lanes) * by_t, load(log_ratios + j, lanes),
                load(ratios + j, lanes)};
    }
};

template <class A, class Policy>
FKD_NOINLINE void pointwise_sums(const Policy& given, const PointwiseBlock<A>& of, int64_t n, int64_t y,
                                 const Columns<A>& columns, const RowMoments* moments, PointwiseSums& out) {
    const Policy policy = given; // a copy: the compiler would read the original again after each store
    const PointwiseBlock<A> block = of;
    if (Policy::kLogRatio) block.template prepare<Policy>(n);
    const Vec<A> zero = {};
    Vec<A> sums[3] = {zero, zero, zero}, with_p[3] = {zero, zero, zero}, with_z[3] = {zero, zero, zero}, z = zero;
    const A mean = moments ? A(moments->mean) : A(0);
    for_lanes<A>(n, Without<1>{{y}}, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        const Probabilities<A> x = block.at(j, lanes);
        const Vec<A> p = keep(lanes, x.p, zero);
        Vec<A> terms[3] = {}, own[2] = {};
        policy.terms(x, terms, own);
        if constexpr (Policy::kKept) store(block.e_t + j, terms[0], lanes);
        for (int k = 0; k < 3; ++k)
            if (Policy::kTerms[k]) sums[k] += keep(lanes, terms[k], zero);
        const auto slope = [&](int k, Vec<A> f) __attribute__((always_inline)) {
            with_p[k] = mul_add(p, keep(lanes, f, zero), with_p[k]);
        };
        for (int k = Policy::kKept; k < Policy::kSlopes; ++k)
            slope(k, own[k]);
        const Vec<A> of_columns = columns.mean_p ? columns.at(block.start + j, x, lanes) : zero;
        if (columns.mean_p) slope(2, of_columns);
        if (moments) {
            const Vec<A> sj = load(block.s + j, lanes);
            const Vec<A> weight = sj == -A(INFINITY) ? zero : p * (sj - mean);
            for (int k = 0; k < Policy::kSlopes; ++k)
                with_z[k] = mul_add(weight, keep(lanes, own[k], zero), with_z[k]);
            with_z[2] = mul_add(weight, keep(lanes, of_columns, zero), with_z[2]);
            z += weight;
        }
    });
    if (Policy::kKept) with_p[0] = sums[0];
    for (int k = 0; k < 3; ++k) {
        const bool slope = k < Policy::kSlopes || (k == 2 && columns.mean_p);
        if (Policy::kTerms[k]) out.of[k] += sum_lanes<A>(sums[k]);
        if (slope) out.slopes[k] += sum_lanes<A>(with_p[k]);
        if (slope && moments) out.centred[k] += sum_lanes<A>(with_z[k]);
    }
    if (moments) out.z += sum_lanes<A>(z);
}

// p_j sum_k by_k (f_kj - mean_k).
template <class A, class Policy>
struct PointwiseGradient {
    const Policy& policy;
    const PointwiseBlock<A>& block;
    const Columns<A>& columns;
    A by[3], mean[3];

    template <class Lanes>
    FKD_INLINE Vec<A> operator()(int64_t j, Lanes lanes) const {
        static_assert(Policy::kKept || !Policy::kLogRatio, "only the sums have log(q / p) of each class");
        if constexpr (Policy::kKept)
            return (load(block.e_t + j, lanes) - load(block.e_s + j, lanes) * block.by_s * mean[0]) * by[0];
        const Probabilities<A> x = block.at(j, lanes);
        Vec<A> unused[3] = {}, slopes[2] = {};
        policy.terms(x, unused, slopes);
        Vec<A> h = mul_add<A>(slopes[0] - mean[0], by[0], (slopes[1] - mean[1]) * by[1]);
        if (columns.mean_p) h = mul_add<A>(columns.at(block.start + j, x, lanes) - mean[2], by[2], h);
        return x.p * h;
    }
};

// DIST recomputes a row in which C sum (p - 1 / C)^2, the square of p's deviation relative to its mean, is at most
// this.
constexpr double kFlat = 1.0 / 16384;

// The mean of n numbers. The mean of equal numbers is exact to the bit.
template <class A>
FKD_NOINLINE A mean_of(const A* x, int64_t n) {
    const A first = x[0];
    double sum = 0;
    for (int64_t start = 0; start < n; start += kBlock<A>) {
        Vec<A> sums = {};
        for_lanes<A>(block_length<A>(n, start), [&](auto lanes, int64_t j) __attribute__((always_inline)) {
            sums += keep(lanes, load(x + start + j, lanes) - first, Vec<A>{});
        });
        sum += sum_lanes<A>(sums);
    }
    return A(double(first) + sum / double(n));
}

// A row, once its softmaxes are known.
template <class A>
struct PointwiseRow {
    const RowArgs* args;
    const RowParams* params;
    const Scratch<A>* scratch;
    int64_t row, y, count; // count: of blocks
    const A* e_soft;
    Split p, q;
    RowSoftmax of_s, of_t;
    Columns<A> columns;
    SoftmaxOrigin origins[2];
    A row_means[2];                // of p and q
    bool fine;                     // the probabilities come from softmax_piece, in scratch->p and e_t
    double means[3], at_target[3]; // of the slopes; the slopes at the target
    double target_terms[3];        // what the target adds to the sums

    PointwiseBlock<A> block(int64_t i, bool with_s = true, bool with_t = true) const {
        const int64_t j = i * kBlock<A>, n = block_length<A>(args->classes, j);
        PointwiseBlock<A> out = {with_s ? read(args->student, row, j, n, scratch->student) : nullptr,
                                 with_t ? read(args->teacher, row, j, n, scratch->teacher) : nullptr,
                                 (fine ? scratch->p : e_soft) + j,
                                 scratch->e_t + j,
                                 A(of_s.by(scratch->blocks[i].s_max)),
                                 A(of_t.by(scratch->blocks[i].t_max)),
                                 LogRatio<A>::of(of_s, of_t),
                                 scratch->probs,
                                 scratch->gradient,
                                 j};
        if (fine) out.by_s = out.by_t = 1;
        return out;
    }
    void refine(const PointwiseBlock<A>& here, int64_t n) const {
        softmax_piece(here.s, n, origins[0], scratch->p + here.start, kBlock<A>);
        softmax_piece(here.t, n, origins[1], here.e_t, kBlock<A>);
    }
    // The target's terms, in double precision if the policy has it: in short rows the target is much of the loss.
    void find_target() {
        with_policy<double>(*params, row_means, [&](const auto& policy) { of_target(policy); });
    }
    template <class Policy>
    void of_target(const Policy& policy) {
        typedef typename Policy::Number N;
        const Vec<N> log_ratio = splat(N(q.log_p[0] - p.log_p[0]));
        Vec<N> terms[3] = {}, own[2] = {};
        const Probabilities<N> x = {splat(N(p.p[0])), splat(N(q.p[0])), log_ratio, smaller_ratio<N>(log_ratio)};
        policy.terms(x, terms, own);
        for (int k = 0; k < 3; ++k)
            target_terms[k] = terms[k][0];
        for (int k = 0; k < 2; ++k)
            at_target[k] = own[k][0];
    }
    PointwiseSums sums(const RowMoments* moments) {
        find_target(); // a long chain of instructions, which the processor executes beside the sums
        const PointwiseSums out = with_target(own_sums(moments));
        const double flat = kFlat / params->classes;
        if (!(params->number & kFine) || !(out.of[1] <= flat || out.of[2] <= flat)) return out;
        // Equal logits need equal probabilities, the target's too, and their mean must be exactly that number.
        for (int64_t i = 0; !fine && i < count; ++i) {
            const PointwiseBlock<A> here = block(i);
            refine(here, block_length<A>(args->classes, here.start));
        }
        fine = true;
        row_means[0] = mean_of(scratch->p, args->classes);
        row_means[1] = mean_of(scratch->e_t, args->classes);
        p.p[0] = scratch->p[y];
        q.p[0] = scratch->e_t[y];
        find_target();
        return with_target(block_sums(moments, false));
    }
    // The sums of the whole row, of which this is a piece.
    PointwiseSums merged_sums(const RowMoments* moments) {
        own_sums(moments); // fills the scratch
        find_target();
        return with_target(FKD_ISA::merged_sums(*args, row, scratch->of_pieces));
    }
    // The sums of this call's columns, without the target.
    PointwiseSums own_sums(const RowMoments* moments) {
        // The probabilities must equal, to the bit, those in the columns' means: in a column that does not vary, their
        // difference has the factor 1e8 and must be 0.
        fine = columns.mean_p != nullptr;
        return block_sums(moments, fine);
    }
    PointwiseSums block_sums(const RowMoments* moments, bool anew) const {
        PointwiseSums out = {};
        with_policy<A>(*params, row_means, [&](const auto& policy) {
            for (int64_t i = 0; i < count; ++i) {
                const PointwiseBlock<A> here = block(i);
                const int64_t n = block_length<A>(args->classes, here.start);
                if (anew) refine(here, n);
                pointwise_sums<A>(policy, here, n, y - here.start, columns, moments, out);
            }
        });
        if (columns.mean_p && y >= 0 && y < args->classes) out.column = columns.at(y, scratch->p[y], scratch->e_t[y]);
        return out;
    }
    PointwiseSums with_target(PointwiseSums out) {
        at_target[2] = out.column;
        for (int k = 0; k < 3; ++k) {
            out.of[k] += target_terms[k];
            out.slopes[k] += p.p[0] * at_target[k];
            means[k] = out.slopes[k];
            out.centred[k] -= means[k] * out.z;
        }
        return out;
    }
    double gradient_at_target(const double (&by)[3]) const {
        double h = 0;
        for (int k = 0; k < 3; ++k)
            h += by[k] * (at_target[k] - means[k]);
        return p.p[0] * h;
    }
    // Calls combine(student logits, PointwiseGradient) for a block. The logits are null unless asked for: no gradient
    // needs them, and those of half precision would be converted again.
    template <class F>
    void with_gradient(int64_t i, const double (&by)[3], bool with_logits, F combine) const {
        const PointwiseBlock<A> here = block(i, with_logits, false);
        with_policy<A>(*params, row_means, [&](const auto& policy) { combine(here.s, gradient(policy, here, by)); });
    }
    template <class Policy>
    PointwiseGradient<A, Policy> gradient(const Policy& policy, const PointwiseBlock<A>& here,
                                          const double (&by)[3]) const {
        return {policy, here, columns, {A(by[0]), A(by[1]), A(by[2])}, {A(means[0]), A(means[1]), A(means[2])}};
    }
};

inline SoftmaxOrigin origin_of(const Split& x, double target, double max, double scale, double sum, double valid) {
    const bool led = target > 0 || sum == 0; // the target has the largest logit
    return {led ? max + target : max, scale, (led ? x.p[0] : x.p_scale) * valid};
}

template <class A>
PointwiseRow<A> pointwise_row(const RowArgs& args, const RowParams& params, const Scratch<A>& scratch, int64_t row,
                              int64_t y, int64_t count, const A* e_soft, const RowStats& x, double s_max,
                              double t_max) {
    const Split p = split_at(x.s_target, x.soft_s, x.s_soft), q = split_at(x.t_target, x.soft_t, x.t_soft);
    // A NaN in the labels reaches every row's gradient, through the columns.
    const double valid = 1 + 0 * x.v_sum;
    const A share = A(1 / params.classes);
    const RowSoftmax of_s = {s_max, x.soft_s, p.p_scale, p.log_normalizer};
    const RowSoftmax of_t = {t_max, x.soft_t, q.p_scale, q.log_normalizer};
    return {&args,
            &params,
            &scratch,
            row,
            y,
            count,
            e_soft,
            p,
            q,
            of_s,
            of_t,
            columns_of<A>(args.columns, args.classes),
            {origin_of(p, x.s_target, s_max, x.soft_s, x.s_soft, valid),
             origin_of(q, x.t_target, t_max, x.soft_t, x.t_soft, 1)},
            {share, share},
            false,
            {},
            {},
            {}};
}

} // namespace
} // namespace FKD_ISA
} // namespace fused_kd

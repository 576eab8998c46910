// The row losses (row_losses.h): loss parts and gradient in one visit to each row. Compiled once per instruction set.
//
// A row is processed in blocks that fit in the first-level cache. The first pass computes each block's maxima, the
// exponentials relative to them, and sums. It stores the exponentials, in the gradient's row if the dtypes allow. Then
// the blocks' sums are merged, relative to the row's maxima and in double precision. The formulas of row_losses.h give
// the coefficients, and the second pass combines the stored exponentials. So logits are read once, no exponential is
// computed twice, and the error of a sum grows with the block's length, not the row's.
//
// A student logit of -inf breaks the fast sums (0 * inf), and a maximum beyond kLargestShift breaks the fast shift. The
// row's sums are then not finite, and `careful` loops, which leave these classes out, process the row again. They also
// process rows with NaN, which stay NaN.
//
// In a staged run (Piece), a call has some columns of each row and ends with their results. The next call merges the
// results of all pieces of a row, like blocks, and recomputes its exponentials.
#include "../losses/row_losses.h"
#include "pieces.h"
#include "pointwise.h"

namespace fused_kd {
namespace FKD_ISA {
namespace {

// The coefficients of the gradient's exponentials. With standardization, the gradient also has -slope * (s - mean).
struct Coefficients {
    double soft, sharp, teacher, raw, v, constant, slope, target;
    double slopes[3]; // of a pointwise loss
};

// The backward pass of the z-scores z = f (x - mean), f = 1 / (d + 1e-7), with d the deviation of n classes:
//   d/dx_j = f (g_j - sum(g) / n) - z_j sum(g z) / ((n - 1) d)
// The sum of g is 0 (a shift does not change a softmax) unless the student excludes a class that the teacher does not.
// The loops use x - about, with `about` the mean rounded to their precision; the difference is corrected here.
Coefficients standardized(const RowResult& r, const RowStats& x, const RowMoments& m, double about,
                          const Statistics& all, bool pointwise) {
    const double deviation = m.deviation(), off = about - m.mean, target = x.s_target + all.s_max - about;
    const double f = m.count > 1 ? 1 / (deviation + 1e-7) : 0; // a single class has z-score 0, whatever its logit
    const bool target_possible = x.s_target != -INFINITY;
    double sum = 0;
    if (!pointwise && (x.blocked > 0 || !target_possible))
        sum = r.soft * x.s_soft + r.sharp * x.s_sharp + r.teacher * (x.t_soft - x.blocked) + r.target;
    double with_z = r.soft * all.w_soft + r.sharp * all.w_sharp + r.teacher * all.w_teacher;
    for (int k = 0; pointwise && k < 3; ++k)
        with_z += r.slopes[k] * x.pointwise.centred[k];
    if (target_possible) with_z += r.target * target;
    with_z += off * sum;
    const double slope = deviation == 0 ? 0 : f * f * with_z / ((m.count - 1) * deviation);
    const double constant = -f * sum / m.count - slope * off;
    const double at_target = target_possible ? f * r.target + constant - slope * target : 0;
    return {f * r.soft,
            f * r.sharp,
            f * r.teacher,
            r.raw,
            r.v,
            r.constant + constant,
            slope,
            at_target + r.raw_target,
            {f * r.slopes[0], f * r.slopes[1], f * r.slopes[2]}};
}

// Multiplies a row's gradient by its factor, except the columns' slope, which already has one (ColumnArgs).
void weigh(RowResult& r, double factor) {
    double* const own[] = {&r.raw, &r.v, &r.constant, &r.raw_target, &r.slopes[0], &r.slopes[1]};
    for (double* each : own)
        *each *= factor;
}

// No term besides the exponentials.
struct NoMore {
    template <class Lanes>
    FKD_INLINE float operator()(int64_t, Lanes) const {
        return 0;
    }
};

template <class A, bool single, bool careful, Mode mode, class More>
FKD_INLINE void block_combine(const A* s, const A* v, int64_t n, const Coefficients& c, A mean, const A* e_soft,
                              const A* e_sharp, const A* e_raw, const A* e_t, A* out, const More& more) {
    const A soft = A(c.soft), sharp = A(c.sharp), teacher = A(c.teacher), raw = A(c.raw), minus_v = A(-c.v);
    const A constant = A(c.constant), minus_slope = A(-c.slope);
    constexpr bool general = is_general(mode);
    for_lanes<A>(n, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        Vec<A> g = {}, rest = {};
        if constexpr (mode == kPointwise)
            g = more(j, lanes);
        else if constexpr (mode != kAlone)
            g = load(e_t + j, lanes) * teacher;
        if constexpr (general) {
            rest += constant;
            if (v) rest = mul_add<A>(load(v + j, lanes), minus_v, rest);
            if (minus_slope != A(0)) rest = mul_add<A>(load(s + j, lanes) - mean, minus_slope, rest);
        }
        // Add the terms that cancel first: with z-scores these two may be 1e7 times the rest.
        g = mul_add<A>(load(e_soft + j, lanes), soft, g);
        if constexpr (general) g += rest;
        if constexpr (!single) g = mul_add<A>(load(e_sharp + j, lanes), sharp, g);
        if constexpr (general && !single)
            if (raw != A(0)) g = mul_add<A>(load(e_raw + j, lanes), raw, g);
        // A class with logit -inf has no gradient, also in rows without a value.
        if constexpr (careful) g = load(s + j, lanes) == -A(INFINITY) ? Vec<A>{} : g;
        store(out + j, g, lanes);
    });
}

template <class A, bool single, bool careful, Mode mode>
FKD_NOINLINE RowResult row_pass(const RowArgs& args, const Plan& plan, const Scratch<A>& scratch, int64_t row,
                                int64_t y) {
    constexpr bool general = is_general(mode), pointwise = mode == kPointwise;
    const int64_t classes = args.classes;
    const RowParams& params = plan.params;
    const RowNeeds& needs = plan.needs;
    const bool with_probs = general && args.target.dtype != kInt64;
    const bool wanted = args.gradient.data != nullptr;
    const DType out_type = args.student.dtype;
    char* gradient = row_of(args.gradient, out_type, row, classes);
    A* const own_row = reinterpret_cast<A*>(gradient);
    const bool same = out_type == dtype_of<A>();
    const bool streamed = same && args.rows * classes * int64_t(sizeof(A)) >= kStreamed;
    const bool over = args.gradient.data == args.student.data; // overwrites the logits, which are read again below
    // A second pass over the row: the first has stored the statistics, and no term needs the exponentials.
    const bool again = pointwise && args.statistics && !args.only_origins && params.ce_weight == 0;
    A* const e_soft = again ? scratch.p : wanted && same && !streamed && !over ? own_row : scratch.e_soft;

    const Piece* const piece = args.piece;
    RowMoments s_moments = {}, t_moments = {};
    if (general && params.standardize && piece) {
        s_moments = merged_moments(args, row, 0, scratch.of_pieces);
        t_moments = merged_moments(args, row, 1, scratch.of_pieces);
    } else if (general && params.standardize) {
        s_moments = row_moments<A>(args.student, row, classes, scratch.student);
        t_moments = row_moments<A>(args.teacher, row, classes, scratch.teacher);
    }
    const Scales scales = general && params.standardize ? scales_of(params, s_moments, t_moments) : plan.scales;

    const int64_t count = (classes + kBlock<A> - 1) / kBlock<A>;
    for (int64_t i = 0; i < count && !again; ++i) {
        const int64_t j = i * kBlock<A>;
        const int64_t n = block_length<A>(classes, j);
        // Without a gradient the exponentials are not needed again: overwrite the same few cache lines.
        const int64_t at = wanted || (pointwise && !args.only_origins) ? j : 0;
        block_stats<A, single, careful, mode>(read_block<A, mode>(args, row, j, n, y - j, with_probs, scratch), n,
                                              y - j, scales, needs, params.standardize ? &s_moments : nullptr,
                                              e_soft + at, scratch.e_sharp + at, scratch.e_raw + at, scratch.e_t + at,
                                              scratch.blocks[i]);
    }
    const bool here = y >= 0 && y < classes;
    Statistics merged;
    Statistics* all = scratch.blocks; // one block is the row
    if (again || piece || count != 1) all = &merged;
    if (again) {
        __builtin_memcpy(&merged, args.statistics + kStatisticsFields * row, sizeof merged);
        for (int64_t i = 0; i < count; ++i)
            scratch.blocks[i] = merged;
    } else if (all == &merged) {
        merged = merge(scratch.blocks, count, scales, single, general, needs.divergence);
    }
    if (here && !again) {
        all->s_target = *read(args.student, row, y, 1, scratch.student);
        all->t_target = mode == kAlone ? 0.0 : double(*read(args.teacher, row, y, 1, scratch.teacher));
        all->v_target = with_probs ? double(*read(args.target, row, y, 1, scratch.probs)) : 1.0;
    }
    const double shows = mode == kAlone ? all->linear : all->cross; // not finite if a class has logit -inf
    // Nor is the fast shift good enough for steep slopes in a row with one likely class: its exponential must be 1, so
    // that a class with the whole probability has p = 1 and no gradient.
    const bool certain = pointwise && needs.steep && all->s_soft < 1.01;
    if (!careful && (certain || !(is_finite(shows) && is_finite(all->s_soft))))
        return row_pass<A, single, true, mode>(args, plan, scratch, row, y);
    if (piece && piece->stage == kStatistics) {
        put(*all, 0, args, row);
        return {};
    }
    if (piece)
        merged = merge(of_pieces<Statistics>(piece->statistics, kStatisticsFields, 0, args, row, scratch.of_pieces),
                       piece->pieces, scales, single, general, needs.divergence);
    const double s_max = all->s_max, t_max = all->t_max;
    RowStats stats = row_stats(*all, scales, general);
    if (args.label_sums) args.label_sums[row] = stats.v_sum;
    PointwiseRow<A> probabilities;
    if constexpr (pointwise) {
        probabilities = pointwise_row<A>(args, params, scratch, row, y, count, e_soft, stats, s_max, t_max);
        for (int k = 0; args.origins && k < 2; ++k)
            args.origins[2 * row + k] = probabilities.origins[k];
        if (args.only_origins) {
            __builtin_memcpy(args.statistics + kStatisticsFields * row, all, sizeof *all);
            return {};
        }
        const RowMoments* const moments = params.standardize ? &s_moments : nullptr;
        if (piece && piece->stage == kSums) {
            put(probabilities.own_sums(moments), 0, args, row);
            return {};
        }
        stats.pointwise = piece ? probabilities.merged_sums(moments) : probabilities.sums(moments);
    }
    RowResult result = row_loss(stats, params);
    double factor = args.factors ? args.factors[args.rows + row] : 1;
    if constexpr (pointwise) {
        if (args.columns) {
            weigh(result, factor);
            factor = 1;
        }
        if (stats.s_target != -INFINITY) result.target = probabilities.gradient_at_target(result.slopes);
    }
    if (!wanted) return result;

    Coefficients c = {result.soft,
                      result.sharp,
                      result.teacher,
                      result.raw,
                      result.v,
                      result.constant,
                      0,
                      result.target + result.raw_target,
                      {result.slopes[0], result.slopes[1], result.slopes[2]}};
    if (general && params.standardize)
        c = standardized(result, stats, s_moments, double(A(s_moments.mean)), *all, pointwise);
    if (!needs.raw) {
        c.sharp += c.raw;
        c.raw = 0;
    }
    const double scale = args.gradient.scale * factor;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t j = i * kBlock<A>, n = block_length<A>(classes, j);
        const double ds = scratch.blocks[i].s_max - s_max, dt = scratch.blocks[i].t_max - t_max;
        Coefficients b = c;
        b.soft *= scale * scaled_exp(ds, scales.soft_s);
        if (single) {
            b.soft += c.sharp * scale * scaled_exp(ds, scales.soft_s);
        } else {
            b.sharp *= scale * scaled_exp(ds, scales.sharp_s);
            b.raw *= scale * scaled_exp(ds, 1);
        }
        b.teacher *= scale * scaled_exp(dt, scales.soft_t);
        b.v *= scale;
        b.constant *= scale;
        b.slope *= scale;
        for (int k = 0; k < 3; ++k)
            b.slopes[k] *= scale;
        const A* v = with_probs ? read(args.target, row, j, n, scratch.probs) : nullptr;
        A* out = same && !streamed ? own_row + j : scratch.gradient;
        const auto combine = [&](const A* s, const auto& more) {
            block_combine<A, single, careful, mode>(s, v, n, b, A(s_moments.mean), e_soft + j, scratch.e_sharp + j,
                                                    scratch.e_raw + j, scratch.e_t + j, out, more);
        };
        const bool with_logits = careful || b.slope != 0;
        if constexpr (pointwise)
            probabilities.with_gradient(i, b.slopes, with_logits, combine);
        else
            combine(with_logits ? read(args.student, row, j, n, scratch.student) : nullptr, NoMore());
        if (streamed)
            stream(out, n, own_row + j);
        else if (!same)
            write(out, n, gradient + j * element_size(out_type), out_type);
    }
    if (streamed) fence();
    const A at_target = A(c.target * scale);
    if (here) write(&at_target, 1, gradient + y * element_size(out_type), out_type);
    return result;
}

template <class A, bool single>
RowResult (*pass_for(const RowArgs& args, const Plan& plan))(const RowArgs&, const Plan&, const Scratch<A>&, int64_t,
                                                             int64_t) {
    const RowNeeds& needs = plan.needs;
    if (!needs.teacher) return row_pass<A, true, false, kAlone>;
    // For rows that may hardly vary, always careful: its shift is exact, so that a constant row stays constant.
    if (needs.pointwise)
        return needs.fine ? row_pass<A, single, true, kPointwise> : row_pass<A, single, false, kPointwise>;
    if (args.target.dtype != kInt64 || needs.linear || plan.params.standardize)
        return row_pass<A, single, false, kGeneral>;
    return needs.divergence ? row_pass<A, single, false, kDivergence> : row_pass<A, single, false, kCross>;
}

template <class A>
void row_losses_typed(const RowArgs& args) {
    const Piece* const piece = args.piece;
    const Plan plan({args.hyper, args.loss, double(all_classes(args)), args.standardize});
    const bool with_probs = args.target.dtype != kInt64;
    const auto pass = one_temperature(plan.params) ? pass_for<A, true>(args, plan) : pass_for<A, false>(args, plan);
    const int threads = useful_threads(args.threads, args.rows, args.classes);
    share_out(threads, args.rows, [&](int64_t begin, int64_t end) {
        const Scratch<A> scratch(args.classes, plan.needs, piece ? piece->pieces : 0);
        for (int64_t row = begin; row < end; ++row) {
            double* parts = args.parts + kRowParts * row;
            zero_padding(args.gradient, args.student.dtype, row, args.classes);
            if (!row_counts(args, row)) {
                for (int k = 0; k < kRowParts; ++k)
                    parts[k] = 0;
                if (args.origins) args.origins[2 * row].by = -1;
                no_gradient(args.gradient, args.student.dtype, row, args.classes);
                continue;
            }
            if (piece && piece->stage == kMoments) {
                put(row_moments<A>(args.student, row, args.classes, scratch.student), 0, args, row);
                put(row_moments<A>(args.teacher, row, args.classes, scratch.teacher), 3, args, row);
                continue;
            }
            int64_t y;
            if (piece) {
                y = piece->target[row] - piece->first_class;
            } else if (with_probs) {
                y = argmax(args.target, row, args.classes, scratch.probs);
                if (y < 0) y = 0; // every probability is NaN or -inf
            } else {
                y = *reinterpret_cast<const int64_t*>(element(args.target, row, 0));
            }
            const RowResult result = pass(args, plan, scratch, row, y);
            const double factor = args.factors ? args.factors[row] : 1;
            for (int k = 0; k < kRowParts; ++k)
                parts[k] = factor * result.parts[k];
        }
    });
}

} // namespace

void row_losses(const RowArgs& args) {
    args.accumulate == kFloat64 ? row_losses_typed<double>(args) : row_losses_typed<float>(args);
}

} // namespace FKD_ISA
} // namespace fused_kd

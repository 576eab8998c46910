// The statistics of a row: of each block, then merged. Included only by row_losses.cpp.
#pragma once

#include "../losses/row_losses.h"
#include "rows.h"

namespace fused_kd {
namespace FKD_ISA {
namespace {

// Variants of a block's loop. The first two serve class indices and plain logits. The others test what they need at run
// time: the general one, one for losses without a teacher, and one for pointwise losses.
enum Mode { kCross, kDivergence, kGeneral, kAlone, kPointwise };
constexpr bool is_general(Mode mode) {
    return mode == kGeneral || mode == kAlone || mode == kPointwise;
}

// Equal terms, of which logits far from 0 in half precision have many, all round in the same direction. So a lane adds
// this many terms, and then their sum to those before.
template <class A>
constexpr int64_t kChunk = 32 * kLanes<A>;

// Statistics of a part of a row (a block or a piece), without the target. Sums are relative to the part's own maxima,
// exponents in natural units of the soft scale. merge() combines parts. Triton's statistics have the same names.
struct Statistics {
    double s_max, t_max; // 0 if no class can occur
    double s_soft, t_soft, s_sharp, t_sharp, cross, blocked;
    double number, s_raw, linear, v_sum, v_cross, v_blocked, v_cross_t;
    double w_soft, w_sharp, w_teacher;   // sums of the exponentials times (s - mean)
    double s_target, t_target, v_target; // as given; 0 if the target is in another part
};
static_assert(sizeof(Statistics) == kStatisticsFields * sizeof(double), "all that crosses between stages is double");

// Scratch of a thread: a row of each kind of exponentials that is needed (the soft ones only if the gradient's row
// cannot hold them), a row of the student's probabilities if they are recomputed, a block of each input for conversion,
// and a block of the gradient.
template <class A>
struct Scratch {
    A *e_soft, *e_sharp, *e_raw, *e_t, *p;
    A *student, *teacher, *probs, *gradient;
    Statistics* blocks;
    double* of_pieces; // room for one record of each piece, of any kind

    Scratch(int64_t classes, const RowNeeds& needs, int64_t pieces) {
        const int64_t row = (classes + 63) / 64 * 64, kinds = 2 + needs.sharp + needs.raw + needs.fine;
        const size_t values = size_t(kinds * row + 4 * kBlock<A>);
        const int64_t records = classes / kBlock<A> + 1;
        const size_t bytes = values * sizeof(A) + size_t(records + pieces) * sizeof(Statistics);
        e_soft = static_cast<A*>(thread_scratch(bytes));
        e_t = e_soft + row;
        e_sharp = e_t + row * needs.sharp;
        e_raw = e_sharp + row * needs.raw;
        p = e_raw + row * needs.fine;
        student = e_soft + kinds * row;
        teacher = student + kBlock<A>;
        probs = teacher + kBlock<A>;
        gradient = probs + kBlock<A>;
        blocks = reinterpret_cast<Statistics*>(gradient + kBlock<A>);
        of_pieces = reinterpret_cast<double*>(blocks + records);
    }
};

// Moments over the classes with logits > -inf; `square` is the sum of (x - mean)^2.
struct RowMoments {
    double count, mean, square;

    double deviation() const { return count > 1 && square > 0 ? sqrt(square / (count - 1)) : 0 * square; } // unbiased
};

template <class A>
FKD_NOINLINE RowMoments row_moments(const Matrix& m, int64_t row, int64_t classes, A* staging) {
    // Relative to some logit first, so that a constant row stays constant; then relative to the mean, for precision.
    const int64_t largest = argmax(m, row, classes, staging);
    const double first = largest < 0 ? 0.0 : double(*read(m, row, largest, 1, staging));
    RowMoments out = {0, first, 0};
    for (int turn = 0; turn < 2; ++turn) {
        const A about = A(out.mean);
        double sum = 0, count = 0, square = 0;
        for (int64_t j = 0; j < classes; j += kBlock<A>) {
            const int64_t n = block_length<A>(classes, j);
            const A* x = read(m, row, j, n, staging);
            const Vec<A> zero = {}, one = zero + A(1);
            Vec<A> sums = zero, squares = zero, counts = zero;
            for_lanes<A>(n, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
                const Vec<A> xi = load(x + i, lanes);
                const Mask<A> impossible = xi == -A(INFINITY);
                const Vec<A> d = keep(lanes, impossible ? zero : xi - about, zero);
                sums += d;
                squares = mul_add(d, d, squares);
                counts += keep(lanes, impossible ? zero : one, zero);
            });
            sum += sum_lanes<A>(sums);
            square += sum_lanes<A>(squares);
            count += sum_lanes<A>(counts);
        }
        const double shift = count > 0 ? sum / count : 0;
        out.mean = double(about) + shift;
        out.count = count;
        out.square = square - count * shift * shift;
    }
    return out;
}

// Moments of a row from its parts, relative to the first part's mean, so that a constant row stays constant.
inline RowMoments merge(const RowMoments* parts, int64_t count) {
    RowMoments out = {0, 0, 0};
    double about = 0, sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (out.count == 0) about = parts[i].mean;
        out.count += parts[i].count;
        sum += parts[i].count * (parts[i].mean - about);
    }
    out.mean = out.count > 0 ? about + sum / out.count : about;
    for (int64_t i = 0; i < count; ++i) {
        const double shift = parts[i].mean - out.mean;
        out.square += parts[i].square + parts[i].count * shift * shift;
    }
    return out;
}

// The scales of the exponents (RowStats), and how to get the sharp and raw exponents from the soft ones.
struct Scales {
    double soft_s, soft_t, sharp_s, sharp_t;
    double ratio_s, ratio_t, ratio_raw;
    int squarings; // sharp = soft^(2^squarings) if not 0
};

inline bool sharp_is_distilled(const RowParams& params) {
    return params.number & kSharp;
}

// Whether no exponentials are needed besides the soft ones.
inline bool one_temperature(const RowParams& params) {
    const bool plain = !params.standardize || (sharp_is_distilled(params) && params.ce_weight == 0);
    return !row_needs(params).sharp || params.number & kAtOne || (params.temperature == 1 && plain);
}

inline Scales scales_of(const RowParams& params, const RowMoments& s, const RowMoments& t) {
    const double f_s = params.standardize ? 1 / (s.deviation() + 1e-7) : 1;
    const double f_t = params.standardize ? 1 / (t.deviation() + 1e-7) : 1;
    const double T = params.number & kAtOne ? 1 : params.temperature;
    Scales k = {f_s / T, f_t / T, 1, 1, 1, 1, 1, 0};
    if (sharp_is_distilled(params)) {
        k.sharp_s = f_s;
        k.sharp_t = f_t;
    }
    k.ratio_s = k.sharp_s / k.soft_s;
    k.ratio_t = k.sharp_t / k.soft_t;
    k.ratio_raw = 1 / k.soft_s;
    // Two multiplications instead of an exponential: e^x = (e^(x/4))^4.
    if (!params.standardize || sharp_is_distilled(params)) k.squarings = T == 2 ? 1 : T == 4 ? 2 : 0;
    return k;
}

// What all rows of a call share.
struct Plan {
    RowParams params;
    RowNeeds needs;
    Scales scales; // without standardization, which has scales for each row

    explicit Plan(const RowParams& params)
        : params(params), needs(row_needs(params)), scales(scales_of(params, {}, {})) {}
};

FKD_INLINE double scaled_exp(double difference, double scale) {
    return difference == 0 ? 1 : exp(difference * scale);
}

template <class A>
FKD_INLINE Vec<A> sharpen(Vec<A> e, Vec<A> exponent, int squarings, A ratio) {
    if (squarings == 0) return exp2_nonpositive<A>(exponent * ratio);
    for (int i = 0; i < squarings; ++i)
        e *= e;
    return e;
}

// A block of a row, with its labels if they are probabilities.
template <class A>
struct Block : BothBlocks<A> {
    const A* v;
};

template <class A, Mode mode>
FKD_INLINE Block<A> read_block(const RowArgs& args, int64_t row, int64_t j, int64_t n, int64_t y, bool with_probs,
                               const Scratch<A>& scratch) {
    const Without<1> without = {{y}};
    Block<A> out = {};
    if (with_probs) out.v = read(args.target, row, j, n, scratch.probs);
    BothBlocks<A>& both = out;
    if constexpr (mode == kAlone) {
        both.s = both.t = read_largest(args.student, row, j, n, without, scratch.student, both.s_largest);
        both.t_largest = both.s_largest;
    } else {
        both = read_largest(args.student, args.teacher, row, j, n, without, scratch.student, scratch.teacher);
    }
    return out;
}

template <class A, bool single, bool careful, Mode mode>
FKD_INLINE void block_stats(const Block<A>& block, int64_t n, int64_t y, const Scales& k, const RowNeeds& needs,
                            const RowMoments* moments, A* e_soft, A* e_sharp, A* e_raw, A* e_t, Statistics& out) {
    const A *const s = block.s, *const t = block.t, *const v = block.v;
    const A s_largest = block.s_largest, t_largest = block.t_largest;
    // Pointwise losses need fine exponentials: they take logarithms of them, and then differences.
    constexpr bool general = is_general(mode), alone = mode == kAlone, pointwise = mode == kPointwise;
    const bool divergence = mode == kDivergence || (mode == kGeneral && needs.divergence);
    // A pointwise loss only needs to know from it that all logits are finite.
    constexpr bool crossed = !alone && !(pointwise && careful);
    const bool teacher_sharp = mode == kCross || (mode == kGeneral && !needs.divergence);
    const Shift<A, careful> s_shift(finite_or_zero(s_largest), k.soft_s), t_shift(finite_or_zero(t_largest), k.soft_t);
    out.s_max = s_shift.origin;
    out.t_max = t_shift.origin;
    const Vec<A> zero = {}, nothing = zero - A(INFINITY);
    const A ratio_s = A(k.ratio_s), ratio_t = A(k.ratio_t), ratio_raw = A(k.ratio_raw);
    const int squarings = k.squarings;
    const A mean = moments ? A(moments->mean) : A(0);
    Vec<A> s_soft = zero, s_sharp = zero, t_soft = zero, t_sharp = zero, cross = zero, blocked = zero;
    Vec<A> s_raw = zero, linear = zero, v_sum = zero, v_cross = zero, v_blocked = zero, v_cross_t = zero;
    Vec<A> w_soft = zero, w_sharp = zero, w_teacher = zero;
    const auto add = [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        // Load the next block from memory while this one is computed. After the row's end comes the next row.
        __builtin_prefetch(s + j + kBlock<A>);
        if constexpr (!alone) __builtin_prefetch(t + j + kBlock<A>);
        const Vec<A> sj = load(s + j, lanes);
        const Vec<A> ds = s_shift(sj), dt = alone ? zero : t_shift(load(t + j, lanes));
        const Vec<A> es = keep(lanes, exp2_nonpositive<A, pointwise>(ds), zero);
        const Vec<A> et = alone ? zero : keep(lanes, exp2_nonpositive<A, pointwise>(dt), zero);
        store(e_soft + j, es, lanes);
        s_soft += es;
        if constexpr (!alone) {
            store(e_t + j, et, lanes);
            t_soft += et;
        }
        Vec<A> sharp = es;
        if constexpr (!single) {
            sharp = keep(lanes, sharpen<A>(es, ds, squarings, ratio_s), zero);
            store(e_sharp + j, sharp, lanes);
            s_sharp += sharp;
            if (teacher_sharp) t_sharp += keep(lanes, sharpen<A>(et, dt, squarings, ratio_t), zero);
        }
        const Mask<A> impossible = sj == -A(INFINITY);
        if constexpr (crossed) {
            Vec<A> exponent = keep(lanes, divergence ? ds - dt : ds, zero);
            if constexpr (careful) {
                // A class that the teacher excludes costs nothing, whatever the student's logit.
                exponent = impossible || et == zero ? zero : exponent;
                blocked += impossible ? et : zero;
            }
            cross = mul_add(et, exponent, cross);
        }
        if constexpr (general) {
            const Vec<A> possible = keep(lanes, impossible ? zero : ds, zero);
            if (needs.linear) linear += keep(lanes, impossible ? nothing : ds, zero);
            if (v) {
                const Vec<A> p = keep(lanes, load(v + j, lanes), zero);
                v_sum += p;
                v_cross = mul_add(p, possible, v_cross);
                v_blocked += impossible ? p : zero;
                if (teacher_sharp) { // -inf for a labelled class that the teacher excludes
                    const Vec<A> of_t = load(t + j, lanes) == -A(INFINITY) ? nothing : dt;
                    v_cross_t += p == zero ? zero : p * keep(lanes, of_t, zero);
                }
            }
            if (moments) {
                const Vec<A> centred = keep(lanes, impossible ? zero : sj - mean, zero);
                w_soft = mul_add(es, centred, w_soft);
                w_sharp = mul_add(sharp, centred, w_sharp);
                w_teacher = mul_add(et, centred, w_teacher);
                if (!single && needs.raw) {
                    const Vec<A> raw = keep(lanes, exp2_nonpositive<A>(ds * ratio_raw), zero);
                    store(e_raw + j, raw, lanes);
                    s_raw += raw;
                }
            }
        }
    };
    const auto for_sums = [&](auto f) __attribute__((always_inline)) {
        f(s_soft), f(t_soft), f(cross);
        if constexpr (!single) f(s_sharp), f(t_sharp);
        if constexpr (careful) f(blocked);
        if constexpr (general) {
            f(s_raw), f(linear), f(v_sum), f(v_cross), f(v_blocked), f(v_cross_t);
            f(w_soft), f(w_sharp), f(w_teacher);
        }
    };
    Vec<A> totals[15] = {};
    for (int64_t start = 0; start < n; start += kChunk<A>) {
        const int64_t length = n - start < kChunk<A> ? n - start : kChunk<A>;
        for_lanes<A>(length, Without<1>{{y}}.from(start),
                     [&](auto lanes, int64_t j) __attribute__((always_inline)) { add(lanes, start + j); });
        int i = 0;
        for_sums([&](Vec<A>& sum) __attribute__((always_inline)) {
            totals[i++] += sum;
            sum = zero;
        });
    }
    int i = 0;
    for_sums([&](Vec<A>& sum) __attribute__((always_inline)) { sum = totals[i++]; });
    const A s_reach = A(s_largest * k.soft_s), t_reach = A(t_largest * k.soft_t), limit = A(kLargestShift);
    const bool in_reach = s_reach < limit && s_reach > -limit && (alone || (t_reach < limit && t_reach > -limit));
    out.s_soft = careful || in_reach ? sum_lanes<A>(s_soft) : A(NAN); // makes row_pass process the row again
    out.t_soft = sum_lanes<A>(t_soft);
    out.s_sharp = single ? out.s_soft : double(sum_lanes<A>(s_sharp));
    out.t_sharp = single ? out.t_soft : double(sum_lanes<A>(t_sharp));
    out.cross = kLn2 * sum_lanes<A>(cross);
    out.blocked = careful ? sum_lanes<A>(blocked) : A(0);
    out.s_target = out.t_target = out.v_target = 0; // row_pass sets them
    if constexpr (general) {
        out.number = double(n - (y >= 0 && y < n));
        out.s_raw = sum_lanes<A>(s_raw);
        out.linear = kLn2 * sum_lanes<A>(linear);
        out.v_sum = sum_lanes<A>(v_sum);
        out.v_cross = kLn2 * sum_lanes<A>(v_cross);
        out.v_blocked = sum_lanes<A>(v_blocked);
        out.v_cross_t = kLn2 * sum_lanes<A>(v_cross_t);
        out.w_soft = sum_lanes<A>(w_soft);
        out.w_sharp = sum_lanes<A>(w_sharp);
        out.w_teacher = sum_lanes<A>(w_teacher);
    }
}

// The statistics of a row from its parts, blocks or pieces, relative to their common maxima.
FKD_NOINLINE Statistics merge(const Statistics* parts, int64_t count, const Scales& k, bool single, bool general,
                              bool divergence) {
    Statistics row = {};
    double s_max = -INFINITY, t_max = -INFINITY;
    for (int64_t i = 0; i < count; ++i) {
        // A part in which no class can occur has 0 as its maximum, which must not raise the row's.
        if (parts[i].s_max > s_max && parts[i].s_soft != 0) s_max = parts[i].s_max;
        if (parts[i].t_max > t_max && parts[i].t_soft != 0) t_max = parts[i].t_max;
    }
    row.s_max = finite_or_zero(s_max);
    row.t_max = finite_or_zero(t_max);
    for (int64_t i = 0; i < count; ++i) {
        const Statistics& b = parts[i];
        const double ds = b.s_max - row.s_max, dt = b.t_max - row.t_max;
        const double move_s = ds * k.soft_s, move_t = dt * k.soft_t;
        const double s_soft = scaled_exp(ds, k.soft_s), t_soft = scaled_exp(dt, k.soft_t);
        const double s_sharp = single ? s_soft : scaled_exp(ds, k.sharp_s);
        // Without a class that can occur, the factor may be inf, and the part's sums are 0.
        if (b.s_soft != 0) {
            row.s_soft += s_soft * b.s_soft;
            row.s_sharp += s_sharp * b.s_sharp;
            row.w_soft += s_soft * b.w_soft;
            row.w_sharp += s_sharp * b.w_sharp;
            if (general) row.s_raw += scaled_exp(ds, 1) * b.s_raw;
        }
        if (b.t_soft != 0) {
            row.t_soft += t_soft * b.t_soft;
            row.t_sharp += (single ? t_soft : scaled_exp(dt, k.sharp_t)) * b.t_sharp;
            row.cross += t_soft * (b.cross + (divergence ? move_s - move_t : move_s) * (b.t_soft - b.blocked));
            row.blocked += t_soft * b.blocked;
            row.w_teacher += t_soft * b.w_teacher;
        }
        row.s_target += b.s_target;
        row.t_target += b.t_target;
        row.v_target += b.v_target;
        if (!general) continue;
        row.number += b.number;
        row.linear += b.linear + move_s * b.number;
        row.v_sum += b.v_sum;
        row.v_cross += b.v_cross + move_s * (b.v_sum - b.v_blocked);
        row.v_blocked += b.v_blocked;
        row.v_cross_t += b.v_cross_t + move_t * b.v_sum;
    }
    return row;
}

// The statistics for the formulas: logits relative to the maxima, linear sums in units of logits.
inline RowStats row_stats(const Statistics& x, const Scales& k, bool general) {
    RowStats row = {};
    // NaN for a finite logit if the maximum is inf: only a class with logit -inf may have -inf here.
    row.s_target = x.s_target == -INFINITY ? -INFINITY : x.s_target - x.s_max + 0 * x.s_max;
    row.t_target = x.t_target - x.t_max;
    row.soft_s = k.soft_s;
    row.soft_t = k.soft_t;
    row.sharp_s = k.sharp_s;
    row.sharp_t = k.sharp_t;
    row.s_soft = x.s_soft;
    row.t_soft = x.t_soft;
    row.s_sharp = x.s_sharp;
    row.t_sharp = x.t_sharp;
    row.cross = x.cross;
    row.blocked = x.blocked;
    row.v_target = row.v_sum = x.v_target;
    if (general) {
        row.s_raw = x.s_raw;
        row.v_sum += x.v_sum;
        row.linear = x.linear / k.soft_s;
        row.v_cross = x.v_cross / k.soft_s;
        row.v_free = x.v_sum - x.v_blocked;
        row.v_blocked = x.v_blocked;
        row.v_cross_t = x.v_cross_t / k.soft_t;
    }
    return row;
}

} // namespace
} // namespace FKD_ISA
} // namespace fused_kd

// The statistics of a row, block by block, and how they are brought together. Included by row_losses.cpp alone.
#pragma once

#include "../losses/row_losses.h"
#include "rows.h"

namespace fused_kd {
namespace FKD_ISA {
namespace {

// What a block's loop does. The first two serve class indices and plain logits; the general one looks at what is asked
// of it as it goes, as the others do: of losses without a teacher, and of the pointwise ones.
enum Mode { kCross, kDivergence, kGeneral, kAlone, kPointwise };
constexpr bool is_general(Mode mode) {
    return mode == kGeneral || mode == kAlone || mode == kPointwise;
}

// Sums over a block's classes but the target, relative to the block's own maxima, exponents in natural units of the
// soft scale.
struct BlockStats {
    double s_max, t_max, s_soft, t_soft, s_sharp, t_sharp, cross, blocked;
    double count, s_raw, linear, v_sum, v_cross, v_blocked, v_cross_t, soft_s, sharp_s, teacher_s;
};

// Sums of the exponentials (soft, sharp, the teacher's) times s less its mean.
struct Products {
    double soft, sharp, teacher;
};

// Scratch of a thread: a row of each kind of exponentials, as far as they are needed (the soft ones only where the
// gradient's row cannot hold them), the student's probabilities where those are taken anew, a block of each input that
// is converted, and one of the gradient.
template <class A>
struct Scratch {
    A *e_soft, *e_sharp, *e_raw, *e_t, *p;
    A *student, *teacher, *probs, *gradient;
    BlockStats* blocks;

    Scratch(int64_t classes, const RowNeeds& needs) {
        const int64_t row = (classes + 63) / 64 * 64, kinds = 2 + needs.sharp + needs.raw + needs.fine;
        const size_t values = size_t(kinds * row + 4 * kBlock<A>);
        const size_t bytes = values * sizeof(A) + size_t(classes / kBlock<A> + 1) * sizeof(BlockStats);
        e_soft = static_cast<A*>(thread_scratch(bytes));
        e_t = e_soft + row;
        e_sharp = e_t + row * needs.sharp;
        e_raw = e_sharp + row * needs.raw;
        p = e_raw + row * needs.fine;
        student = e_soft + kinds * row;
        teacher = student + kBlock<A>;
        probs = teacher + kBlock<A>;
        gradient = probs + kBlock<A>;
        blocks = reinterpret_cast<BlockStats*>(gradient + kBlock<A>);
    }
};

struct RowMoments {
    double mean, deviation, count; // over the classes that can occur; the unbiased deviation
};

template <class A>
FKD_NOINLINE RowMoments row_moments(const Matrix& m, int64_t row, int64_t classes, A* staging) {
    // About some logit first, so that a constant row comes out as one; then about the mean, for the digits.
    const int64_t largest = argmax(m, row, classes, staging);
    const double first = largest < 0 ? 0.0 : double(*read(m, row, largest, 1, staging));
    RowMoments out = {first, 0, 0};
    double square = 0;
    for (int turn = 0; turn < 2; ++turn) {
        const A about = A(out.mean);
        double sum = 0, count = 0;
        square = 0;
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
        square -= count * shift * shift;
    }
    out.deviation = out.count > 1 && square > 0 ? sqrt(square / (out.count - 1)) : 0 * square;
    return out;
}

// The scales of the exponents (RowStats), and how the sharp and raw exponents come from the soft ones.
struct Scales {
    double soft_s, soft_t, sharp_s, sharp_t;
    double ratio_s, ratio_t, ratio_raw;
    int squarings; // sharp = soft^(2^squarings), where that holds; else 0
};

inline bool sharp_is_distilled(const RowParams& params) {
    return params.loss == kNkd || params.loss == kWsld;
}

// Whether the soft exponentials serve everything.
inline bool one_temperature(const RowParams& params) {
    const bool plain = !params.standardize || (sharp_is_distilled(params) && params.ce_weight == 0);
    return !row_needs(params).sharp || params.loss == kTfKd || (params.temperature == 1 && plain);
}

inline Scales scales_of(const RowParams& params, const RowMoments& s, const RowMoments& t) {
    const double f_s = params.standardize ? 1 / (s.deviation + 1e-7) : 1;
    const double f_t = params.standardize ? 1 / (t.deviation + 1e-7) : 1;
    const double T = params.loss == kTfKd ? 1 : params.temperature;
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

template <class A, bool single, bool careful, Mode mode>
FKD_INLINE void block_stats(const A* s, const A* t, const A* v, int64_t n, int64_t y, const Scales& k,
                            const RowNeeds& needs, const RowMoments* moments, A* e_soft, A* e_sharp, A* e_raw, A* e_t,
                            BlockStats& out) {
    constexpr bool general = is_general(mode), alone = mode == kAlone;
    const bool divergence = mode == kDivergence || (mode == kGeneral && needs.divergence);
    const bool teacher_sharp = mode == kCross || (mode == kGeneral && !needs.divergence);
    A s_largest, t_largest;
    block_max<A>(s, t, n, Without<1>{{y}}, s_largest, t_largest);
    const Shift<A, careful> s_shift(finite_or_zero(s_largest), k.soft_s), t_shift(finite_or_zero(t_largest), k.soft_t);
    out.s_max = s_shift.origin;
    out.t_max = t_shift.origin;
    const Vec<A> zero = {}, nothing = zero - A(INFINITY);
    const A ratio_s = A(k.ratio_s), ratio_t = A(k.ratio_t), ratio_raw = A(k.ratio_raw);
    const int squarings = k.squarings;
    const A mean = moments ? A(moments->mean) : A(0);
    Vec<A> s_soft = zero, s_sharp = zero, t_soft = zero, t_sharp = zero, cross = zero, blocked = zero;
    Vec<A> s_raw = zero, linear = zero, v_sum = zero, v_cross = zero, v_blocked = zero, v_cross_t = zero;
    Vec<A> soft_s = zero, sharp_s = zero, teacher_s = zero;
    for_lanes<A>(n, Without<1>{{y}}, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        // The next block comes from memory while this one is computed; past the row's end lies the next row.
        __builtin_prefetch(s + j + kBlock<A>);
        if constexpr (!alone) __builtin_prefetch(t + j + kBlock<A>);
        const Vec<A> sj = load(s + j, lanes);
        const Vec<A> ds = s_shift(sj), dt = alone ? zero : t_shift(load(t + j, lanes));
        const Vec<A> es = keep(lanes, exp2_nonpositive<A>(ds), zero);
        const Vec<A> et = alone ? zero : keep(lanes, exp2_nonpositive<A>(dt), zero);
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
        if constexpr (!alone) {
            Vec<A> exponent = keep(lanes, divergence ? ds - dt : ds, zero);
            if constexpr (careful) {
                // What the teacher excludes costs nothing, whatever the student says of it.
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
                if (teacher_sharp) v_cross_t += p == zero ? zero : p * keep(lanes, dt, zero);
            }
            if (moments) {
                const Vec<A> centred = keep(lanes, impossible ? zero : sj - mean, zero);
                soft_s = mul_add(es, centred, soft_s);
                sharp_s = mul_add(sharp, centred, sharp_s);
                teacher_s = mul_add(et, centred, teacher_s);
                if (!single && needs.raw) {
                    const Vec<A> raw = keep(lanes, exp2_nonpositive<A>(ds * ratio_raw), zero);
                    store(e_raw + j, raw, lanes);
                    s_raw += raw;
                }
            }
        }
    });
    const A s_reach = A(s_largest * k.soft_s), t_reach = A(t_largest * k.soft_t), limit = A(kLargestShift);
    const bool in_reach = s_reach < limit && s_reach > -limit && (alone || (t_reach < limit && t_reach > -limit));
    out.s_soft = careful || in_reach ? sum_lanes<A>(s_soft) : A(NAN); // has the row done again
    out.t_soft = sum_lanes<A>(t_soft);
    out.s_sharp = single ? out.s_soft : double(sum_lanes<A>(s_sharp));
    out.t_sharp = single ? out.t_soft : double(sum_lanes<A>(t_sharp));
    out.cross = kLn2 * sum_lanes<A>(cross);
    out.blocked = careful ? sum_lanes<A>(blocked) : A(0);
    if constexpr (general) {
        out.count = double(n - (y >= 0 && y < n));
        out.s_raw = sum_lanes<A>(s_raw);
        out.linear = kLn2 * sum_lanes<A>(linear);
        out.v_sum = sum_lanes<A>(v_sum);
        out.v_cross = kLn2 * sum_lanes<A>(v_cross);
        out.v_blocked = sum_lanes<A>(v_blocked);
        out.v_cross_t = kLn2 * sum_lanes<A>(v_cross_t);
        out.soft_s = sum_lanes<A>(soft_s);
        out.sharp_s = sum_lanes<A>(sharp_s);
        out.teacher_s = sum_lanes<A>(teacher_s);
    }
}

// The blocks' sums, brought to the row's maxima.
FKD_NOINLINE RowStats merge(const BlockStats* blocks, int64_t count, const Scales& k, bool single, bool general,
                            bool divergence, double& s_max, double& t_max, Products& products) {
    RowStats row = {};
    row.soft_s = k.soft_s;
    row.soft_t = k.soft_t;
    row.sharp_s = k.sharp_s;
    row.sharp_t = k.sharp_t;
    products = {};
    s_max = t_max = -INFINITY;
    for (int64_t i = 0; i < count; ++i) {
        // A block without a class that can occur reports 0 as its maximum, and must not raise the row's.
        if (blocks[i].s_max > s_max && blocks[i].s_soft != 0) s_max = blocks[i].s_max;
        if (blocks[i].t_max > t_max && blocks[i].t_soft != 0) t_max = blocks[i].t_max;
    }
    s_max = finite_or_zero(s_max);
    t_max = finite_or_zero(t_max);
    for (int64_t i = 0; i < count; ++i) {
        const BlockStats& b = blocks[i];
        const double ds = b.s_max - s_max, dt = b.t_max - t_max;
        const double move_s = ds * k.soft_s, move_t = dt * k.soft_t;
        const double s_soft = scaled_exp(ds, k.soft_s), t_soft = scaled_exp(dt, k.soft_t);
        const double s_sharp = single ? s_soft : scaled_exp(ds, k.sharp_s);
        if (b.s_soft != 0) {
            row.s_soft += s_soft * b.s_soft;
            row.s_sharp += s_sharp * b.s_sharp;
        }
        if (b.t_soft != 0) {
            row.t_soft += t_soft * b.t_soft;
            row.t_sharp += (single ? t_soft : scaled_exp(dt, k.sharp_t)) * b.t_sharp;
            row.cross += t_soft * (b.cross + (divergence ? move_s - move_t : move_s) * (b.t_soft - b.blocked));
            row.blocked += t_soft * b.blocked;
        }
        if (!general) continue;
        row.s_raw += scaled_exp(ds, 1) * b.s_raw;
        row.linear += b.linear + move_s * b.count;
        row.v_sum += b.v_sum;
        row.v_free += b.v_sum - b.v_blocked;
        row.v_cross += b.v_cross + move_s * (b.v_sum - b.v_blocked);
        row.v_blocked += b.v_blocked;
        row.v_cross_t += b.v_cross_t + move_t * b.v_sum;
        products.soft += s_soft * b.soft_s;
        products.sharp += s_sharp * b.sharp_s;
        products.teacher += t_soft * b.teacher_s;
    }
    if (general) { // in the logits' own units
        row.linear /= k.soft_s;
        row.v_cross /= k.soft_s;
        row.v_cross_t /= k.soft_t;
    }
    return row;
}

} // namespace
} // namespace FKD_ISA
} // namespace fused_kd

// NKD on rows: loss parts and gradient in one visit to each row. Compiled once per instruction set.
//
// A row is visited in blocks that fit in the first-level cache. The first pass takes each block's maxima, exponentials
// relative to them, and sums; the exponentials stay (in the gradient's own row where the dtypes allow it). Then the
// blocks' sums are brought to the row's maxima in double precision, the formulas of row_math.h give the coefficients,
// and the second pass combines the stored exponentials. So logits are read once, no exponential is computed twice, and
// the error of a sum grows with the block's length, not the row's.
//
// A class whose student logit is -inf breaks the fast sums (0 * inf), and a maximum beyond kLargestShift the fast
// shift; such a row shows by its sums not being finite and is done again with `careful` loops that leave those classes
// out. So is a row with NaN, which stays NaN.
#include "../row_math.h"
#include "rows.h"

namespace fused_kd {
namespace FKD_ISA {
namespace {

// A gradient of so many bytes leaves the caches before anyone reads it, so it is written past them.
constexpr int64_t kStreamed = int64_t(8) << 20;

struct BlockStats {
    double s_max, t_max, s_sum, s_sum_t, t_sum, t_sum_t, cross, blocked;
    double v_sum, v_cross, v_blocked;
};

// Scratch of a thread. e_s and e_st hold a row's exponentials of s - max and (s - max)/T, e_t those of (t -
// max)/T.
template <class A>
struct Scratch {
    A *e_s, *e_st, *e_t;          // a row each; e_s only where the gradient's row cannot hold it, e_st only if T != 1
    A *student, *teacher, *probs; // a block each, for inputs that are converted
    BlockStats* blocks;

    static size_t bytes(int64_t classes) {
        const int64_t rows = (classes + 63) / 64 * 64;
        return size_t(3 * rows + 3 * kBlock<A>) * sizeof(A) + size_t(classes / kBlock<A> + 1) * sizeof(BlockStats);
    }
    explicit Scratch(int64_t classes) {
        const int64_t rows = (classes + 63) / 64 * 64;
        e_s = static_cast<A*>(thread_scratch(bytes(classes)));
        e_st = e_s + rows;
        e_t = e_st + rows;
        student = e_t + rows;
        teacher = student + kBlock<A>;
        probs = teacher + kBlock<A>;
        blocks = reinterpret_cast<BlockStats*>(probs + kBlock<A>);
    }
};

template <class A, bool unit_t, bool careful, bool with_probs>
FKD_INLINE void block_stats(const A* s, const A* t, const A* v, int64_t n, int64_t y, A inv_t, A* e_s, A* e_st, A* e_t,
                            BlockStats& out) {
    A s_largest, t_largest;
    block_max<A>(s, t, n, Without<1>{{y}}, s_largest, t_largest);
    const Vec<A> zero = {};
    const Shift<A, careful> s_shift(finite_or_zero(s_largest)), t_shift(finite_or_zero(t_largest));
    out.s_max = s_shift.origin;
    out.t_max = t_shift.origin;
    Vec<A> s_sum = zero, s_sum_t = zero, t_sum = zero, t_sum_t = zero, cross = zero, blocked = zero;
    Vec<A> v_sum = zero, v_cross = zero, v_blocked = zero;
    for_lanes<A>(n, Without<1>{{y}}, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        // The next block comes from memory while this one is computed; past the row's end lies the next row.
        __builtin_prefetch(s + j + kBlock<A>);
        __builtin_prefetch(t + j + kBlock<A>);
        const Vec<A> sj = load(s + j, lanes);
        const Vec<A> ds = s_shift(sj), dt = t_shift(load(t + j, lanes));
        const Vec<A> es = keep(lanes, exp2_nonpositive<A>(ds), zero), et = keep(lanes, exp2_nonpositive<A>(dt), zero);
        store(e_s + j, es, lanes);
        s_sum += es;
        t_sum += et;
        Vec<A> weight = et;
        if constexpr (!unit_t) {
            const Vec<A> es_t = keep(lanes, exp2_nonpositive<A>(ds * inv_t), zero);
            weight = keep(lanes, exp2_nonpositive<A>(dt * inv_t), zero);
            store(e_st + j, es_t, lanes);
            s_sum_t += es_t;
            t_sum_t += weight;
        }
        store(e_t + j, weight, lanes);
        if constexpr (careful) {
            const Mask<A> impossible = sj == -A(INFINITY);
            cross += impossible ? zero : weight * keep(lanes, ds, zero);
            blocked += impossible ? weight : zero;
        } else {
            cross += weight * keep(lanes, ds, zero);
        }
        if constexpr (with_probs) {
            const Vec<A> p = keep(lanes, load(v + j, lanes), zero);
            const Mask<A> impossible = sj == -A(INFINITY);
            v_sum += p;
            v_cross += impossible ? zero : p * keep(lanes, ds, zero);
            v_blocked += impossible ? p : zero;
        }
    });
    const bool in_reach = s_largest < A(kLargestShift) && s_largest > A(-kLargestShift) &&
                          t_largest < A(kLargestShift) && t_largest > A(-kLargestShift);
    out.s_sum = careful || in_reach ? sum_lanes<A>(s_sum) : A(NAN); // has the row done again
    out.t_sum = sum_lanes<A>(t_sum);
    out.s_sum_t = unit_t ? out.s_sum : double(sum_lanes<A>(s_sum_t));
    out.t_sum_t = unit_t ? out.t_sum : double(sum_lanes<A>(t_sum_t));
    out.cross = kLn2 * sum_lanes<A>(cross);
    out.blocked = careful ? sum_lanes<A>(blocked) : A(0);
    if constexpr (with_probs) {
        out.v_sum = sum_lanes<A>(v_sum);
        out.v_cross = kLn2 * sum_lanes<A>(v_cross);
        out.v_blocked = sum_lanes<A>(v_blocked);
    }
}

// The blocks' sums, brought to the row's maxima.
FKD_NOINLINE NkdStats<double> merge(const BlockStats* blocks, int64_t count, double inv_t, bool with_probs) {
    NkdStats<double> row = {};
    row.s_max = row.t_max = -INFINITY;
    for (int64_t i = 0; i < count; ++i) {
        // A block without a class that can occur reports 0 as its maximum, and must not raise the row's.
        if (blocks[i].s_max > row.s_max && blocks[i].s_sum != 0) row.s_max = blocks[i].s_max;
        if (blocks[i].t_max > row.t_max && blocks[i].t_sum != 0) row.t_max = blocks[i].t_max;
    }
    row.s_max = finite_or_zero(row.s_max);
    row.t_max = finite_or_zero(row.t_max);
    for (int64_t i = 0; i < count; ++i) {
        const BlockStats& b = blocks[i];
        const double ds = b.s_max - row.s_max, dt = b.t_max - row.t_max;
        const double s_scale = ds == 0 ? 1 : exp(ds), s_scale_t = ds == 0 ? 1 : exp(ds * inv_t);
        const double t_scale = dt == 0 ? 1 : exp(dt), t_scale_t = dt == 0 ? 1 : exp(dt * inv_t);
        if (b.s_sum != 0) {
            row.s_sum += s_scale * b.s_sum;
            row.s_sum_t += s_scale_t * b.s_sum_t;
        }
        if (b.t_sum != 0) {
            row.t_sum += t_scale * b.t_sum;
            row.t_sum_t += t_scale_t * b.t_sum_t;
            row.cross += t_scale_t * (b.cross + ds * (b.t_sum_t - b.blocked));
            row.blocked += t_scale_t * b.blocked;
        }
        if (with_probs) {
            row.v_sum += b.v_sum;
            row.v_free += b.v_sum - b.v_blocked;
            row.v_cross += b.v_cross + ds * (b.v_sum - b.v_blocked);
            row.v_blocked += b.v_blocked;
        }
    }
    return row;
}

template <class A, bool unit_t, bool careful, bool with_probs>
FKD_INLINE void block_combine(const A* s, const A* v, int64_t n, A a, A b, A c, A minus_v, const A* e_s, const A* e_st,
                              const A* e_t, A* out) {
    for_lanes<A>(n, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        Vec<A> others = load(e_t + j, lanes) * c;
        if constexpr (with_probs) others += load(v + j, lanes) * minus_v;
        if constexpr (careful) { // a class that cannot occur has no gradient
            const Vec<A> zero = {};
            others = load(s + j, lanes) == -A(INFINITY) ? zero : others;
        }
        Vec<A> g = load(e_s + j, lanes) * a + others;
        if constexpr (!unit_t) g += load(e_st + j, lanes) * b;
        store(out + j, g, lanes);
    });
}

template <class A, bool unit_t, bool careful, bool with_probs>
FKD_NOINLINE NkdRow<double> nkd_row_pass(const NkdArgs& args, const Scratch<A>& scratch, int64_t row, int64_t y) {
    const int64_t classes = args.classes;
    const double inv_t = 1.0 / args.temperature;
    const bool wanted = args.gradient != nullptr;
    const DType out_type = args.student.dtype;
    char* gradient = static_cast<char*>(args.gradient) + row * classes * element_size(out_type);
    A* const own_row = reinterpret_cast<A*>(gradient);
    const bool same = out_type == dtype_of<A>();
    const bool streamed = same && args.rows * classes * int64_t(sizeof(A)) >= kStreamed;
    A* const e_s = wanted && same && !streamed ? own_row : scratch.e_s;

    int64_t count = 0;
    for (int64_t j = 0; j < classes; j += kBlock<A>, ++count) {
        const int64_t n = block_length<A>(classes, j);
        const A* s = read(args.student, row, j, n, scratch.student);
        const A* t = read(args.teacher, row, j, n, scratch.teacher);
        const A* v = with_probs ? read(args.target, row, j, n, scratch.probs) : nullptr;
        // Without a gradient the exponentials are of no further use: keep overwriting the same few lines of
        // cache.
        const int64_t at = wanted ? j : 0;
        block_stats<A, unit_t, careful, with_probs>(s, t, v, n, y - j, A(inv_t), e_s + at, scratch.e_st + at,
                                                    scratch.e_t + at, scratch.blocks[count]);
    }
    NkdStats<double> stats = merge(scratch.blocks, count, inv_t, with_probs);
    stats.s_target = *read(args.student, row, y, 1, scratch.student);
    stats.t_target = *read(args.teacher, row, y, 1, scratch.teacher);
    stats.v_target = with_probs ? double(*read(args.target, row, y, 1, scratch.probs)) : 1.0;
    stats.v_sum += stats.v_target;
    const NkdParams params = {args.gamma, args.temperature, args.ce_weight, classes == 2};
    const NkdRow<double> result = nkd_row(stats, params);
    if (!careful && !(stats.cross - stats.cross == 0 && stats.s_sum - stats.s_sum == 0))
        return nkd_row_pass<A, unit_t, true, with_probs>(args, scratch, row, y);

    if (wanted) {
        const double scale = args.gradient_scale;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t j = i * kBlock<A>, n = block_length<A>(classes, j);
            const double ds = scratch.blocks[i].s_max - stats.s_max, dt = scratch.blocks[i].t_max - stats.t_max;
            const double s_scale = ds == 0 ? 1 : exp(ds), s_scale_t = ds == 0 ? 1 : exp(ds * inv_t);
            const double t_scale_t = dt == 0 ? 1 : exp(dt * inv_t);
            double a = result.a * s_scale, b = result.b * s_scale_t;
            if (unit_t) a += b;
            const A* s = careful ? read(args.student, row, j, n, scratch.student) : nullptr;
            const A* v = with_probs ? read(args.target, row, j, n, scratch.probs) : nullptr;
            A* out = same && !streamed ? own_row + j : scratch.teacher;
            block_combine<A, unit_t, careful, with_probs>(s, v, n, A(a * scale), A(b * scale),
                                                          A(result.c * t_scale_t * scale), A(-result.v * scale),
                                                          e_s + j, scratch.e_st + j, scratch.e_t + j, out);
            if (streamed)
                stream(out, n, own_row + j);
            else if (!same)
                write(out, n, gradient + j * element_size(out_type), out_type);
        }
        if (streamed) fence();
        const A at_target = A(result.gradient_target * scale);
        write(&at_target, 1, gradient + y * element_size(out_type), out_type);
    }
    return result;
}

template <class A>
void nkd_typed(const NkdArgs& args) {
    const bool with_probs = args.target.dtype != kInt64, unit_t = args.temperature == 1.0;
    const int threads = useful_threads(args.threads, args.rows, args.classes);
    (void)threads;
#pragma omp parallel num_threads(threads)
    {
        const Scratch<A> scratch(args.classes);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < args.rows; ++row) {
            double* parts = args.parts + 3 * row;
            int64_t y;
            if (with_probs) {
                y = argmax(args.target, row, args.classes, scratch.probs);
                if (y < 0) y = 0; // every probability is NaN or -inf
            } else {
                y = *reinterpret_cast<const int64_t*>(element(args.target, row, 0));
                if (y == args.ignore_index) {
                    parts[0] = parts[1] = parts[2] = 0;
                    if (args.gradient) {
                        const int64_t bytes = args.classes * element_size(args.student.dtype);
                        __builtin_memset(static_cast<char*>(args.gradient) + row * bytes, 0, size_t(bytes));
                    }
                    continue;
                }
            }
            NkdRow<double> result;
            if (with_probs)
                result = unit_t ? nkd_row_pass<A, true, false, true>(args, scratch, row, y)
                                : nkd_row_pass<A, false, false, true>(args, scratch, row, y);
            else
                result = unit_t ? nkd_row_pass<A, true, false, false>(args, scratch, row, y)
                                : nkd_row_pass<A, false, false, false>(args, scratch, row, y);
            parts[0] = result.target;
            parts[1] = result.non_target;
            parts[2] = result.ce;
        }
    }
}

} // namespace

void nkd(const NkdArgs& args) {
    args.accumulate == kFloat64 ? nkd_typed<double>(args) : nkd_typed<float>(args);
}

} // namespace FKD_ISA
} // namespace fused_kd

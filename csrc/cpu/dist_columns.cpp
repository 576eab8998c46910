// DIST's term of the batch's columns: for each class, the correlation of the student's probabilities with the teacher's
// over the rows that count, and its gradient. Compiled once per instruction set.
//
// A thread processes a block of columns for all rows, in the rows' order, so the result does not depend on the number
// of threads. It recomputes the softmaxes from the logits and each row's SoftmaxOrigin. It sums differences from the
// first row that counts, in double precision: sums of the probabilities themselves would cancel if a column hardly
// varies.
#include "../losses/row_losses.h"
#include "rows.h"

namespace fused_kd {
namespace FKD_ISA {
namespace {

// Columns of a block. Their sums fit in the first-level cache beside a piece of two rows.
constexpr int64_t kTogether = 256;
constexpr int kTotals = 5; // sums of x, y, x^2, y^2, xy
// Rows that are summed before double precision, with half as many lanes, takes over.
constexpr int kFew = 8;

// Whether a column varies by more than rounding. Equal rows may differ by an ulp, because a sum leaves out its target.
template <class A>
bool varies(double squares, double by_n, double mean) {
    constexpr double ulp = sizeof(A) == 8 ? 0x1p-52 : 0x1p-23;
    const double least = 1.5 * ulp * mean;
    return !(squares * by_n <= least * least); // NaN spreads
}

template <class A>
FKD_NOINLINE void column_block(const ColumnArgs& args, int64_t start, int64_t n) {
    alignas(64) A staging[kTogether], p[kTogether], q[kTogether], first_p[kTogether], first_q[kTogether];
    alignas(64) A few[kTotals][kTogether] = {};
    alignas(64) double sums[kTotals][kTogether] = {};
    int64_t counted = 0;
    const auto flush = [&] {
        for (int k = 0; k < kTotals; ++k)
            for (int64_t j = 0; j < n; ++j) {
                sums[k][j] += double(few[k][j]);
                few[k][j] = 0;
            }
    };
    for (int64_t row = 0; row < args.rows; ++row) {
        const SoftmaxOrigin* const of = args.origins + 2 * row;
        if (of[0].by < 0) continue;
        softmax_piece<A>(read(args.student, row, start, n, staging), n, of[0], p, args.student.row_stride);
        softmax_piece<A>(read(args.teacher, row, start, n, staging), n, of[1], q, args.teacher.row_stride);
        if (counted++ == 0) {
            __builtin_memcpy(first_p, p, sizeof(A) * size_t(n));
            __builtin_memcpy(first_q, q, sizeof(A) * size_t(n));
        }
        for_lanes<A>(n, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
            const Vec<A> x = load(p + j, lanes) - load(first_p + j, lanes);
            const Vec<A> y = load(q + j, lanes) - load(first_q + j, lanes);
            store(few[0] + j, load(few[0] + j, lanes) + x, lanes);
            store(few[1] + j, load(few[1] + j, lanes) + y, lanes);
            store(few[2] + j, mul_add(x, x, load(few[2] + j, lanes)), lanes);
            store(few[3] + j, mul_add(y, y, load(few[3] + j, lanes)), lanes);
            store(few[4] + j, mul_add(x, y, load(few[4] + j, lanes)), lanes);
        });
        if (counted % kFew == 0) flush();
    }
    flush();
    if (counted == 0) return;
    A* const out = static_cast<A*>(args.columns) + start;
    // d/dp of -T gamma mean(correlations), times the column factor.
    const double factor = args.column_factor ? *args.column_factor : double(counted);
    const double weight = -args.hyper.gamma * args.hyper.temperature * factor / double(args.num_classes);
    for (int64_t j = 0; j < n; ++j) {
        const double by_n = 1 / double(counted), x = sums[0][j] * by_n, y = sums[1][j] * by_n;
        const double xx = sums[2][j] - sums[0][j] * x, yy = sums[3][j] - sums[1][j] * y;
        const bool p_varies = varies<A>(xx, by_n, first_p[j] + x), q_varies = varies<A>(yy, by_n, first_q[j] + y);
        const double xy = p_varies && q_varies ? sums[4][j] - sums[0][j] * y : 0;
        Correlation r = correlation(xy, p_varies ? xx : 0, q_varies ? yy : 0);
        if (!q_varies) r.by_b = 0; // q - mean q is only rounding
        args.correlations[start + j] = r.value;
        const double mean_p = double(first_p[j]) + x, mean_q = double(first_q[j]) + y;
        const A by_q = A(weight * r.by_b), by_p = A(-weight * r.by_a);
        out[j] = A(mean_p);
        out[args.classes + j] = A(mean_q);
        out[2 * args.classes + j] = by_q;
        out[3 * args.classes + j] = by_p;
        // The slopes of a column add to 0 over the rows. Of nearly parallel columns they are small differences.
        out[4 * args.classes + j] =
            A(double(by_q) * (double(A(mean_q)) - mean_q) + double(by_p) * (double(A(mean_p)) - mean_p));
    }
}

} // namespace

void dist_columns(const ColumnArgs& args) {
    const int64_t blocks = (args.classes + kTogether - 1) / kTogether;
    const int threads = useful_threads(args.threads, blocks, args.rows * kTogether);
    share_out(threads, blocks, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t start = i * kTogether, rest = args.classes - start, n = rest < kTogether ? rest : kTogether;
            args.accumulate == kFloat64 ? column_block<double>(args, start, n) : column_block<float>(args, start, n);
        }
    });
}

} // namespace FKD_ISA
} // namespace fused_kd

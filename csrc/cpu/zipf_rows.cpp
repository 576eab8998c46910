// Zipf's label smoothing on rows: votes, their ranks, loss parts and gradient in one visit to each row. Compiled once
// per instruction set.
//
// The exponentials of a row stay where the gradient will be. A row has at most as many voted classes as positions, and
// all others share a Zipf weight. So the passes over a row treat every class as one without a vote. Then the sums get
// what the voted classes add (zipf_ls.h), and their gradients are overwritten.
//
// A class with student logit -inf has a rank but no Zipf mass: the rest is renormalized and the loss stays finite.
#include "../losses/zipf_ls.h"
#include "gradient_row.h"
#include "targets.h"
#include "votes.h"

namespace fused_kd {
namespace FKD_ISA {
namespace {

// Scratch of a thread: a row of exponentials, if the gradient's row cannot hold them, a block of each input for
// conversion, a block of the gradient, the votes, and the exponentials of the voted classes.
template <class A>
struct Scratch {
    A *e, *student, *probs, *gradient, *e_voted;
    VoteScratch votes;

    Scratch(int64_t classes, int64_t positions) {
        const int64_t row = (classes + 63) / 64 * 64, most = positions < classes ? positions : classes;
        const int64_t floats = row + 3 * kBlock<A>;
        const size_t bytes = size_t(floats + most) * sizeof(A) + size_t(positions + 1) * sizeof(ZipfWeight) +
                             size_t(classes + most + positions + 1) * sizeof(uint32_t);
        e = static_cast<A*>(thread_scratch(bytes));
        student = e + row;
        probs = student + kBlock<A>;
        gradient = probs + kBlock<A>;
        votes.weights = reinterpret_cast<ZipfWeight*>(e + floats);
        e_voted = reinterpret_cast<A*>(votes.weights + positions + 1);
        votes.votes = reinterpret_cast<uint32_t*>(e_voted + most);
        votes.voted = votes.votes + classes;
        votes.classes_with = votes.voted + most;
    }
};

// Computes the exponentials of a block, and adds its sums to the row's.
template <class A>
FKD_NOINLINE void block_sums(const A* s, const A* v, int64_t n, const Without<2>& y, double s_max, A* e,
                             ZipfStats& row) {
    const Shift<A, true> shift{A(s_max)};
    const A origin = A(s_max);
    const Vec<A> zero = {}, one = zero + A(1);
    Vec<A> sum = zero, number = zero, linear = zero;
    LabelSums<A> labels;
    for_lanes<A>(n, y, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        const Vec<A> sj = load(s + j, lanes), ds = shift(sj);
        const Vec<A> ej = keep(lanes, exp2_nonpositive<A>(ds), zero);
        const Mask<A> impossible = sj == -A(INFINITY);
        store(e + j, ej, lanes);
        sum += ej;
        number += keep(lanes, impossible ? zero : one, zero);
        linear += keep(lanes, impossible ? zero : sj - origin, zero);
        if (v) labels.add(keep(lanes, load(v + j, lanes), zero), keep(lanes, ds, zero), impossible);
    });
    row.sum += sum_lanes<A>(sum);
    row.number += sum_lanes<A>(number);
    row.linear += sum_lanes<A>(linear);
    if (v) labels.into(row);
}

// Adds the voted classes' differences from an unvoted class to the sums. Returns how many voted classes are not targets
// and have logits > -inf; only these stay in the scratch.
template <class A>
FKD_NOINLINE int64_t add_voted(const ZipfArgs& args, const Scratch<A>& scratch, int64_t row, const Targets& targets,
                               int64_t voted, double s_max, const A* e, ZipfStats& x) {
    const VoteScratch& votes = scratch.votes;
    int64_t kept = 0;
    for (int64_t i = 0; i < voted; ++i) {
        const uint32_t j = votes.voted[i];
        if (targets.at.at[0] != j && targets.at.at[1] != j &&
            *read(args.student, row, j, 1, scratch.student) != -A(INFINITY))
            votes.voted[kept++] = j;
    }
    vote_weights(kept, args.positions, args.hyper.power, votes);
    x.unvoted = votes.weights[0];
    for (int64_t i = 0; i < kept; ++i) {
        const int64_t j = votes.voted[i];
        const double s = *read(args.student, row, j, 1, scratch.student);
        const ZipfWeight weight = votes.weights[votes.votes[j]];
        x.more += weight.z - x.unvoted.z;
        x.more_cross += (weight.z - x.unvoted.z) * (s - s_max);
        x.more_entropy += weight.z_log_z - x.unvoted.z_log_z;
        scratch.e_voted[i] = e[j];
    }
    return kept;
}

template <class A>
FKD_NOINLINE void zipf_row_pass(const ZipfArgs& args, const Scratch<A>& scratch, int64_t row, Targets targets) {
    const int64_t classes = args.classes;
    const bool with_probs = args.target.dtype != kInt64;
    const GradientRow<A> gradient(args.gradient.data, args.student.dtype, row, classes, scratch.e);
    A* const e = gradient.exponentials;
    double* const parts = args.parts + 2 * row;

    ZipfStats x = {};
    sort_targets(targets);
    read_targets(args.student, row, targets, scratch.student, x);
    A largest = -A(INFINITY);
    for (int64_t j = 0; j < classes; j += kBlock<A>) {
        const int64_t n = block_length<A>(classes, j);
        A of_block;
        read_largest(args.student, row, j, n, targets.at.from(j), scratch.student, of_block);
        largest = of_block > largest ? of_block : largest;
    }
    const double s_max = finite_or_zero(largest);
    for (int64_t j = 0; j < classes; j += kBlock<A>) {
        const int64_t n = block_length<A>(classes, j);
        const A* s = read(args.student, row, j, n, scratch.student);
        const A* v = with_probs ? read(args.target, row, j, n, scratch.probs) : nullptr;
        block_sums<A>(s, v, n, targets.at.from(j), s_max, e + j, x);
    }
    const bool all_possible = x.number == double(classes - targets.count);
    x.s_linear = all_possible ? x.linear : -INFINITY;
    if (args.label_sums) args.label_sums[row] = x.v_sum;
    const SplitSoftmax<double, 2> p = split_softmax<double, 2>(x.s_target, s_max, x.sum);
    Matrix dense = args.dense;
    dense.data = element({dense.data, dense.dtype, args.dense_stride, 1}, row, 0);
    // The original logits are compared: float32 represents every other format.
    const Votes votes = dense.dtype == kFloat64
                            ? count_votes<double>(dense, args.positions, classes, scratch.student, scratch.votes)
                            : count_votes<float>(dense, args.positions, classes, scratch.student, scratch.votes);
    const bool infinite = !(x.s_target[0] < INFINITY && x.s_target[1] < INFINITY); // or NaN
    const double probe = x.sum + x.v_sum;
    if (votes.nan || infinite || probe != probe) { // the row has no value
        parts[0] = parts[1] = NAN;
        gradient.fill_nan(args.student, row, scratch.gradient);
        return;
    }
    const int64_t voted = add_voted(args, scratch, row, targets, votes.voted, s_max, e, x);
    const ZipfRow result = zipf_row(x, args.hyper, double(classes), p);
    const double factor = args.factors ? args.factors[row] : 1;
    parts[0] = factor * result.divergence;
    parts[1] = factor * result.ce;
    if (!gradient.data) return;

    const double scale = args.gradient.scale * (args.factors ? args.factors[args.rows + row] : 1);
    const A a = A(result.student * scale), b = A((result.zipf * x.unvoted.z - result.constant) * scale);
    const A c = A(-result.v * scale);
    for (int64_t j = 0; j < classes; j += kBlock<A>) {
        const int64_t n = block_length<A>(classes, j);
        const A* s = all_possible ? nullptr : read(args.student, row, j, n, scratch.student);
        const A* v = with_probs ? read(args.target, row, j, n, scratch.probs) : nullptr;
        A* const out = gradient.block(j, scratch.gradient);
        for_lanes<A>(n, [&](auto lanes, int64_t l) __attribute__((always_inline)) {
            const Vec<A> zero = {};
            Vec<A> g = mul_add<A>(load(e + j + l, lanes), a, b);
            if (v) g = mul_add<A>(load(v + l, lanes), c, g);
            if (s) g = load(s + l, lanes) == -A(INFINITY) ? zero : g;
            store(out + l, g, lanes);
        });
        gradient.finish(j, n, out);
    }
    for (int64_t i = 0; i < voted; ++i) {
        const int64_t j = scratch.votes.voted[i];
        const double z = scratch.votes.weights[scratch.votes.votes[j]].z;
        Vec<A> g = mul_add<A>(splat(scratch.e_voted[i]), a, A((result.zipf * z - result.constant) * scale));
        if (with_probs) g = mul_add<A>(splat(*read(args.target, row, j, 1, scratch.probs)), c, g);
        gradient.put(j, g[0]);
    }
    for (int k = 0; k < targets.count; ++k)
        gradient.put(targets.at.at[k], A(result.student_target[k] * scale));
}

template <class A>
void zipf_ls_typed(const ZipfArgs& args) {
    const int threads = useful_threads(args.threads, args.rows, args.classes * (args.positions + 1));
    share_out(threads, args.rows, [&](int64_t begin, int64_t end) {
        const Scratch<A> scratch(args.classes, args.positions);
        for (int64_t row = begin; row < end; ++row) {
            if (!row_counts(args, row)) {
                args.parts[2 * row] = args.parts[2 * row + 1] = 0;
                no_gradient(args.gradient, args.student.dtype, row, args.classes);
                continue;
            }
            zipf_row_pass<A>(args, scratch, row, targets_of<A>(args.target, row, args.classes, scratch.probs));
        }
    });
}

} // namespace

void zipf_ls(const ZipfArgs& args) {
    args.accumulate == kFloat64 ? zipf_ls_typed<double>(args) : zipf_ls_typed<float>(args);
}

} // namespace FKD_ISA
} // namespace fused_kd

// The first pass over a row with a top-k teacher: the sums over the rest, of each block, then merged. Included only by
// topk_rows.cpp.
#pragma once

#include "../losses/topk_losses.h"
#include "rows.h"

namespace fused_kd {
namespace FKD_ISA {
namespace {

// Sums over the rest in a block: the number of classes, the exponentials relative to `max`, and, if needed, s - max
// over the logits > -inf and the number of logits -inf; of probability targets, the sums of Others.
struct RestBlock {
    double number, max, soft, sharp, linear, blocked, v, v_cross, v_blocked;
};

struct TopKNeeds {
    bool sharp, linear;
};

inline TopKNeeds topk_needs(const RowParams& params, TopKRest rest) {
    const bool ce = params.ce_weight != 0;
    return {(params.number & kSharp || ce) && params.temperature != 1,
            rest == kUniform || (ce && params.label_smoothing != 0)};
}

// Whether the target has probabilities.
inline bool has_labels(const TopKArgs& args) {
    return args.target.dtype != kInt64;
}

// Scratch of a thread: a row of each kind of exponentials, a block of the student, of the gradient and of the labels,
// the teacher's row, and a record of each block. For the left-out classes: the arrays of TopKRow, their columns, and
// their entries sorted by block, of which order[from[i]] up to order[from[i + 1]] are in block i.
template <class A>
struct Scratch {
    A *e_soft, *e_sharp, *student, *gradient, *labels, *teacher;
    double *s, *t, *e, *f, *by, *v;
    RestBlock* blocks;
    int64_t *at, *order, *from;
    uint64_t* seen; // a bit for each class, all 0 between rows

    Scratch(int64_t classes, int64_t num_classes, int64_t kept, bool sharp) {
        const auto rounded = [](int64_t n) { return (n + 63) / 64 * 64; };
        const int64_t row = rounded(classes), records = classes / kBlock<A> + 1, entries = kept + 1;
        const int64_t words = num_classes / 64 + 1;
        const int64_t floats = row * (1 + sharp) + 3 * kBlock<A> + rounded(kept);
        const size_t bytes = size_t(floats) * sizeof(A) + size_t(6 * entries) * sizeof(double) +
                             size_t(records) * sizeof(RestBlock) +
                             size_t(2 * entries + records + 1 + words) * sizeof(int64_t);
        e_soft = static_cast<A*>(thread_scratch(bytes));
        e_sharp = e_soft + row;
        student = e_soft + row * (1 + sharp);
        gradient = student + kBlock<A>;
        labels = gradient + kBlock<A>;
        teacher = labels + kBlock<A>;
        s = reinterpret_cast<double*>(teacher + rounded(kept));
        t = s + entries;
        e = t + entries;
        f = e + entries;
        by = f + entries;
        v = by + entries;
        blocks = reinterpret_cast<RestBlock*>(v + entries);
        at = reinterpret_cast<int64_t*>(blocks + records);
        order = at + entries;
        from = order + entries;
        seen = reinterpret_cast<uint64_t*>(from + records + 1);
        __builtin_memset(seen, 0, size_t(words) * sizeof(uint64_t));
    }
    // Marks a class. Returns whether it was new.
    bool mark(int64_t j) const {
        const uint64_t bit = uint64_t(1) << (j & 63), word = seen[j >> 6];
        seen[j >> 6] = word | bit;
        return !(word & bit);
    }
};

template <class A, bool single, bool exact, bool linear>
FKD_NOINLINE void block_sums(const A* s, const A* ahead, int64_t n, double scale, int squarings, A largest, A* e_soft,
                             A* e_sharp, RestBlock& out) {
    const Shift<A, exact> shift(finite_or_zero(largest), scale);
    const Vec<A> zero = {};
    const A ratio = A(1 / scale);
    Vec<A> soft = zero, sharp = zero, sum = zero;
    Mask<A> blocked = {};
    for_lanes<A>(n, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        __builtin_prefetch(ahead + j); // load the next block while this one is computed
        const Vec<A> sj = load(s + j, lanes), d = shift(sj);
        const Vec<A> ej = keep(lanes, exp2_nonpositive<A>(d), zero);
        store(e_soft + j, ej, lanes);
        soft += ej;
        if constexpr (!single) {
            Vec<A> ek = ej;
            if (squarings)
                for (int i = 0; i < squarings; ++i)
                    ek *= ek;
            else
                ek = keep(lanes, exp2_nonpositive<A>(d * ratio), zero);
            store(e_sharp + j, ek, lanes);
            sharp += ek;
        }
        if constexpr (linear) {
            const Mask<A> impossible = sj == -A(INFINITY);
            sum += keep(lanes, impossible ? zero : d, zero);
            blocked -= keep(lanes, impossible, Mask<A>{});
        }
    });
    out.max = shift.origin;
    out.soft = sum_lanes<A>(soft);
    out.sharp = single ? out.soft : double(sum_lanes<A>(sharp));
    out.linear = kLn2 / scale * sum_lanes<A>(sum);
    out.blocked = 0;
    for (int l = 0; l < kLanes<A>; ++l)
        out.blocked += double(blocked[l]);
}

// The sums of Others over a block's labels, of which left-out classes have 0.
template <class A>
FKD_NOINLINE void block_labels(const A* s, const A* v, int64_t n, RestBlock& out) {
    const Vec<A> zero = {};
    const A max = A(out.max);
    Vec<A> sum = zero, cross = zero, blocked = zero;
    for_lanes<A>(n, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        const Vec<A> sj = load(s + j, lanes), vj = keep(lanes, load(v + j, lanes), zero);
        const Mask<A> impossible = sj == -A(INFINITY);
        sum += vj;
        const Vec<A> possible = keep(lanes, impossible ? zero : sj - max, zero);
        cross = mul_add(vj, possible, cross);
        blocked += impossible ? vj : zero;
    });
    out.v = sum_lanes<A>(sum);
    out.v_cross = sum_lanes<A>(cross);
    out.v_blocked = sum_lanes<A>(blocked);
}

// The first pass: the sums over the rest of a row, per block and merged.
template <class A, bool single, bool linear>
FKD_NOINLINE Others rest_of(const TopKArgs& args, const Scratch<A>& scratch, int64_t row, double T, A* e_soft) {
    const int squarings = T == 2 ? 1 : T == 4 ? 2 : 0;
    const double scale = 1 / T;
    Others out = {0, -INFINITY, 0, 0, 0, 0, 0, 0};
    int64_t count = 0;
    for (int64_t j = 0; j < args.classes; j += kBlock<A>, ++count) {
        const int64_t n = block_length<A>(args.classes, j);
        const A* s = read(args.student, row, j, n, scratch.student);
        const A* const ahead = s + kBlock<A>;
        const int64_t first = scratch.from[count], left_out = scratch.from[count + 1] - first;
        if (left_out > 0) {
            if (s != scratch.student) __builtin_memcpy(scratch.student, s, size_t(n) * sizeof(A));
            s = scratch.student;
            for (int64_t i = 0; i < left_out; ++i)
                scratch.student[scratch.at[scratch.order[first + i]] - j] = -A(INFINITY);
        }
        const A largest = largest_of<A>(s, n, nullptr), reach = A(largest * scale), limit = A(kLargestShift);
        // Without a gradient the exponentials are not needed again: overwrite the same few cache lines.
        A* const soft = args.gradient.data ? e_soft + j : scratch.gradient;
        A* const sharp = single ? soft : args.gradient.data ? scratch.e_sharp + j : scratch.e_sharp;
        RestBlock& block = scratch.blocks[count];
        if (reach < limit && (reach > -limit || largest == -A(INFINITY)))
            block_sums<A, single, false, linear>(s, ahead, n, scale, squarings, largest, soft, sharp, block);
        else
            block_sums<A, single, true, linear>(s, ahead, n, scale, squarings, largest, soft, sharp, block);
        block.number = double(n - left_out);
        block.blocked -= linear ? double(left_out) : 0;
        block.v = block.v_cross = block.v_blocked = 0;
        if (has_labels(args)) {
            const A* v = read(args.target, row, j, n, scratch.labels);
            if (left_out > 0) {
                if (v != scratch.labels) __builtin_memcpy(scratch.labels, v, size_t(n) * sizeof(A));
                v = scratch.labels;
                for (int64_t i = 0; i < left_out; ++i)
                    scratch.labels[scratch.at[scratch.order[first + i]] - j] = 0;
            }
            block_labels(s, v, n, block);
        }
        if (block.soft != 0 && block.max > out.max) out.max = block.max;
    }
    out.max = finite_or_zero(out.max);
    for (int64_t i = 0; i < count; ++i) {
        const RestBlock& b = scratch.blocks[i];
        const double d = b.max - out.max;
        out.number += b.number;
        out.linear += b.blocked > 0 ? -INFINITY : b.linear + d * b.number;
        out.v += b.v;
        out.v_cross += b.v_cross + d * (b.v - b.v_blocked);
        out.v_blocked += b.v_blocked;
        if (b.soft == 0) continue;
        out.soft += b.soft * (d == 0 ? 1 : exp(d * scale));
        out.sharp += b.sharp * (d == 0 ? 1 : exp(d));
    }
    return out;
}

} // namespace
} // namespace FKD_ISA
} // namespace fused_kd

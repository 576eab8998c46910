// The row losses with a top-k teacher (topk_losses.h): loss parts and gradient in one visit to each row. Compiled once
// per instruction set.
//
// A row is processed in blocks, as in row_losses.cpp, but only the student is read. The sums leave out the kept classes
// and the target: a block that has some is copied, and in the copy, which stays in the cache, they become -inf, with
// exponential 0. Their gradients are computed separately and overwrite those of the second pass.
//
// If calls share the classes of a row (TopKPiece), the first call sums its own columns, and the second takes the sums
// of all columns and computes the gradient of its own. All calls get the same kept classes.
#include "../losses/topk_losses.h"
#include "rows.h"

namespace fused_kd {
namespace FKD_ISA {

double largest_of(const double* x, int64_t n) {
    return largest_of<double>(x, n, nullptr);
}

double exponentials(const double* x, int64_t n, double top, double scale, double* e) {
    const double by = kLog2E * scale;
    Vec<double> sum = {};
    for_lanes<double>(n, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
        const Vec<double> zero = {}, ei = keep(lanes, exp2_nonpositive<double>((load(x + i, lanes) - top) * by), zero);
        store(e + i, ei, lanes);
        sum += ei;
    });
    return sum_lanes<double>(sum);
}

namespace {

// Sums over the rest in a block: the number of classes, the exponentials relative to `max`, and, if needed, s - max
// over the logits > -inf and the number of logits -inf.
struct RestBlock {
    double number, max, soft, sharp, linear, blocked;
};

struct TopKNeeds {
    bool sharp, linear;
};

inline TopKNeeds topk_needs(const RowParams& params, TopKRest rest) {
    const bool ce = params.ce_weight != 0;
    return {(params.number & kSharp || ce) && params.temperature != 1,
            rest == kUniform || (ce && params.label_smoothing != 0)};
}

// Scratch of a thread: a row of each kind of exponentials, a block of the student and of the gradient, the teacher's
// row, and a record of each block. For the left-out classes: the arrays of TopKRow, their columns, and their entries
// sorted by block, of which order[from[i]] up to order[from[i + 1]] are in block i.
template <class A>
struct Scratch {
    A *e_soft, *e_sharp, *student, *gradient, *teacher;
    double *s, *t, *e, *f, *by;
    RestBlock* blocks;
    int64_t *at, *order, *from;
    uint64_t* seen; // a bit for each class, all 0 between rows

    Scratch(int64_t classes, int64_t num_classes, int64_t kept, bool sharp) {
        const auto rounded = [](int64_t n) { return (n + 63) / 64 * 64; };
        const int64_t row = rounded(classes), records = classes / kBlock<A> + 1, entries = kept + 1;
        const int64_t words = num_classes / 64 + 1;
        const int64_t floats = row * (1 + sharp) + 2 * kBlock<A> + rounded(kept);
        const size_t bytes = size_t(floats) * sizeof(A) + size_t(5 * entries) * sizeof(double) +
                             size_t(records) * sizeof(RestBlock) +
                             size_t(2 * entries + records + 1 + words) * sizeof(int64_t);
        e_soft = static_cast<A*>(thread_scratch(bytes));
        e_sharp = e_soft + row;
        student = e_soft + row * (1 + sharp);
        gradient = student + kBlock<A>;
        teacher = gradient + kBlock<A>;
        s = reinterpret_cast<double*>(teacher + rounded(kept));
        t = s + entries;
        e = t + entries;
        f = e + entries;
        by = f + entries;
        blocks = reinterpret_cast<RestBlock*>(by + entries);
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

// The student's logits of a row, one at a time. The calls on a row's pieces exchange the logit of class j as their
// entry `field`.
template <class A>
struct StudentRow {
    const TopKArgs& args;
    const int64_t row;
    const char* const start = element(args.student, row, 0);
    const int64_t step = args.student.col_stride * element_size(args.student.dtype);

    FKD_INLINE double at(int64_t column) const {
        A converted;
        const char* const p = start + column * step;
        if (args.student.dtype == dtype_of<A>()) return double(*reinterpret_cast<const A*>(p));
        convert(p, args.student.dtype, 1, 1, &converted);
        return double(converted);
    }

    FKD_INLINE double logit(int64_t j, int64_t field) const {
        const TopKPiece* const piece = args.piece;
        if (!piece) return at(j);
        const int64_t place = field * args.rows + row, column = j - piece->first_class;
        if (piece->all) return piece->all[place];
        if (column < 0 || column >= args.classes) return 0;
        return piece->own[place] = at(column);
    }
};

// Reads the kept classes of a row without the pads. The target comes last, kept or not. Returns false if an index is
// invalid or repeated.
template <class A>
bool read_kept(const TopKArgs& args, const Scratch<A>& scratch, int64_t row, int64_t y, TopKRow& x) {
    const StudentRow<A> student = {args, row};
    const A* const t = read(args.log_probs, row, 0, args.kept, scratch.teacher);
    const int64_t* const indices = reinterpret_cast<const int64_t*>(element(args.indices, row, 0));
    const int64_t classes = all_classes(args), step = args.indices.col_stride;
    bool valid = true;
    double t_target = 0;
    x.kept = 0;
    x.target_kept = false;
    for (int64_t i = 0; i < args.kept; ++i) {
        const int64_t j = indices[i * step];
        if (j == -1) continue;
        if (j < -1 || j >= classes || !scratch.mark(j)) {
            valid = false;
            continue;
        }
        if (j == y) {
            x.target_kept = true;
            t_target = double(t[i]);
            continue;
        }
        scratch.at[x.kept] = j;
        scratch.t[x.kept] = double(t[i]);
        scratch.s[x.kept++] = student.logit(j, kTopKFields + i);
    }
    x.s_target = student.logit(y, kTopKFields - 1);
    scratch.at[x.kept] = y;
    scratch.s[x.kept] = x.s_target;
    scratch.t[x.kept] = t_target;
    for (int64_t i = 0; i < x.kept; ++i)
        scratch.seen[scratch.at[i] >> 6] = 0;
    scratch.seen[y >> 6] = 0;
    return valid;
}

// The sum of the kept probabilities, which may be invalid.
inline double kept_sum(const TopKRow& x) {
    const int64_t entries = x.kept + x.target_kept;
    const double largest = largest_of(x.t, entries), top = finite_or_zero(largest);
    return largest == INFINITY ? largest : exponentials(x.t, entries, top, 1, x.f) * exp(top);
}

// Sorts the entries by block. Makes their classes relative to the columns of this call.
template <class A>
void order_by_blocks(const TopKArgs& args, const Scratch<A>& scratch, int64_t entries) {
    const int64_t blocks = (args.classes + kBlock<A> - 1) / kBlock<A>;
    int64_t* const from = scratch.from;
    if (blocks == 1 && !args.piece) { // the most frequent case; counting is a chain of dependencies
        from[0] = 0;
        from[1] = entries;
        for (int64_t i = 0; i < entries; ++i)
            scratch.order[i] = i;
        return;
    }
    const auto block_of = [&](int64_t i) {
        const int64_t at = scratch.at[i];
        return at < 0 || at >= args.classes ? -1 : at / kBlock<A>;
    };
    __builtin_memset(from, 0, size_t(blocks + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < entries; ++i) {
        if (args.piece) scratch.at[i] -= args.piece->first_class;
        if (block_of(i) >= 0) ++from[block_of(i)];
    }
    for (int64_t b = 1; b <= blocks; ++b)
        from[b] += from[b - 1]; // the block's end, which the next loop moves to its start
    for (int64_t i = entries; i-- > 0;)
        if (block_of(i) >= 0) scratch.order[--from[block_of(i)]] = i;
}

// log u, u the share of the teacher's remaining probability per class outside K.
inline double log_share(const TopKRow& x, int64_t classes, double sum) {
    const int64_t entries = x.kept + x.target_kept;
    const double left = 1 - sum;
    return entries == classes || left < 0 ? -INFINITY : log(left / double(classes - entries));
}

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

// The first pass: the sums over the rest of a row, per block and merged.
template <class A, bool single, bool linear>
FKD_NOINLINE Others rest_of(const TopKArgs& args, const Scratch<A>& scratch, int64_t row, double T, A* e_soft) {
    const int squarings = T == 2 ? 1 : T == 4 ? 2 : 0;
    const double scale = 1 / T;
    Others out = {0, -INFINITY, 0, 0, 0};
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
        if (block.soft != 0 && block.max > out.max) out.max = block.max;
    }
    out.max = finite_or_zero(out.max);
    for (int64_t i = 0; i < count; ++i) {
        const RestBlock& b = scratch.blocks[i];
        const double d = b.max - out.max;
        out.number += b.number;
        out.linear += b.blocked > 0 ? -INFINITY : b.linear + d * b.number;
        if (b.soft == 0) continue;
        out.soft += b.soft * (d == 0 ? 1 : exp(d * scale));
        out.sharp += b.sharp * (d == 0 ? 1 : exp(d));
    }
    return out;
}

// Writes the sums over this piece's columns, as in TopKPiece.
inline void give(const TopKArgs& args, int64_t row, const Others& rest) {
    const double sums[] = {rest.max, rest.soft, rest.sharp, rest.linear + rest.number * rest.max};
    for (int64_t field = 0; field < kTopKFields - 1; ++field)
        args.piece->own[field * args.rows + row] = sums[field];
}

// The sums over all columns.
inline Others given(const TopKArgs& args, int64_t row, int64_t left_out) {
    const double* const all = args.piece->all + row;
    const double number = double(args.piece->num_classes - left_out), max = all[0];
    return {number, max, all[args.rows], all[2 * args.rows], all[3 * args.rows] - number * max};
}

// The second pass: the gradient of the rest, then over it the gradient of the left-out classes.
template <class A, bool single>
FKD_NOINLINE void combine(const TopKArgs& args, const Scratch<A>& scratch, int64_t row, double T, const Others& rest,
                          const TopKResult& result, const A* e_soft, bool streamed) {
    const DType type = args.student.dtype;
    const bool same = type == dtype_of<A>();
    char* const gradient = row_of(args.gradient, type, row, args.classes);
    A* const own_row = reinterpret_cast<A*>(gradient);
    const double by = args.gradient.scale * (args.factors ? args.factors[args.rows + row] : 1);
    const A constant = A(result.constant * by);
    int64_t count = 0;
    for (int64_t j = 0; j < args.classes; j += kBlock<A>, ++count) {
        const int64_t n = block_length<A>(args.classes, j);
        const RestBlock& block = scratch.blocks[count];
        const double d = block.max - rest.max;
        const double soft_by = result.soft * by * (d == 0 ? 1 : exp(d / T));
        const double sharp_by = result.sharp * by * (d == 0 ? 1 : exp(d));
        const A soft = A(single ? soft_by + sharp_by : soft_by), sharp = A(sharp_by);
        A* const out = same && !streamed ? own_row + j : scratch.gradient;
        // A class with logit -inf has no gradient: if it might get one, read the student again.
        const bool look = (constant != A(0) && block.blocked > 0) || !is_finite(soft) || !is_finite(sharp);
        const A* const s = look ? read(args.student, row, j, n, scratch.student) : nullptr;
        for_lanes<A>(n, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
            Vec<A> g = mul_add<A>(load(e_soft + j + i, lanes), soft, constant);
            if constexpr (!single) g = mul_add<A>(load(scratch.e_sharp + j + i, lanes), sharp, g);
            if (s) g = load(s + i, lanes) == -A(INFINITY) ? Vec<A>{} : g;
            store(out + i, g, lanes);
        });
        for (int64_t i = scratch.from[count]; i < scratch.from[count + 1]; ++i)
            out[scratch.at[scratch.order[i]] - j] = A(scratch.by[scratch.order[i]] * by);
        if (streamed)
            stream(out, n, own_row + j);
        else if (!same)
            write(out, n, gradient + j * element_size(type), type);
    }
    if (streamed) fence();
}

template <class A, bool single>
FKD_NOINLINE void row_pass(const TopKArgs& args, const RowParams& params, TopKRest kind, const Scratch<A>& scratch,
                           int64_t row, int64_t y) {
    TopKRow x = {};
    x.s = scratch.s;
    x.t = scratch.t;
    x.e = scratch.e;
    x.f = scratch.f;
    x.by = scratch.by;
    args.bad[row] = !read_kept(args, scratch, row, y, x) || (kind == kRenormalize && x.kept == 0 && !x.target_kept);
    if (args.bad[row]) return;
    order_by_blocks(args, scratch, x.kept + 1);
    const bool same = args.student.dtype == dtype_of<A>();
    const bool streamed = same && args.rows * args.classes * int64_t(sizeof(A)) >= kStreamed;
    const bool in_place = args.gradient.data && same && !streamed;
    char* const own_row = row_of(args.gradient, args.student.dtype, row, args.classes);
    A* const e_soft = in_place ? reinterpret_cast<A*>(own_row) : scratch.e_soft;
    const auto rest = topk_needs(params, kind).linear ? rest_of<A, single, true> : rest_of<A, single, false>;
    x.rest = rest(args, scratch, row, params.temperature, e_soft);
    if (args.piece && !args.piece->all) return give(args, row, x.rest);
    if (args.piece) x.rest = given(args, row, x.kept + 1);
    const double sum = kind == kRenormalize ? 0 : kept_sum(x);
    if (args.sums) args.sums[row] = sum;
    x.log_share = kind == kRenormalize ? -INFINITY : log_share(x, all_classes(args), sum);
    const TopKResult result = topk_loss(x, params, kind);
    for (int k = 0; k < kRowParts; ++k)
        args.parts[kRowParts * row + k] = (args.factors ? args.factors[row] : 1) * result.parts[k];
    if (args.gradient.data)
        combine<A, single>(args, scratch, row, params.temperature, x.rest, result, e_soft, streamed);
}

template <class A>
void topk_rows_typed(const TopKArgs& args) {
    const RowParams params = {args.hyper, args.loss, double(all_classes(args)), false};
    const TopKRest kind = TopKRest(args.rest);
    const bool sharp = topk_needs(params, kind).sharp;
    const auto pass = sharp ? row_pass<A, false> : row_pass<A, true>;
    share_out(useful_threads(args.threads, args.rows, args.classes), args.rows, [&](int64_t begin, int64_t end) {
        const Scratch<A> scratch(args.classes, all_classes(args), args.kept, sharp);
        for (int64_t row = begin; row < end; ++row) {
            args.bad[row] = false;
            zero_padding(args.gradient, args.student.dtype, row, args.classes);
            if (row_counts(args, row)) {
                pass(args, params, kind, scratch, row, *reinterpret_cast<const int64_t*>(element(args.target, row, 0)));
                continue;
            }
            for (int k = 0; k < kRowParts; ++k)
                args.parts[kRowParts * row + k] = 0;
            no_gradient(args.gradient, args.student.dtype, row, args.classes);
        }
    });
}

} // namespace

void topk_rows(const TopKArgs& args) {
    args.accumulate == kFloat64 ? topk_rows_typed<double>(args) : topk_rows_typed<float>(args);
}

} // namespace FKD_ISA
} // namespace fused_kd

// The row losses with a top-k teacher (topk_losses.h): loss parts and gradient in one visit to each row. Compiled once
// per instruction set.
//
// A row is processed in blocks, as in row_losses.cpp, but only the student is read. The sums leave out the kept classes
// and the target: a block that has some is copied, and in the copy, which stays in the cache, they become -inf, with
// exponential 0. Their gradients are computed separately and overwrite those of the second pass.
//
// If calls share the classes of a row (TopKPiece), the first call sums its own columns, and the second takes the sums
// of all columns and computes the gradient of its own. All calls get the same kept classes.
#include "topk_blocks.h"

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
    for (int64_t i = 0; has_labels(args) && i <= x.kept; ++i)
        scratch.v[i] = double(*read(args.target, row, scratch.at[i], 1, scratch.labels));
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
    return {number, max, all[args.rows], all[2 * args.rows], all[3 * args.rows] - number * max, 0, 0, 0};
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
    const A constant = A(result.constant * by), minus_v = A(-result.v * by);
    const bool labels = has_labels(args) && minus_v != A(0);
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
        const bool look = (constant != A(0) && block.blocked > 0) || (labels && block.v_blocked > 0) ||
                          !is_finite(soft) || !is_finite(sharp);
        const A* const s = look ? read(args.student, row, j, n, scratch.student) : nullptr;
        const A* const v = labels ? read(args.target, row, j, n, scratch.labels) : nullptr;
        for_lanes<A>(n, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
            Vec<A> g = mul_add<A>(load(e_soft + j + i, lanes), soft, constant);
            if (v) g = mul_add<A>(load(v + i, lanes), minus_v, g);
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
    x.v = has_labels(args) ? scratch.v : nullptr;
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
    x.v_sum = sum_of_labels(x);
    if (args.label_sums) args.label_sums[row] = x.v_sum;
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
                const int64_t y = has_labels(args) ? argmax(args.target, row, args.classes, scratch.labels)
                                                   : *reinterpret_cast<const int64_t*>(element(args.target, row, 0));
                pass(args, params, kind, scratch, row, y < 0 ? 0 : y); // below 0 if every probability is NaN or -inf
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

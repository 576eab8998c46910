// USKD of one row by one block, in stages that the kernels combine: statistics, rank keys, and after the ranking, loss
// parts and both gradients. The caller provides the row, from registers or memory, as a type with
//   before                           the classes by which the first chunk starts before the row
//   visit(f)                         calls f(base, s, w) for this thread's chunks of student and weak logits, classes
//                                    base to base + 3; outside the row the values are arbitrary
//   gradient(data, dtype, index)     this row of a gradient, to write in the same chunks
#pragma once

#include "targets.h"

namespace fused_kd {
namespace cuda {

// Arguments of every kernel that processes rows.
struct RowsArguments {
    UskdCall call;
    void* parts;          // (rows, 4), of the accumulation dtype
    const int64_t* count; // number of rows that count, or null if each block counts them
    int64_t first, rows;  // the rows of this launch
    // Only for rows sorted in global memory: the workspace, and the buffers of a pass.
    void* sorting;
    void *keys, *spare, *states;
    uint32_t* order;
};

// The state of a block's row, in shared memory.
template <class A>
struct RowState {
    Targets<A> targets;
    UskdStats<A> x;
    SplitSoftmax<A, 2> p, v;
    UskdKey<A> key;
    A is_nan; // nonzero if the row contains NaN or +inf; then loss and gradients are NaN. Not bool, to avoid padding
};

template <class A>
struct BlockState {
    RowState<A> row;
    UskdRow<A> result;
    A student_scale, weak_scale;
    int64_t divisor;
    alignas(16) char room[sizeof(WarpResults<LargestTwo<A>>)]; // for block_reduce; this is its largest result
};

template <class A>
struct Maxima {
    A s, w;
    __device__ void merge(const Maxima& o) {
        s = fmax(s, o.s);
        w = fmax(w, o.w);
    }
};

template <class A>
struct Sums {
    A s, w, s_linear, w_linear;
    __device__ void merge(const Sums& o) {
        s += o.s;
        w += o.w;
        s_linear += o.s_linear;
        w_linear += o.w_linear;
    }
};

template <class A>
struct LabelSums {
    A sum, cross, blocked, weak;
    __device__ void merge(const LabelSums& o) {
        sum += o.sum;
        cross += o.cross;
        blocked += o.blocked;
        weak += o.weak;
    }
};

template <class A>
struct ZipfSums {
    A sum, cross;
    __device__ void merge(const ZipfSums& o) {
        sum += o.sum;
        cross += o.cross;
    }
};

// Calls f(j, s, w) for each non-target class.
template <class A, class Row, class F>
__device__ __forceinline__ void visit_rest(const Row& row, const Targets<A>& targets, int classes, F&& f) {
    const int y0 = targets.at[0], y1 = targets.at[1];
    row.visit([&](int base, const A(&s)[kChunk], const A(&w)[kChunk]) {
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
            const int j = base + k;
            if (within(j, classes) && j != y0 && j != y1) f(j, s[k], w[k]);
        }
    });
}

template <class A>
__device__ __forceinline__ A finite_or_zero(A x) {
    return x == -INFINITY ? A(0) : x;
}

// Fills state.row and synchronizes the block.
template <class A, class Row>
__device__ __forceinline__ void row_statistics(const UskdCall& call, int64_t index, const Row& row,
                                               const Targets<A>& targets, BlockState<A>& state) {
    Maxima<A> top = {-A(INFINITY), -A(INFINITY)};
    visit_rest<A>(row, targets, call.classes, [&](int, A s, A w) {
        top.s = fmax(top.s, s);
        top.w = fmax(top.w, w);
    });
    top = block_reduce(top, state.room);
    const A s_max = finite_or_zero(top.s), w_max = finite_or_zero(top.w);
    // fmax ignores NaN, but the sums do not. At logit -inf, exp gives 0, and the linear sum is the -inf that uskd_row
    // expects.
    Sums<A> sums = {A(0), A(0), A(0), A(0)};
    visit_rest<A>(row, targets, call.classes, [&](int, A s, A w) {
        sums.s += exp(s - s_max);
        sums.w += exp(w - w_max);
        sums.s_linear += s - s_max;
        sums.w_linear += w - w_max;
    });
    sums = block_reduce(sums, state.room);
    LabelSums<A> labels = {A(0), A(0), A(0), A(0)};
    if (call.target.dtype != kInt64) {
        const RowView view = row_view(call.target, index);
        visit_rest<A>(row, targets, call.classes, [&](int j, A s, A w) {
            const A label = load_one<A>(view, j);
            const bool impossible = s == -INFINITY;
            labels.sum += label;
            labels.cross += impossible ? A(0) : label * (s - s_max);
            labels.blocked += impossible ? label : A(0);
            labels.weak += label * (w - w_max);
        });
        labels = block_reduce(labels, state.room);
    }
    if (threadIdx.x == 0) {
        const RowView student = row_view(call.student, index), weak = row_view(call.weak, index);
        // Built directly in shared memory: in registers, the row's state would spill.
        state.row.targets = targets;
        UskdStats<A>& x = state.row.x;
        x = {};
        x.targets = targets.count;
        x.s_max = s_max;
        x.w_max = w_max;
        x.s_sum = sums.s;
        x.w_sum = sums.w;
        x.s_linear = sums.s_linear;
        x.w_linear = sums.w_linear;
        x.v_sum = (labels.sum + targets.label[0]) + targets.label[1];
        x.v_rest = labels.sum;
        x.v_free = labels.sum - labels.blocked;
        x.v_blocked = labels.blocked;
        x.v_cross = labels.cross;
        x.v_weak = labels.weak;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            x.s_target[k] = k < targets.count ? load_one<A>(student, targets.at[k]) : -A(INFINITY);
            x.w_target[k] = k < targets.count ? load_one<A>(weak, targets.at[k]) : -A(INFINITY);
            x.label[k] = targets.label[k];
        }
        const auto p = state.row.p = common::split_softmax<A, 2>(x.s_target, s_max, sums.s);
        const auto v = state.row.v = common::split_softmax<A, 2>(x.w_target, w_max, sums.w);
        // The batch means are left out: their NaN comes from another row, and affects only the student's gradient.
        const A probe = p.rest + v.rest + x.v_sum + targets.poison;
        state.row.is_nan = A(probe != probe);
        state.row.key = common::uskd_key(x, p, v, Rank(call.rank));
    }
    __syncthreads();
}

// Calls put(j, key) for every class, including the targets.
template <class A, class Row, class F>
__device__ __forceinline__ void row_keys(const Row& row, const RowState<A>& state, int classes, F&& put) {
    const UskdKey<A> key = state.key;
    const A s_max = state.x.s_max, w_max = state.x.w_max;
    const int y0 = state.targets.at[0], y1 = state.targets.at[1];
    row.visit([&](int base, const A(&s)[kChunk], const A(&w)[kChunk]) {
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
            const int j = base + k;
            if (!within(j, classes)) continue;
            // A target may be far above the rest in logits that do not rank, hence fmin. Explicit fma makes the keys of
            // equal logits equal to the bit, wherever the compiler places the code.
            const A e_s = exp(fmin(s[k] - s_max, A(0))), e_w = exp(fmin(w[k] - w_max, A(0)));
            const A student = key.linear != A(0) ? fma(s[k] - s_max, key.linear, key.constant) : e_s * key.student;
            A value = fma(e_w, key.weak, student);
            if (j == y0 && key.above[0]) value = key.target[0];
            if (j == y1 && key.above[1]) value = key.target[1];
            put(j, value);
        }
    });
}

// The row's targets; a row of weight 0 is ignored.
template <class A>
__device__ __forceinline__ Targets<A> weighted_targets(const UskdCall& call, int64_t index, void* room) {
    Targets<A> targets = find_targets<A>(call.target, index, call.classes, call.ignore_index, room);
    if (call.factors && call.factors[index] == 0) targets.standing = kIgnored;
    return targets;
}

__device__ inline int64_t divisor_of(const RowsArguments& args, void* room) {
    const UskdCall& call = args.call;
    if (call.reduction != kMean) return 1;
    const int64_t counted = call.target.dtype != kInt64 ? call.rows
                            : args.count ? *args.count
                                         : count_targets(call.target, call.rows, call.ignore_index, room);
    return counted < 1 ? 1 : counted;
}

template <class A>
__device__ __forceinline__ void put_parts(const RowsArguments& args, int64_t index, A target, A non_target, A weak,
                                          A ce) {
    A* const parts = static_cast<A*>(args.parts) + 4 * index;
    parts[0] = target;
    parts[1] = non_target;
    parts[2] = weak;
    parts[3] = ce;
}

// A row that does not count gets 0, a row without a value NaN. Classes with logit -inf get gradient 0 in both.
template <class A>
__device__ __forceinline__ void constant_row(const RowsArguments& args, int64_t index, A value) {
    const UskdCall& call = args.call;
    const auto fill = [&](void* gradient, const Matrix& logits) {
        if (!gradient) return;
        const GradientRow out = gradient_row(gradient, logits.dtype, index, call.classes);
        const RowView row = row_view(logits, index);
        for (int base = threadIdx.x * kChunk; base < call.classes; base += blockDim.x * kChunk) {
            A values[kChunk] = {A(0), A(0), A(0), A(0)};
            if (value != A(0)) load_chunk(row, base, call.classes, values);
#pragma unroll
            for (int k = 0; k < kChunk; ++k)
                values[k] = values[k] == -INFINITY ? A(0) : value;
            store_chunk(out, base, call.classes, values);
        }
    };
    fill(call.student_gradient, call.student);
    fill(call.weak_gradient, call.weak);
    if (threadIdx.x == 0) put_parts(args, index, value, value, value, value);
}

// Computes the loss parts and gradients from the Zipf weights z = 1 / rank, which must be visible to the whole block.
// The first thread has set state.divisor.
template <class A, class Row>
__device__ __forceinline__ void finish_row(const RowsArguments& args, int64_t index, const Row& row, const A* z,
                                           BlockState<A>& state) {
    const UskdCall& call = args.call;
    const RowState<A>& known = state.row;
    const int classes = call.classes;
    const A s_max = known.x.s_max, w_max = known.x.w_max;
    ZipfSums<A> zipf = {A(0), A(0)};
    visit_rest<A>(row, known.targets, classes, [&](int j, A s, A) {
        if (s == -INFINITY) return;
        zipf.sum += z[j];
        zipf.cross += z[j] * (s - s_max);
    });
    zipf = block_reduce(zipf, state.room);
    if (threadIdx.x == 0) {
        const double batch = call.batch_sums[2] < 1 ? 1 : call.batch_sums[2];
        const UskdParams params = {
            call.hyper, {call.batch_sums[0] / batch, call.batch_sums[1] / batch}, double(classes), call.square};
        const UskdRow<A> result = common::uskd_row(known.x, params, known.p, known.v, zipf.sum, zipf.cross);
        const double* const factors = call.factors ? call.factors + index : nullptr;
        const A factor = factors ? A(factors[0]) : A(1);
        put_parts(args, index, factor * result.target, factor * result.non_target, factor * result.weak_part,
                  factor * result.ce);
        state.result = result;
        state.student_scale = A(stored_scale(call.student.dtype, call.student_scale, state.divisor));
        state.weak_scale = A(stored_scale(call.weak.dtype, call.weak_scale, state.divisor));
        if (factors) {
            state.student_scale *= A(factors[call.rows]);
            state.weak_scale *= A(factors[2 * call.rows]);
        }
    }
    __syncthreads();

    const GradientRow student = row.gradient(call.student_gradient, call.student.dtype, index);
    const GradientRow weak = row.gradient(call.weak_gradient, call.weak.dtype, index);
    const bool with_labels = call.target.dtype != kInt64;
    const RowView labels = row_view(call.target, index, row.before);
    const int y0 = known.targets.at[0], y1 = known.targets.at[1];
    const UskdRow<A>& result = state.result;
    const A s_scale = state.student_scale, w_scale = state.weak_scale;
    const A s_exp = result.student * s_scale, s_zipf = result.zipf * s_scale, s_label = result.v * s_scale;
    const A s_all = result.constant * s_scale;
    const A w_exp = result.weak * w_scale, w_all = result.weak_constant * w_scale, w_label = result.weak_v * w_scale;
    row.visit([&](int base, const A(&s)[kChunk], const A(&w)[kChunk]) {
        A label[kChunk] = {A(0), A(0), A(0), A(0)};
        if (with_labels) load_chunk(labels, base, classes, label);
        A out[kChunk];
        if (student.data) {
#pragma unroll
            for (int k = 0; k < kChunk; ++k) {
                const int j = base + k;
                if (!within(j, classes) || s[k] == -INFINITY)
                    out[k] = A(0); // outside the row, or logit -inf
                else if (j == y0 || j == y1)
                    out[k] = (j == y0 ? result.student_target[0] : result.student_target[1]) * s_scale;
                else
                    out[k] = fma(exp(s[k] - s_max), s_exp, fma(z[j], s_zipf, -fma(label[k], s_label, s_all)));
            }
            store_chunk(student, base, classes, out);
        }
        if (weak.data) {
#pragma unroll
            for (int k = 0; k < kChunk; ++k) {
                const int j = base + k;
                if (w[k] == -INFINITY)
                    out[k] = A(0);
                else if (j == y0 || j == y1)
                    out[k] = (j == y0 ? result.weak_target[0] : result.weak_target[1]) * w_scale;
                else
                    out[k] = fma(exp(w[k] - w_max), w_exp, -fma(label[k], w_label, w_all));
            }
            store_chunk(weak, base, classes, out);
        }
    });
}

} // namespace cuda
} // namespace fused_kd

// USKD's first pass: the targets' probabilities and their sums, because each row needs their means over the batch.
#include "streamed_row.h"
#include "targets.h"

namespace fused_kd {
namespace cuda {
namespace {

template <class A>
struct Largest {
    A x;
    __device__ void merge(const Largest& o) { x = fmax(x, o.x); }
};

template <class A>
struct Sum {
    A x;
    __device__ void merge(const Sum& o) { x += o.x; }
};

// Calls f(s) for each non-target class of a row.
template <class A, int kType, class F>
__device__ __forceinline__ void visit_student(const RowView& row, int before, const Targets<A>& targets, int classes,
                                              F&& f) {
    for (int base = threadIdx.x * kChunk - before; base < classes; base += blockDim.x * kChunk) {
        A s[kChunk];
        load_chunk(of_type<kType>(row), base, classes, s);
#pragma unroll
        for (int k = 0; k < kChunk; ++k)
            if (within(base + k, classes) && base + k != targets.at[0] && base + k != targets.at[1]) f(s[k]);
    }
}

// One block per row: p_k^2, or p_k, of its targets; 0 for an absent target, NaN in a row without a value. The second
// visit reads the row from the cache, unless the row is large.
template <class A, int kType>
__global__ void __launch_bounds__(kMostStreamingThreads) target_probabilities(BatchSumsCall call) {
    __shared__ WarpResults<LargestTwo<A>> room;
    const int64_t index = blockIdx.x;
    double* const values = call.workspace + 2 * index;
    const Targets<A> targets = find_targets<A>(call.target, index, call.classes, call.ignore_index, &room);
    if (targets.standing != kCounts) { // a class index, so there is no second target
        if (threadIdx.x == 0) {
            values[0] = targets.standing == kIgnored ? 0.0 : double(NAN);
            values[1] = 0.0;
        }
        return;
    }
    const int before = classes_before(call.student, index);
    const RowView row = typed_view<kType>(call.student, index, before);
    Largest<A> largest = {-A(INFINITY)};
    visit_student<A, kType>(row, before, targets, call.classes, [&](A s) { largest.x = fmax(largest.x, s); });
    largest = block_reduce(largest, &room);
    const A max = largest.x == -INFINITY ? A(0) : largest.x;
    Sum<A> sum = {A(0)};
    visit_student<A, kType>(row, before, targets, call.classes, [&](A s) { sum.x += exp(s - max); });
    sum = block_reduce(sum, &room);
    if (threadIdx.x != 0) return;
    A logits[2];
    for (int k = 0; k < 2; ++k)
        logits[k] = k < targets.count ? load_one<A>(row, targets.at[k]) : -A(INFINITY);
    const SplitSoftmax<A, 2> p = common::split_softmax<A, 2>(logits, max, sum.x);
    for (int k = 0; k < 2; ++k) {
        const double value = double(call.square ? p.p[k] * p.p[k] : p.p[k]);
        values[k] = (k < targets.count ? value : 0.0) + double(targets.poison);
    }
}

struct Totals {
    double p[2], rows;
    __device__ void merge(const Totals& o) {
        p[0] += o.p[0];
        p[1] += o.p[1];
        rows += o.rows;
    }
};

// One block, so that the order depends only on the number of rows.
__global__ void __launch_bounds__(kReducingThreads) sum_probabilities(BatchSumsCall call) {
    __shared__ WarpResults<Totals> room;
    const int64_t* const indices =
        call.target.dtype == kInt64 ? static_cast<const int64_t*>(call.target.data) : nullptr;
    Totals totals = {{0, 0}, 0};
    for (int64_t row = threadIdx.x; row < call.rows; row += blockDim.x) {
        totals.p[0] += call.workspace[2 * row];
        totals.p[1] += call.workspace[2 * row + 1];
        totals.rows += !indices || indices[row * call.target.row_stride] != call.ignore_index;
    }
    totals = block_reduce(totals, &room);
    if (threadIdx.x != 0) return;
    call.sums[0] = totals.p[0];
    call.sums[1] = totals.p[1];
    call.sums[2] = totals.rows;
}

} // namespace

const char* uskd_batch_sums(const Place& place, const BatchSumsCall& call) {
    if (const char* error = error_text(cudaSetDevice(place.device))) return error;
    if (call.rows > 0) {
        const auto of_float = [](auto type) { return target_probabilities<float, decltype(type)::value>; };
        const auto kernel = call.accumulate == kFloat64 ? target_probabilities<double, kAnyType>
                                                        : with_type(type_of(call.student), of_float);
        if (const char* error = launch(kernel, call.rows, streaming_threads(call.classes), 0, place.stream, call))
            return error;
    }
    return launch(sum_probabilities, 1, summing_threads(call.rows), 0, place.stream, call);
}

} // namespace cuda
} // namespace fused_kd

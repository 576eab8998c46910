// USKD: chooses the kernels of a call, counts the rows, and reduces the parts of the rows.
#include "uskd_launch.h"

namespace fused_kd {
namespace cuda {
namespace {

struct DoubleSums {
    double of[4];
    __device__ void merge(const DoubleSums& o) {
        for (int k = 0; k < 4; ++k)
            of[k] += o.of[k];
    }
};

using Room = WarpResults<DoubleSums>;

__global__ void __launch_bounds__(kReducingThreads) count_rows(RowsArguments args) {
    __shared__ Room room;
    const UskdCall& call = args.call;
    const int64_t counted = count_targets(call.target, call.rows, call.ignore_index, &room);
    if (threadIdx.x == 0) *const_cast<int64_t*>(args.count) = counted;
}

// Sums the parts of all rows with one block, in an order that depends only on the number of rows, or copies them. Also
// stores the norms for the backward pass.
template <class A>
__global__ void __launch_bounds__(kReducingThreads) reduce_parts(RowsArguments args) {
    __shared__ Room room;
    const UskdCall& call = args.call;
    const A* const rows = static_cast<const A*>(args.parts);
    A *const loss = static_cast<A*>(call.loss), *const parts = static_cast<A*>(call.parts);
    const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
    const int64_t divisor = divisor_of(args, &room);
    if (first == 0) {
        *static_cast<A*>(call.norms[0]) = A(stored_norm(call.student.dtype, call.student_scale, divisor));
        *static_cast<A*>(call.norms[1]) = A(stored_norm(call.weak.dtype, call.weak_scale, divisor));
    }
    DoubleSums sums = {{0, 0, 0, 0}};
    for (int64_t row = first; row < call.rows; row += step) {
        double total = 0;
        for (int k = 0; k < 4; ++k) {
            const A part = rows[4 * row + k];
            sums.of[k] += double(part);
            total += double(part);
            if (call.reduction == kNone) parts[k * call.rows + row] = part;
        }
        if (call.reduction == kNone) loss[row] = A(total);
    }
    if (call.reduction == kNone) return;
    sums = block_reduce(sums, &room);
    if (threadIdx.x != 0) return;
    double total = 0;
    for (int k = 0; k < 4; ++k) {
        parts[k] = A(sums.of[k] / double(divisor));
        total += sums.of[k] / double(divisor);
    }
    *loss = A(total);
}

} // namespace

const char* uskd_workspace_bytes(int device, int64_t rows, int64_t classes, DType accumulate, int64_t& bytes) {
    bytes = int64_t(kPlace + parts_bytes(rows, element_size(accumulate)));
    size_t shared = 0;
    if (const char* error = most_shared(device, shared)) return error;
    if (rows == 0 || arrangement_for(classes, accumulate == kFloat64, shared) >= 0) return nullptr;
    if (const char* error = error_text(cudaSetDevice(device))) return error;
    int64_t sorting = 0;
    const char* error = sorted_workspace_bytes(rows, int(classes), accumulate, sorting);
    bytes += sorting;
    return error;
}

const char* uskd(const Place& place, const UskdCall& call) {
    if (const char* error = error_text(cudaSetDevice(place.device))) return error;
    RowsArguments args = {};
    args.call = call;
    args.rows = call.rows;
    char* const workspace = static_cast<char*>(call.workspace);
    args.parts = workspace + kPlace;
    args.sorting = workspace + kPlace + parts_bytes(call.rows, element_size(call.accumulate));
    if (call.reduction == kMean && call.target.dtype == kInt64 && call.rows > kRowsCountedByEach) {
        args.count = reinterpret_cast<const int64_t*>(workspace);
        if (const char* error = launch(count_rows, 1, kReducingThreads, 0, place.stream, args)) return error;
    }
    if (call.rows > 0) {
        size_t shared = 0;
        if (const char* error = most_shared(place.device, shared)) return error;
        const int arrangement = arrangement_for(call.classes, call.accumulate == kFloat64, shared);
        const char* error = arrangement < 0             ? rank_rows_sorted(place, args)
                            : arrangement < kShortCount ? rank_short_rows(place, args, arrangement)
                                                        : rank_long_rows(place, args, arrangement);
        if (error) return error;
    }
    const auto reduce = call.accumulate == kFloat64 ? reduce_parts<double> : reduce_parts<float>;
    const int blocks = reducing_blocks(call.rows, call.reduction == kNone);
    return launch(reduce, blocks, kReducingThreads, 0, place.stream, args);
}

const char* problem() {
    cudaFuncAttributes attributes;
    return error_text(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&count_rows)));
}

} // namespace cuda
} // namespace fused_kd

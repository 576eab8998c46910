// What fused_kd._native has of CUDA, and what it says where that was left out. Like bindings.cpp: addresses, sizes and
// strides as plain integers. fused_kd/backends/native/cuda.py is the only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "../cuda/arrangements.h"
#include "../cuda/key_bits.h"
#include "../cuda/launch.h"
#include "../cuda/scales.h"
#include "cuda_build.h" // written by CMake

namespace py = pybind11;
using namespace fused_kd;

namespace {

#if defined(FKD_WITH_CUDA)

// (address, dtype, strides)
Matrix matrix(const py::tuple& m) {
    const py::tuple strides = m[2].cast<py::tuple>();
    const int64_t col = strides.size() > 1 ? strides[1].cast<int64_t>() : 1;
    return {reinterpret_cast<const void*>(m[0].cast<uintptr_t>()), DType(m[1].cast<int>()), strides[0].cast<int64_t>(),
            col};
}

void* address(uintptr_t data) {
    return reinterpret_cast<void*>(data);
}

int as_int(int64_t classes) {
    if (classes > cuda::kMostClasses)
        throw py::value_error("expected at most " + std::to_string(cuda::kMostClasses) + " classes, got " +
                              std::to_string(classes));
    return int(classes);
}

void check(const char* error) {
    if (error) throw std::runtime_error(std::string("fused_kd: CUDA says: ") + error);
}

int64_t uskd_workspace(int device, int64_t rows, int64_t classes, int accumulate) {
    int64_t bytes = 0;
    check(cuda::uskd_workspace_bytes(device, rows, as_int(classes), DType(accumulate), bytes));
    return bytes;
}

void run_uskd(int device, uintptr_t stream, const py::tuple& student, const py::tuple& weak, const py::tuple& target,
              uintptr_t batch_sums, uintptr_t factors, uintptr_t student_gradient, uintptr_t weak_gradient,
              uintptr_t loss, uintptr_t parts, uintptr_t student_norm, uintptr_t weak_norm, uintptr_t workspace,
              int accumulate, int64_t rows, int64_t classes, const std::array<double, 5>& weights, int rank,
              bool square, int64_t ignore_index, int reduction, double student_scale, double weak_scale) {
    cuda::UskdCall call = {};
    call.student = matrix(student);
    call.weak = matrix(weak);
    call.target = matrix(target);
    call.factors = reinterpret_cast<const double*>(factors);
    call.student_gradient = address(student_gradient);
    call.weak_gradient = address(weak_gradient);
    call.rows = rows;
    call.classes = as_int(classes);
    call.alpha = weights[0];
    call.beta = weights[1];
    call.mu = weights[2];
    call.ce_weight = weights[3];
    call.label_smoothing = weights[4];
    call.rank = rank;
    call.square = square;
    call.ignore_index = ignore_index;
    call.reduction = Reduction(reduction);
    call.student_scale = student_scale;
    call.weak_scale = weak_scale;
    call.batch_sums = reinterpret_cast<const double*>(batch_sums);
    call.accumulate = DType(accumulate);
    call.loss = address(loss);
    call.parts = address(parts);
    call.norms[0] = address(student_norm);
    call.norms[1] = address(weak_norm);
    call.workspace = address(workspace);
    py::gil_scoped_release release;
    check(cuda::uskd({device, stream}, call));
}

void run_batch_sums(int device, uintptr_t stream, const py::tuple& student, const py::tuple& target, uintptr_t sums,
                    uintptr_t workspace, int accumulate, int64_t rows, int64_t classes, bool square,
                    int64_t ignore_index) {
    const cuda::BatchSumsCall call = {matrix(student),
                                      matrix(target),
                                      rows,
                                      as_int(classes),
                                      square,
                                      ignore_index,
                                      DType(accumulate),
                                      reinterpret_cast<double*>(sums),
                                      reinterpret_cast<double*>(workspace)};
    py::gil_scoped_release release;
    check(cuda::uskd_batch_sums({device, stream}, call));
}

void run_scale_gradient(int device, uintptr_t stream, uintptr_t gradient, uintptr_t out, int dtype,
                        uintptr_t grad_output, int grad_output_dtype, int64_t grad_output_stride, uintptr_t norm,
                        int norm_dtype, int64_t rows, int64_t classes) {
    const cuda::ScaleCall call = {address(gradient),
                                  address(out),
                                  DType(dtype),
                                  address(grad_output),
                                  DType(grad_output_dtype),
                                  grad_output_stride,
                                  address(norm),
                                  DType(norm_dtype),
                                  rows,
                                  classes};
    py::gil_scoped_release release;
    check(cuda::scale_gradient({device, stream}, call));
}

#endif

} // namespace

void bind_cuda(py::module_& m) {
    m.attr("cuda_architectures") = FKD_CUDA_ARCHITECTURES; // "" where CUDA was left out
    m.attr("cuda_missing") = FKD_CUDA_MISSING;             // then why
    // What the launches are decided by, for tests where there is no GPU.
    m.attr("cuda_shared_limit") = cuda::kSharedLimit;
    m.def("cuda_arrangements", [] {
        py::list all;
        for (const cuda::Arrangement& a : cuda::kArrangements)
            all.append(py::make_tuple(a.threads, a.items, cuda::shared_bound(a)));
        return all;
    });
    m.def("cuda_arrangement_for", [](int64_t classes, bool twice) { return cuda::arrangement_for(classes, twice); });
    m.def("cuda_rows_per_pass", [](int64_t rows, int64_t classes) { return cuda::rows_per_pass(rows, classes); });
    m.def("cuda_streaming_threads", [](int64_t classes) { return cuda::streaming_threads(classes); });
    m.def("cuda_reducing_blocks", [](int64_t rows, bool per_row) { return cuda::reducing_blocks(rows, per_row); });
    m.def("cuda_summing_threads", [](int64_t rows) { return cuda::summing_threads(rows); });
    m.def("cuda_parts_bytes", [](int64_t rows, int element_bytes) { return cuda::parts_bytes(rows, element_bytes); });
    m.def("cuda_scaling_pieces", [](int64_t classes) { return cuda::scaling_pieces(classes); });
    m.def("cuda_descending_bits", [](double key, bool twice) {
        return twice ? cuda::descending_bits(key) : uint64_t(cuda::descending_bits(float(key)));
    });
    m.def("cuda_stored_scale", [](int dtype, double scale, int64_t divisor) {
        return py::make_tuple(cuda::stored_scale(DType(dtype), scale, divisor),
                              cuda::stored_norm(DType(dtype), scale, divisor));
    });
#if defined(FKD_WITH_CUDA)
    m.def("cuda_problem", [] {
        const char* problem = cuda::problem();
        return std::string(problem ? problem : "");
    });
    m.def("cuda_uskd_workspace", &uskd_workspace);
    m.def("cuda_uskd", &run_uskd);
    m.def("cuda_uskd_batch_sums", &run_batch_sums);
    m.def("cuda_scale_gradient", &run_scale_gradient);
#endif
}

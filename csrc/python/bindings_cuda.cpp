// The CUDA functions of fused_kd._native, or the reason why the build has none. fused_kd/backends/native/cuda.py calls
// them.
#include <stdexcept>

#include "../common/key_bits.h"
#include "../common/scales.h"
#include "../cuda/arrangements.h"
#include "../cuda/launch.h"
#include "boundary.h"
#include "cuda_build.h" // written by CMake

namespace py = pybind11;
using namespace fused_kd;

namespace {

#if defined(FKD_WITH_CUDA)

// (device, stream)
cuda::Place place_of(const py::tuple& given) {
    Fields fields(given, 2);
    const int device = int(fields.integer());
    return {device, uintptr_t(fields.integer())};
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

// options: (rank, square, ignore_index, reduction). results: addresses of the loss, its parts, the norm of each
// gradient and the workspace, then the dtype of all but the workspace.
void run_uskd(const py::tuple& where, const py::tuple& student, const py::tuple& weak, const py::tuple& target,
              const py::tuple& shape, const py::tuple& hyper, const py::tuple& options, uintptr_t batch_sums,
              uintptr_t factors, const py::tuple& gradients, const py::tuple& results) {
    const cuda::Place place = place_of(where);
    const Shape size(shape);
    Fields both(gradients, 2), settings(options, 4), out(results, 6);
    const Gradient of_student = gradient_of(both.tuple()), of_weak = gradient_of(both.tuple());
    cuda::UskdCall call = {};
    call.student = matrix(student);
    call.weak = matrix(weak);
    call.target = matrix(target);
    call.factors = reinterpret_cast<const double*>(factors);
    call.student_gradient = of_student.data;
    call.weak_gradient = of_weak.data;
    call.rows = size.rows;
    call.classes = as_int(size.classes);
    call.hyper = hyper_parameters(hyper);
    call.rank = int(settings.integer());
    call.square = settings.flag();
    call.ignore_index = settings.integer();
    call.reduction = Reduction(settings.integer());
    call.student_scale = of_student.scale;
    call.weak_scale = of_weak.scale;
    call.batch_sums = reinterpret_cast<const double*>(batch_sums);
    call.loss = out.address();
    call.parts = out.address();
    call.norms[0] = out.address();
    call.norms[1] = out.address();
    call.workspace = out.address();
    call.accumulate = out.dtype();
    py::gil_scoped_release release;
    check(cuda::uskd(place, call));
}

void run_batch_sums(const py::tuple& where, const py::tuple& student, const py::tuple& target, const py::tuple& shape,
                    bool square, int64_t ignore_index, int accumulate, uintptr_t sums, uintptr_t workspace) {
    const cuda::Place place = place_of(where);
    const Shape size(shape);
    const cuda::BatchSumsCall call = {matrix(student),
                                      matrix(target),
                                      size.rows,
                                      as_int(size.classes),
                                      square,
                                      ignore_index,
                                      DType(accumulate),
                                      reinterpret_cast<double*>(sums),
                                      reinterpret_cast<double*>(workspace)};
    py::gil_scoped_release release;
    check(cuda::uskd_batch_sums(place, call));
}

// grad_output has stride 0 if it is one number for all rows.
void run_scale_gradient(const py::tuple& where, uintptr_t gradient, uintptr_t out, int dtype,
                        const py::tuple& grad_output, uintptr_t norm, int norm_dtype, const py::tuple& shape) {
    const cuda::Place place = place_of(where);
    const Shape size(shape);
    const Matrix incoming = matrix(grad_output);
    const cuda::ScaleCall call = {reinterpret_cast<void*>(gradient),
                                  reinterpret_cast<void*>(out),
                                  DType(dtype),
                                  incoming.data,
                                  incoming.dtype,
                                  incoming.row_stride,
                                  reinterpret_cast<void*>(norm),
                                  DType(norm_dtype),
                                  size.rows,
                                  size.classes};
    py::gil_scoped_release release;
    check(cuda::scale_gradient(place, call));
}

#endif

} // namespace

void bind_cuda(py::module_& m) {
    m.attr("cuda_architectures") = FKD_CUDA_ARCHITECTURES; // "" if built without CUDA
    m.attr("cuda_missing") = FKD_CUDA_MISSING;             // the reason, if built without CUDA
    // The launch parameters, for tests without a GPU.
    m.def("cuda_arrangements", [] {
        py::list all;
        for (const cuda::Arrangement& a : cuda::kArrangements)
            all.append(py::make_tuple(a.threads, a.items, cuda::shared_bound(a)));
        return all;
    });
    m.def("cuda_arrangement_for",
          [](int64_t classes, bool twice, size_t shared) { return cuda::arrangement_for(classes, twice, shared); });
    m.def("cuda_rows_per_pass", [](int64_t rows, int64_t classes) { return cuda::rows_per_pass(rows, classes); });
    m.def("cuda_streaming_threads", [](int64_t classes) { return cuda::streaming_threads(classes); });
    m.def("cuda_reducing_blocks", [](int64_t rows, bool per_row) { return cuda::reducing_blocks(rows, per_row); });
    m.def("cuda_summing_threads", [](int64_t rows) { return cuda::summing_threads(rows); });
    m.def("cuda_parts_bytes", [](int64_t rows, int element_bytes) { return cuda::parts_bytes(rows, element_bytes); });
    m.def("cuda_scaling_pieces", [](int64_t classes) { return cuda::scaling_pieces(classes); });
    m.def("cuda_descending_bits", [](double key, bool twice) {
        return twice ? common::descending_bits(key) : uint64_t(common::descending_bits(float(key)));
    });
    m.def("cuda_stored_scale", [](int dtype, double scale, int64_t divisor) {
        return py::make_tuple(common::stored_scale(DType(dtype), scale, divisor),
                              common::stored_norm(DType(dtype), scale, divisor));
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

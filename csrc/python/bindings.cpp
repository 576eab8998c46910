// The Python module fused_kd._native. It takes addresses, sizes and strides as plain integers, so that it needs no
// PyTorch headers and one build works with every PyTorch; fused_kd/backends/native/__init__.py is its only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../common/row_math.h"
#include "../cpu/core.h"

namespace py = pybind11;
using namespace fused_kd;

namespace {

const Kernels& kernels_named(const std::string& name) {
    static const std::vector<const Kernels*> runnable = runnable_kernels();
    for (const Kernels* kernels : runnable)
        if (name == kernels->name) return *kernels;
    throw py::value_error("instruction_set: expected one of instruction_sets(), got '" + name + "'");
}

Matrix matrix(uintptr_t data, int dtype, const py::tuple& strides) {
    const int64_t col = strides.size() > 1 ? strides[1].cast<int64_t>() : 1;
    return {reinterpret_cast<const void*>(data), DType(dtype), strides[0].cast<int64_t>(), col};
}

void* address(uintptr_t data) {
    return reinterpret_cast<void*>(data);
}

int64_t run_row_loss(const std::string& instruction_set, uintptr_t student, int student_dtype,
                     const py::tuple& student_strides, uintptr_t teacher, int teacher_dtype,
                     const py::tuple& teacher_strides, uintptr_t target, int target_dtype,
                     const py::tuple& target_strides, uintptr_t factors, uintptr_t gradient, uintptr_t loss,
                     uintptr_t parts, uintptr_t norm, int accumulate, int64_t rows, int64_t classes, int loss_kind,
                     const std::array<double, 5>& weights, bool standardize, int64_t ignore_index, int reduction,
                     double gradient_scale, int threads) {
    RowArgs args = {};
    args.student = matrix(student, student_dtype, student_strides);
    args.teacher = matrix(teacher, teacher_dtype, teacher_strides);
    args.target = matrix(target, target_dtype, target_strides);
    args.factors = reinterpret_cast<const double*>(factors);
    args.gradient = reinterpret_cast<void*>(gradient);
    args.rows = rows;
    args.classes = classes;
    args.loss = loss_kind;
    args.first = weights[0];
    args.second = weights[1];
    args.temperature = weights[2];
    args.ce_weight = weights[3];
    args.label_smoothing = weights[4];
    args.standardize = standardize;
    args.ignore_index = ignore_index;
    args.gradient_scale = gradient_scale;
    args.accumulate = DType(accumulate);
    args.threads = threads;
    const LossOutputs out = {
        Reduction(reduction), reinterpret_cast<void*>(loss), reinterpret_cast<void*>(parts), {address(norm), nullptr}};
    const Kernels& kernels = kernels_named(instruction_set);
    py::gil_scoped_release release;
    return row_loss(kernels, args, out);
}

int64_t run_uskd_batch_sums(const std::string& instruction_set, uintptr_t student, int student_dtype,
                            const py::tuple& student_strides, uintptr_t target, int target_dtype,
                            const py::tuple& target_strides, uintptr_t sums, int accumulate, int64_t rows,
                            int64_t classes, bool square, int64_t ignore_index, int threads) {
    TargetProbsArgs args = {};
    args.student = matrix(student, student_dtype, student_strides);
    args.target = matrix(target, target_dtype, target_strides);
    args.rows = rows;
    args.classes = classes;
    args.square = square;
    args.ignore_index = ignore_index;
    args.accumulate = DType(accumulate);
    args.threads = threads;
    const Kernels& kernels = kernels_named(instruction_set);
    py::gil_scoped_release release;
    return uskd_batch_sums(kernels, args, reinterpret_cast<double*>(sums));
}

int64_t run_uskd(const std::string& instruction_set, uintptr_t student, int student_dtype,
                 const py::tuple& student_strides, uintptr_t weak, int weak_dtype, const py::tuple& weak_strides,
                 uintptr_t target, int target_dtype, const py::tuple& target_strides, uintptr_t batch_sums,
                 uintptr_t factors, uintptr_t student_gradient, uintptr_t weak_gradient, uintptr_t loss,
                 uintptr_t parts, uintptr_t student_norm, uintptr_t weak_norm, int accumulate, int64_t rows,
                 int64_t classes, const std::array<double, 5>& weights, int rank, bool square, int64_t ignore_index,
                 int reduction, double student_scale, double weak_scale, int threads) {
    UskdArgs args = {};
    args.student = matrix(student, student_dtype, student_strides);
    args.weak = matrix(weak, weak_dtype, weak_strides);
    args.target = matrix(target, target_dtype, target_strides);
    args.factors = reinterpret_cast<const double*>(factors);
    args.student_gradient = address(student_gradient);
    args.weak_gradient = address(weak_gradient);
    args.rows = rows;
    args.classes = classes;
    args.alpha = weights[0];
    args.beta = weights[1];
    args.mu = weights[2];
    args.ce_weight = weights[3];
    args.label_smoothing = weights[4];
    args.rank = rank;
    args.square = square;
    args.ignore_index = ignore_index;
    args.student_scale = student_scale;
    args.weak_scale = weak_scale;
    args.accumulate = DType(accumulate);
    args.threads = threads;
    const LossOutputs out = {
        Reduction(reduction), address(loss), address(parts), {address(student_norm), address(weak_norm)}};
    const Kernels& kernels = kernels_named(instruction_set);
    py::gil_scoped_release release;
    return uskd(kernels, args, reinterpret_cast<const double*>(batch_sums), out);
}

int64_t run_zipf_ls(const std::string& instruction_set, uintptr_t student, int student_dtype,
                    const py::tuple& student_strides, uintptr_t dense, int dense_dtype, const py::tuple& dense_strides,
                    int64_t positions, uintptr_t target, int target_dtype, const py::tuple& target_strides,
                    uintptr_t factors, uintptr_t gradient, uintptr_t loss, uintptr_t parts, uintptr_t norm,
                    int accumulate, int64_t rows, int64_t classes, const std::array<double, 4>& weights,
                    int64_t ignore_index, int reduction, double scale, int threads) {
    UskdArgs args = {};
    args.student = matrix(student, student_dtype, student_strides);
    args.weak = args.student;
    args.target = matrix(target, target_dtype, target_strides);
    args.factors = reinterpret_cast<const double*>(factors);
    args.student_gradient = address(gradient);
    args.rows = rows;
    args.classes = classes;
    args.beta = weights[0];
    args.power = weights[1];
    args.ce_weight = weights[2];
    args.label_smoothing = weights[3];
    args.rank = common::kVotes;
    args.ignore_index = ignore_index;
    args.student_scale = scale;
    args.weak_scale = 1;
    args.accumulate = DType(accumulate);
    args.threads = threads;
    args.dense = {address(dense), DType(dense_dtype), dense_strides[1].cast<int64_t>(),
                  dense_strides[2].cast<int64_t>()};
    args.dense_stride = dense_strides[0].cast<int64_t>();
    args.positions = positions;
    const LossOutputs out = {Reduction(reduction), address(loss), address(parts), {address(norm), nullptr}};
    const Kernels& kernels = kernels_named(instruction_set);
    py::gil_scoped_release release;
    return zipf_ls(kernels, args, out);
}

void run_argsort_descending(const std::string& instruction_set, uintptr_t keys, int64_t rows, int64_t classes,
                            uintptr_t order, int threads) {
    const Kernels& kernels = kernels_named(instruction_set);
    py::gil_scoped_release release;
    kernels.argsort_descending(
        {reinterpret_cast<const float*>(keys), reinterpret_cast<int64_t*>(order), rows, classes, threads});
}

void run_scale_gradient(const std::string& instruction_set, uintptr_t gradient, uintptr_t out, int dtype,
                        uintptr_t grad_output, int grad_output_dtype, int64_t grad_output_stride, double norm,
                        int64_t rows, int64_t classes, int threads) {
    const ScaleArgs args = {reinterpret_cast<const void*>(gradient),
                            reinterpret_cast<void*>(out),
                            DType(dtype),
                            reinterpret_cast<const void*>(grad_output),
                            DType(grad_output_dtype),
                            grad_output_stride,
                            norm,
                            rows,
                            classes,
                            threads};
    const Kernels& kernels = kernels_named(instruction_set);
    py::gil_scoped_release release;
    kernels.scale_gradient(args);
}

} // namespace

void bind_cuda(py::module_& m); // bindings_cuda.cpp

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU and CUDA kernels of fused_kd.";
    bind_cuda(m);
    m.def("instruction_sets", [] {
        py::list names;
        for (const Kernels* kernels : runnable_kernels())
            names.append(kernels->name);
        return names;
    });
    m.def("row_loss", &run_row_loss);
    m.def("uskd_batch_sums", &run_uskd_batch_sums);
    m.def("uskd", &run_uskd);
    m.def("zipf_ls", &run_zipf_ls);
    m.def("scale_gradient", &run_scale_gradient);
    m.def("argsort_descending", &run_argsort_descending);
    m.attr("compiler") = FKD_COMPILER;
    m.attr("sources") = FKD_SOURCES; // fused_kd/backends/native/core.py compares it with the files beside the package
    m.def("openmp_runtime", &openmp_runtime);
}

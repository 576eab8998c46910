// The Python module fused_kd._native, and its CPU functions: fused_kd/backends/native/__init__.py calls them.
#include "../common/row_math.h"
#include "../cpu/core.h"
#include "boundary.h"

namespace py = pybind11;
using namespace fused_kd;

namespace {

typedef std::tuple<std::string, int> Where; // instruction set, threads

const Kernels& kernels_named(const std::string& name) {
    static const std::vector<const Kernels*> runnable = runnable_kernels();
    for (const Kernels* kernels : runnable)
        if (name == kernels->name) return *kernels;
    throw py::value_error("instruction_set: expected one of instruction_sets(), got '" + name + "'");
}

// What a loss writes: loss, parts, norm of each gradient, and the dtype of all of them.
typedef std::tuple<uintptr_t, uintptr_t, uintptr_t, int> Results;
typedef std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int> PairResults;
typedef std::tuple<uintptr_t, double> Gradient; // address, 0 where it is not wanted, and what it is multiplied by

int64_t run_row_loss(const Where& where, const Given& student, const Given& teacher, const Given& target,
                     const Shape& shape, int loss, const GivenHyperParameters& hyper,
                     const std::tuple<bool, int64_t, int>& options, uintptr_t factors, const Gradient& gradient,
                     const Results& results) {
    const auto [instruction_set, threads] = where;
    const auto [standardize, ignore_index, reduction] = options;
    const auto [loss_out, parts_out, norm, accumulate] = results;
    RowArgs args = {};
    args.student = matrix(student);
    args.teacher = matrix(teacher);
    args.target = matrix(target);
    args.factors = doubles(factors);
    args.gradient = address(std::get<0>(gradient));
    args.rows = shape[0];
    args.classes = shape[1];
    args.loss = loss;
    args.hyper = hyper_parameters(hyper);
    args.standardize = standardize;
    args.ignore_index = ignore_index;
    args.gradient_scale = std::get<1>(gradient);
    args.accumulate = DType(accumulate);
    args.threads = threads;
    const LossOutputs out = {Reduction(reduction), address(loss_out), address(parts_out), {address(norm), nullptr}};
    const Kernels& kernels = kernels_named(instruction_set);
    py::gil_scoped_release release;
    return row_loss(kernels, args, out);
}

int64_t run_uskd_batch_sums(const Where& where, const Given& student, const Given& target, const Shape& shape,
                            bool square, int64_t ignore_index, int accumulate, uintptr_t sums) {
    TargetProbsArgs args = {};
    args.student = matrix(student);
    args.target = matrix(target);
    args.rows = shape[0];
    args.classes = shape[1];
    args.square = square;
    args.ignore_index = ignore_index;
    args.accumulate = DType(accumulate);
    args.threads = std::get<1>(where);
    const Kernels& kernels = kernels_named(std::get<0>(where));
    py::gil_scoped_release release;
    return uskd_batch_sums(kernels, args, reinterpret_cast<double*>(sums));
}

int64_t run_uskd(const Where& where, const Given& student, const Given& weak, const Given& target, const Shape& shape,
                 const GivenHyperParameters& hyper, const std::tuple<int, bool, int64_t, int>& options,
                 uintptr_t batch_sums, uintptr_t factors, const std::array<Gradient, 2>& gradients,
                 const PairResults& results) {
    const auto [instruction_set, threads] = where;
    const auto [rank, square, ignore_index, reduction] = options;
    const auto [loss_out, parts_out, student_norm, weak_norm, accumulate] = results;
    UskdArgs args = {};
    args.student = matrix(student);
    args.weak = matrix(weak);
    args.target = matrix(target);
    args.factors = doubles(factors);
    args.student_gradient = address(std::get<0>(gradients[0]));
    args.weak_gradient = address(std::get<0>(gradients[1]));
    args.rows = shape[0];
    args.classes = shape[1];
    args.hyper = hyper_parameters(hyper);
    args.rank = rank;
    args.square = square;
    args.ignore_index = ignore_index;
    args.student_scale = std::get<1>(gradients[0]);
    args.weak_scale = std::get<1>(gradients[1]);
    args.accumulate = DType(accumulate);
    args.threads = threads;
    const LossOutputs out = {
        Reduction(reduction), address(loss_out), address(parts_out), {address(student_norm), address(weak_norm)}};
    const Kernels& kernels = kernels_named(instruction_set);
    py::gil_scoped_release release;
    return uskd(kernels, args, doubles(batch_sums), out);
}

// The dense logits come as their address, dtype and three strides, and the number of positions.
int64_t run_zipf_ls(const Where& where, const Given& student, const Given& dense, int64_t positions,
                    const Given& target, const Shape& shape, const GivenHyperParameters& hyper,
                    const std::tuple<int64_t, int>& options, uintptr_t factors, const Gradient& gradient,
                    const Results& results) {
    const auto [instruction_set, threads] = where;
    const auto [ignore_index, reduction] = options;
    const auto [loss_out, parts_out, norm, accumulate] = results;
    const auto& [dense_data, dense_dtype, dense_strides] = dense;
    UskdArgs args = {};
    args.student = matrix(student);
    args.weak = args.student;
    args.target = matrix(target);
    args.factors = doubles(factors);
    args.student_gradient = address(std::get<0>(gradient));
    args.rows = shape[0];
    args.classes = shape[1];
    args.hyper = hyper_parameters(hyper);
    args.rank = common::kVotes;
    args.ignore_index = ignore_index;
    args.student_scale = std::get<1>(gradient);
    args.weak_scale = 1;
    args.accumulate = DType(accumulate);
    args.threads = threads;
    args.dense = {address(dense_data), DType(dense_dtype), dense_strides[1].cast<int64_t>(),
                  dense_strides[2].cast<int64_t>()};
    args.dense_stride = dense_strides[0].cast<int64_t>();
    args.positions = positions;
    const LossOutputs out = {Reduction(reduction), address(loss_out), address(parts_out), {address(norm), nullptr}};
    const Kernels& kernels = kernels_named(instruction_set);
    py::gil_scoped_release release;
    return zipf_ls(kernels, args, out);
}

void run_argsort_descending(const Where& where, uintptr_t keys, const Shape& shape, uintptr_t order) {
    const Kernels& kernels = kernels_named(std::get<0>(where));
    const ArgsortArgs args = {reinterpret_cast<const float*>(keys), reinterpret_cast<int64_t*>(order), shape[0],
                              shape[1], std::get<1>(where)};
    py::gil_scoped_release release;
    kernels.argsort_descending(args);
}

// What comes in has a stride of 0 where it is one number for all rows.
void run_scale_gradient(const Where& where, uintptr_t gradient, uintptr_t out, int dtype, const Given& grad_output,
                        double norm, const Shape& shape) {
    const Matrix incoming = matrix(grad_output);
    const ScaleArgs args = {address(gradient),   address(out), DType(dtype), incoming.data, incoming.dtype,
                            incoming.row_stride, norm,         shape[0],     shape[1],      std::get<1>(where)};
    const Kernels& kernels = kernels_named(std::get<0>(where));
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

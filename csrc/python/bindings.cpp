// The Python module fused_kd._native, and its CPU functions: fused_kd/backends/native/__init__.py calls them.
#include <cstring>
#include <string>
#include <vector>

#include "../cpu/core.h"
#include "boundary.h"
#include "direct.h"

namespace py = pybind11;
using namespace fused_kd;

namespace {

// (instruction set, threads)
struct Where {
    explicit Where(const py::tuple& given) {
        Fields fields(given, 2);
        const char* const name = fields.text();
        threads = int(fields.integer());
        static const std::vector<const Kernels*> runnable = runnable_kernels();
        for (const Kernels* each : runnable)
            if (std::strcmp(name, each->name) == 0) kernels = each;
        if (!kernels)
            throw py::value_error("instruction_set: expected one of instruction_sets(), got '" + std::string(name) +
                                  "'");
    }
    const Kernels* kernels = nullptr;
    int threads;
};

// What a loss writes: the loss, its parts, the norm of each gradient, and the dtype of them all.
LossOutputs outputs(const py::tuple& given, int gradients, int64_t reduction, DType& accumulate) {
    Fields fields(given, 3 + gradients);
    LossOutputs out = {};
    out.reduction = Reduction(reduction);
    out.loss = fields.address();
    out.parts = fields.address();
    for (int k = 0; k < gradients; ++k)
        out.norms[k] = fields.address();
    accumulate = fields.dtype();
    return out;
}

// What every call of a row loss says: options: (standardize, ignore_index, ...)
RowArgs row_args(const Where& place, const py::tuple& student, const py::tuple& teacher, const py::tuple& target,
                 const py::tuple& shape, int loss, const py::tuple& hyper, uintptr_t factors,
                 const py::tuple& gradient) {
    const Shape size(shape);
    const Gradient stored(gradient);
    RowArgs args = {};
    args.student = matrix(student);
    args.teacher = matrix(teacher);
    args.target = matrix(target);
    args.factors = reinterpret_cast<const double*>(factors);
    args.gradient = stored.data;
    args.rows = size.rows;
    args.classes = size.classes;
    args.loss = loss;
    args.hyper = hyper_parameters(hyper);
    args.gradient_scale = stored.scale;
    args.threads = place.threads;
    return args;
}

// options: (standardize, ignore_index, reduction)
int64_t run_row_loss(const py::tuple& where, const py::tuple& student, const py::tuple& teacher,
                     const py::tuple& target, const py::tuple& shape, int loss, const py::tuple& hyper,
                     const py::tuple& options, uintptr_t factors, uintptr_t column_factor, const py::tuple& gradient,
                     const py::tuple& results) {
    const Where place(where);
    Fields asked(options, 3);
    RowArgs args = row_args(place, student, teacher, target, shape, loss, hyper, factors, gradient);
    args.standardize = asked.flag();
    args.ignore_index = asked.integer();
    args.column_factor = reinterpret_cast<const double*>(column_factor);
    const LossOutputs out = outputs(results, 1, asked.integer(), args.accumulate);
    py::gil_scoped_release release;
    return row_loss(*place.kernels, args, out);
}

// piece: (stage, target, first_class, num_classes, pieces, moments, statistics, sums, out);
// options: (standardize, ignore_index, parts, accumulate)
int64_t run_row_stage(const py::tuple& where, const py::tuple& student, const py::tuple& teacher,
                      const py::tuple& labels, const py::tuple& shape, int loss, const py::tuple& hyper,
                      const py::tuple& options, uintptr_t factors, const py::tuple& gradient, const py::tuple& piece) {
    const Where place(where);
    Fields asked(options, 4), at(piece, 9);
    RowArgs args = row_args(place, student, teacher, labels, shape, loss, hyper, factors, gradient);
    args.standardize = asked.flag();
    args.ignore_index = asked.integer();
    args.parts = asked.doubles();
    args.accumulate = asked.dtype();
    Piece here = {};
    here.stage = Stage(at.integer());
    here.target = static_cast<const int64_t*>(at.address());
    here.first_class = at.integer();
    here.num_classes = at.integer();
    here.pieces = at.integer();
    here.moments = at.doubles();
    here.statistics = at.doubles();
    here.sums = at.doubles();
    here.out = at.doubles();
    args.piece = &here;
    py::gil_scoped_release release;
    return row_stage(*place.kernels, args);
}

int64_t run_uskd_batch_sums(const py::tuple& where, const py::tuple& student, const py::tuple& target,
                            const py::tuple& shape, bool square, int64_t ignore_index, int accumulate, uintptr_t sums) {
    const Where place(where);
    const Shape size(shape);
    TargetProbsArgs args = {};
    args.student = matrix(student);
    args.target = matrix(target);
    args.rows = size.rows;
    args.classes = size.classes;
    args.square = square;
    args.ignore_index = ignore_index;
    args.accumulate = DType(accumulate);
    args.threads = place.threads;
    py::gil_scoped_release release;
    return uskd_batch_sums(*place.kernels, args, reinterpret_cast<double*>(sums));
}

// options: (rank, square, ignore_index, reduction)
int64_t run_uskd(const py::tuple& where, const py::tuple& student, const py::tuple& weak, const py::tuple& target,
                 const py::tuple& shape, const py::tuple& hyper, const py::tuple& options, uintptr_t batch_sums,
                 uintptr_t factors, const py::tuple& gradients, const py::tuple& results) {
    const Where place(where);
    const Shape size(shape);
    Fields both(gradients, 2);
    const Gradient of_student(both.tuple()), of_weak(both.tuple());
    Fields asked(options, 4);
    UskdArgs args = {};
    args.student = matrix(student);
    args.weak = matrix(weak);
    args.target = matrix(target);
    args.factors = reinterpret_cast<const double*>(factors);
    args.student_gradient = of_student.data;
    args.weak_gradient = of_weak.data;
    args.rows = size.rows;
    args.classes = size.classes;
    args.hyper = hyper_parameters(hyper);
    args.rank = int(asked.integer());
    args.square = asked.flag();
    args.ignore_index = asked.integer();
    args.student_scale = of_student.scale;
    args.weak_scale = of_weak.scale;
    args.threads = place.threads;
    const LossOutputs out = outputs(results, 2, asked.integer(), args.accumulate);
    py::gil_scoped_release release;
    return uskd(*place.kernels, args, reinterpret_cast<const double*>(batch_sums), out);
}

// The dense logits have three strides, of rows, positions and classes. options: (ignore_index, reduction)
int64_t run_zipf_ls(const py::tuple& where, const py::tuple& student, const py::tuple& dense, int64_t positions,
                    const py::tuple& target, const py::tuple& shape, const py::tuple& hyper, const py::tuple& options,
                    uintptr_t factors, const py::tuple& gradient, const py::tuple& results) {
    const Where place(where);
    const Shape size(shape);
    const Gradient stored(gradient);
    Fields asked(options, 2), votes(dense, 3);
    ZipfArgs args = {};
    args.student = matrix(student);
    args.dense.data = votes.address();
    args.dense.dtype = votes.dtype();
    Fields strides(votes.tuple(), 3);
    args.dense_stride = strides.integer();
    args.dense.row_stride = strides.integer();
    args.dense.col_stride = strides.integer();
    args.positions = positions;
    args.target = matrix(target);
    args.factors = reinterpret_cast<const double*>(factors);
    args.gradient = stored.data;
    args.rows = size.rows;
    args.classes = size.classes;
    args.hyper = hyper_parameters(hyper);
    args.ignore_index = asked.integer();
    args.gradient_scale = stored.scale;
    args.threads = place.threads;
    const LossOutputs out = outputs(results, 1, asked.integer(), args.accumulate);
    py::gil_scoped_release release;
    return zipf_ls(*place.kernels, args, out);
}

// kept: (log_probs, indices, classes of a row, rest)
int64_t run_topk_loss(const py::tuple& where, const py::tuple& student, const py::tuple& kept, const py::tuple& target,
                      const py::tuple& shape, int loss, const py::tuple& hyper, int64_t ignore_index, uintptr_t factors,
                      const py::tuple& gradient, const py::tuple& results) {
    const Where place(where);
    const Shape size(shape);
    const Gradient stored(gradient);
    Fields of_teacher(kept, 4);
    TopKArgs args = {};
    args.student = matrix(student);
    args.log_probs = matrix(of_teacher.tuple());
    args.indices = matrix(of_teacher.tuple());
    args.kept = of_teacher.integer();
    args.rest = int(of_teacher.integer());
    args.target = matrix(target);
    args.factors = reinterpret_cast<const double*>(factors);
    args.gradient = stored.data;
    args.rows = size.rows;
    args.classes = size.classes;
    args.loss = loss;
    args.hyper = hyper_parameters(hyper);
    args.ignore_index = ignore_index;
    args.gradient_scale = stored.scale;
    args.threads = place.threads;
    const LossOutputs out = outputs(results, 0, kNone, args.accumulate);
    py::gil_scoped_release release;
    return topk_loss(*place.kernels, args, out);
}

void run_argsort_descending(const py::tuple& where, uintptr_t keys, const py::tuple& shape, uintptr_t order) {
    const Where place(where);
    const Shape size(shape);
    const ArgsortArgs args = {reinterpret_cast<const float*>(keys), reinterpret_cast<int64_t*>(order), size.rows,
                              size.classes, place.threads};
    py::gil_scoped_release release;
    place.kernels->argsort_descending(args);
}

// What comes in has a stride of 0 where it is one number for all rows.
void run_scale_gradient(const py::tuple& where, uintptr_t gradient, uintptr_t out, int dtype,
                        const py::tuple& grad_output, double norm, const py::tuple& shape) {
    const Where place(where);
    const Shape size(shape);
    const Matrix incoming = matrix(grad_output);
    const ScaleArgs args = {reinterpret_cast<const void*>(gradient),
                            reinterpret_cast<void*>(out),
                            DType(dtype),
                            incoming.data,
                            incoming.dtype,
                            incoming.row_stride,
                            norm,
                            size.rows,
                            size.classes,
                            place.threads};
    py::gil_scoped_release release;
    place.kernels->scale_gradient(args);
}

} // namespace

void bind_cuda(py::module_& m); // bindings_cuda.cpp

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU and CUDA kernels of fused_kd.";
    bind_cuda(m);
    if (!bind_direct(m.ptr())) throw py::error_already_set();
    m.def("instruction_sets", [] {
        py::list names;
        for (const Kernels* kernels : runnable_kernels())
            names.append(kernels->name);
        return names;
    });
    m.def("row_loss", &run_row_loss);
    m.def("row_stage", &run_row_stage);
    m.def("uskd_batch_sums", &run_uskd_batch_sums);
    m.def("uskd", &run_uskd);
    m.def("zipf_ls", &run_zipf_ls);
    m.def("topk_loss", &run_topk_loss);
    m.def("scale_gradient", &run_scale_gradient);
    m.def("argsort_descending", &run_argsort_descending);
    m.attr("compiler") = FKD_COMPILER;
    m.attr("sources") = FKD_SOURCES; // fused_kd/backends/native/core.py compares it with the files beside the package
    m.def("openmp_runtime", &openmp_runtime);
}

// The Python module fused_kd._native, with its CPU functions. fused_kd/backends/native/__init__.py calls them.
#include <string>

#include "../cpu/core.h"
#include "boundary.h"
#include "direct.h"

namespace py = pybind11;
using namespace fused_kd;

namespace {

// (instruction set, threads)
struct Execution {
    explicit Execution(const py::handle& given) {
        Fields fields(given, 2);
        const char* const name = fields.text();
        threads = int(fields.integer());
        kernels = kernels_named(name);
        if (!kernels)
            throw py::value_error("instruction_set: expected one of instruction_sets(), got '" + std::string(name) +
                                  "'");
    }
    const Kernels* kernels;
    int threads;
};

// The batch arguments of every call: (where, student, target, shape, ignore_index, accumulate).
struct Batch : BatchArgs {
    explicit Batch(const py::tuple& given) : BatchArgs{} {
        Fields fields(given, 6);
        const Execution execution(fields.tuple());
        kernels = execution.kernels;
        threads = execution.threads;
        student = matrix(fields.tuple());
        target = matrix(fields.tuple());
        const Shape size(fields.tuple());
        rows = size.rows;
        classes = size.classes;
        ignore_index = fields.integer();
        accumulate = fields.dtype();
    }

    // Add the arguments of a loss. of_loss: (hyper-parameters, factors).
    template <class Args>
    Args with(const py::tuple& of_loss) const {
        Fields fields(of_loss, 2);
        Args args = {};
        static_cast<BatchArgs&>(args) = *this;
        args.hyper = hyper_parameters(fields.tuple());
        args.factors = fields.doubles();
        return args;
    }

    const Kernels* kernels;
};

// given: (reduction, addresses of the loss, its parts, and the norm of each gradient)
LossOutputs outputs(const py::tuple& given, int gradients) {
    Fields fields(given, 3 + gradients);
    LossOutputs out = {};
    out.reduction = Reduction(fields.integer());
    out.loss = fields.address();
    out.parts = fields.address();
    for (int k = 0; k < gradients; ++k)
        out.norms[k] = fields.address();
    return out;
}

RowArgs row_args(const Batch& batch, const py::tuple& of_loss, const py::tuple& teacher, int loss, bool standardize) {
    RowArgs args = batch.with<RowArgs>(of_loss);
    args.teacher = matrix(teacher);
    args.loss = loss;
    args.standardize = standardize;
    return args;
}

int64_t run_row_loss(const py::tuple& rows, const py::tuple& of_loss, const py::tuple& teacher, int loss,
                     bool standardize, uintptr_t column_factor, const py::tuple& gradient, const py::tuple& results) {
    const Batch batch(rows);
    RowArgs args = row_args(batch, of_loss, teacher, loss, standardize);
    args.column_factor = reinterpret_cast<const double*>(column_factor);
    args.gradient = gradient_of(gradient, true);
    const LossOutputs out = outputs(results, 1);
    py::gil_scoped_release release;
    return row_loss(*batch.kernels, args, out);
}

// piece: (stage, target, first_class, num_classes, pieces, moments, statistics, sums, out)
int64_t run_row_stage(const py::tuple& rows, const py::tuple& of_loss, const py::tuple& teacher, int loss,
                      bool standardize, const py::tuple& gradient, uintptr_t parts, const py::tuple& piece) {
    const Batch batch(rows);
    RowArgs args = row_args(batch, of_loss, teacher, loss, standardize);
    args.gradient = gradient_of(gradient);
    args.parts = reinterpret_cast<double*>(parts);
    Fields at(piece, 9);
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
    return row_stage(*batch.kernels, args);
}

int64_t run_uskd_batch_sums(const py::tuple& rows, bool square, uintptr_t sums) {
    const Batch batch(rows);
    TargetProbsArgs args = {};
    static_cast<BatchArgs&>(args) = batch;
    args.square = square;
    py::gil_scoped_release release;
    return uskd_batch_sums(*batch.kernels, args, reinterpret_cast<double*>(sums));
}

// gradients: of the student and of the weak logits
int64_t run_uskd(const py::tuple& rows, const py::tuple& of_loss, const py::tuple& weak, int rank, bool square,
                 uintptr_t batch_sums, const py::tuple& gradients, const py::tuple& results) {
    const Batch batch(rows);
    UskdArgs args = batch.with<UskdArgs>(of_loss);
    args.weak = matrix(weak);
    args.rank = rank;
    args.square = square;
    Fields both(gradients, 2);
    args.student_gradient = gradient_of(both.tuple());
    args.weak_gradient = gradient_of(both.tuple());
    const LossOutputs out = outputs(results, 2);
    py::gil_scoped_release release;
    return uskd(*batch.kernels, args, reinterpret_cast<const double*>(batch_sums), out);
}

// dense: (address, dtype, strides of rows, positions and classes, positions)
int64_t run_zipf_ls(const py::tuple& rows, const py::tuple& of_loss, const py::tuple& dense, const py::tuple& gradient,
                    const py::tuple& results) {
    const Batch batch(rows);
    ZipfArgs args = batch.with<ZipfArgs>(of_loss);
    Fields votes(dense, 4);
    args.dense.data = votes.address();
    args.dense.dtype = votes.dtype();
    Fields strides(votes.tuple(), 3);
    args.dense_stride = strides.integer();
    args.dense.row_stride = strides.integer();
    args.dense.col_stride = strides.integer();
    args.positions = votes.integer();
    args.gradient = gradient_of(gradient);
    const LossOutputs out = outputs(results, 1);
    py::gil_scoped_release release;
    return zipf_ls(*batch.kernels, args, out);
}

// kept: (log_probs, indices, classes of a row, rest)
int64_t run_topk_loss(const py::tuple& rows, const py::tuple& of_loss, const py::tuple& kept, int loss,
                      const py::tuple& gradient, const py::tuple& results, const py::object& piece) {
    const Batch batch(rows);
    TopKArgs args = batch.with<TopKArgs>(of_loss);
    Fields of_teacher(kept, 4);
    args.log_probs = matrix(of_teacher.tuple());
    args.indices = matrix(of_teacher.tuple());
    args.kept = of_teacher.integer();
    args.rest = int(of_teacher.integer());
    args.loss = loss;
    args.gradient = gradient_of(gradient, true);
    TopKPiece here = {};
    if (!piece.is_none()) {
        Fields at(piece, 4);
        here.first_class = at.integer();
        here.num_classes = at.integer();
        here.all = at.doubles();
        here.own = at.doubles();
        args.piece = &here;
    }
    const LossOutputs out = outputs(results, 0);
    py::gil_scoped_release release;
    return topk_loss(*batch.kernels, args, out);
}

void run_argsort_descending(const py::tuple& where, uintptr_t keys, const py::tuple& shape, uintptr_t order) {
    const Execution execution(where);
    const Shape size(shape);
    const ArgsortArgs args = {reinterpret_cast<const float*>(keys), reinterpret_cast<int64_t*>(order), size.rows,
                              size.classes, execution.threads};
    py::gil_scoped_release release;
    execution.kernels->argsort_descending(args);
}

// grad_output has stride 0 if it is one number for all rows.
void run_scale_gradient(const py::tuple& where, uintptr_t gradient, uintptr_t out, int dtype,
                        const py::tuple& grad_output, double norm, const py::tuple& shape) {
    const Execution execution(where);
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
                            execution.threads};
    py::gil_scoped_release release;
    execution.kernels->scale_gradient(args);
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
    m.attr("sources") = FKD_SOURCES; // fused_kd/backends/native/core.py compares it with the source files
    m.def("openmp_runtime", &openmp_runtime);
}

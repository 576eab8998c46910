// Ordinary calls, complete in C++: check the tensors, allocate the results, run the kernels. In a training step our
// instructions are no longer in the caches, so their number determines the cost of a call; Python would take several
// times as long. Unusual calls, and above all wrong arguments, go to Python, whose checks name the argument.
// fused_kd/direct.py calls this file.
#include "direct.h"

#include <exception>
#include <new>
#include <type_traits>
#include <vector>

#include "../cpu/core.h"
#include "../losses/row_losses.h"
#include "request.h"

namespace fused_kd {
namespace {

PyObject* empty_like(PyObject* tensor) {
    return checked(PyObject_VectorcallDict(torch_objects().empty_like, &tensor, 1, torch_objects().contiguous));
}

// The results of a call, owned until they go to Python: the loss, the parts, and the gradients of up to two logits.
class Results {
  public:
    Results() = default;
    Results(const Results&) = delete;
    ~Results() {
        for (PyObject* each : {loss_, parts_, gradients_[0], gradients_[1]})
            Py_XDECREF(each);
    }

    LossOutputs allocate(const Request& request, DType accumulate, int kinds) {
        const TorchObjects& torch = torch_objects();
        loss_ = empty_like(PyTuple_GetItem(torch.scalars, accumulate));
        if (request.want_parts) parts_ = empty_like(PyTuple_GetItem(torch.parts, 2 * (kinds - 2) + accumulate));
        LossOutputs out = {request.reduction, address(loss_), parts_ ? address(parts_) : unused_, {}};
        out.norms[0] = &norms_[0];
        out.norms[1] = &norms_[1];
        return out;
    }

    // Allocate the gradient if these logits need one.
    Gradient gradient(const Request& request, int place, PyObject* logits, int64_t padding = 0) {
        if (!request.grad || !requires_grad(logits)) return {nullptr, 1, padding};
        gradients_[place] = empty_like(logits);
        return {address(gradients_[place]), 1, padding};
    }

    // The loss alone, or (loss, parts or None), followed by a gradient or None for each of `logits` if there is any
    // gradient.
    PyObject* to_python(int logits) const {
        const int size = gradients_[0] || gradients_[1] ? 2 + logits : 2;
        if (size == 2 && !parts_) return Py_NewRef(loss_);
        PyObject* const fields[] = {loss_, parts_, gradients_[0], gradients_[1]};
        PyObject* const tuple = checked(PyTuple_New(size));
        for (int k = 0; k < size; ++k)
            PyTuple_SET_ITEM(tuple, k, Py_NewRef(fields[k] ? fields[k] : Py_None));
        return tuple;
    }

  private:
    static void* address(PyObject* tensor) {
        DlTensor view = {};
        if (torch_objects().exchange->view(tensor, &view) != 0) throw PythonError();
        return start(view);
    }

    PyObject *loss_ = nullptr, *parts_ = nullptr, *gradients_[2] = {};
    double unused_[4], norms_[2]; // norms: always 1, because float16 gradients go through Python
};

// Run the kernels without the GIL. Return the first bad row, or -1.
template <class Run>
int64_t unlocked(const Run& run) {
    int64_t bad_row = -1;
    std::exception_ptr error;
    PyThreadState* const state = PyEval_SaveThread();
    try {
        bad_row = run();
    } catch (...) {
        error = std::current_exception();
    }
    PyEval_RestoreThread(state);
    if (error) std::rethrow_exception(error);
    return bad_row;
}

// Call `function` and turn C++ exceptions into Python exceptions.
template <class Function>
PyObject* guarded(const Function& function) {
    try {
        if (!torch_objects().exchange) throw unexpected("direct_begin before this");
        return function();
    } catch (const PythonError&) {
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

DType accumulation(const TensorView& student, const TensorView& other) {
    return student.matrix.dtype == kFloat64 || other.matrix.dtype == kFloat64 ? kFloat64 : kFloat32;
}

// Fill the arguments that all kernels share.
template <class Args>
Args args_of(const Request& request, const TensorView& student, const TensorView& target, DType accumulate) {
    Args args = {};
    args.student = student.matrix;
    args.target = target.matrix;
    args.rows = student.rows;
    args.classes = student.columns;
    args.ignore_index = request.ignore_index;
    args.accumulate = accumulate;
    args.threads = request.threads;
    if constexpr (std::is_base_of<LossArgs, Args>::value) args.hyper = request.hyper;
    return args;
}

// Probabilities of a row cannot sum to more, even after bfloat16 rounding. fused_kd/losses/_topk.py has the same bound.
constexpr double kMostKept = 1.05;

// others: (log_probs, indices, number of the rest). The loss must have a top-k kernel.
PyObject* try_topk_loss(const Request& request, PyObject* logits, PyObject* others, PyObject* label, int number) {
    using namespace common;
    if (PyTuple_GET_SIZE(others) != 3) throw unexpected("three fields of a top-k teacher");
    PyObject *const log_probs = PyTuple_GET_ITEM(others, 0), *const indices = PyTuple_GET_ITEM(others, 1);
    TensorView student, kept, classes, target;
    int64_t padding;
    if (!plain_logits(logits, student) || !without_padding(request, student, padding) ||
        !plain_matrix(log_probs, kept) || kept.matrix.dtype == kInt64 || requires_grad(log_probs) ||
        !plain_matrix(indices, classes) || classes.matrix.dtype != kInt64)
        return nullptr;
    if (kept.dims != 2 || classes.dims != 2 || !same_shape(kept, classes) || kept.rows != student.rows ||
        kept.columns < 1 || kept.columns > student.columns || request.standardize ||
        !plain_target(label, student, request, target))
        return nullptr;
    TopKArgs args = args_of<TopKArgs>(request, student, target, accumulation(student, kept));
    args.log_probs = kept.matrix;
    args.indices = classes.matrix;
    args.kept = kept.columns;
    args.rest = int(PyLong_AsLong(PyTuple_GET_ITEM(others, 2)));
    args.loss = number;
    if (label == Py_None) args.ignore_index = -1;
    std::vector<double> sums(size_t(student.rows));
    args.sums = sums.data();
    Results results;
    const LossOutputs out = results.allocate(request, args.accumulate, kRowParts);
    args.gradient = results.gradient(request, 0, logits, padding);
    if (unlocked([&] { return topk_loss(*request.kernels, args, out); }) >= 0) return nullptr;
    for (double sum : sums)
        if (sum > kMostKept) return nullptr;
    return results.to_python(1);
}

// Return null for an unusual call, and for a bad row, so that Python reports it.
PyObject* try_row_loss(const Request& request, PyObject* const* logits, PyObject* label, int number) {
    using namespace common;
    if (PyTuple_Check(logits[1])) return try_topk_loss(request, logits[0], logits[1], label, number);
    TensorView student, teacher, target;
    int64_t padding, of_teacher;
    if (!plain_logits(logits[0], student)) return nullptr;
    teacher = student; // not read where the loss has no teacher
    if (number & kTeacher && !(plain_logits(logits[1], teacher, true) && !requires_grad(logits[1]))) return nullptr;
    if (!without_padding(request, student, padding) || !without_padding(request, teacher, of_teacher)) return nullptr;
    if (!same_shape(student, teacher) || !plain_target(label, student, request, target)) return nullptr;
    RowArgs args = args_of<RowArgs>(request, student, target, accumulation(student, teacher));
    args.teacher = teacher.matrix;
    args.loss = number;
    args.standardize = request.standardize;
    if (label == Py_None) args.ignore_index = -1;
    Results results;
    const LossOutputs out = results.allocate(request, args.accumulate, kRowParts);
    args.gradient = results.gradient(request, 0, logits[0], padding);
    return unlocked([&] { return row_loss(*request.kernels, args, out); }) < 0 ? results.to_python(1) : nullptr;
}

PyObject* try_uskd(const Request& request, PyObject* const* logits, PyObject* label) {
    TensorView student, weak, target;
    if (request.rank < 0 || !plain_logits(logits[0], student) || !plain_logits(logits[1], weak) ||
        !same_shape(student, weak) || label == Py_None || !plain_target(label, student, request, target))
        return nullptr;
    const DType accumulate = accumulation(student, weak);
    TargetProbsArgs first = args_of<TargetProbsArgs>(request, student, target, accumulate);
    first.square = request.square;
    UskdArgs args = args_of<UskdArgs>(request, student, target, accumulate);
    args.weak = weak.matrix;
    args.rank = request.rank;
    args.square = request.square;
    Results results;
    const LossOutputs out = results.allocate(request, accumulate, 4);
    args.student_gradient = results.gradient(request, 0, logits[0]);
    args.weak_gradient = results.gradient(request, 1, logits[1]);
    const int64_t bad_row = unlocked([&] {
        double sums[3];
        const int64_t bad_row = uskd_batch_sums(*request.kernels, first, sums);
        return bad_row < 0 ? uskd(*request.kernels, args, sums, out) : bad_row;
    });
    return bad_row < 0 ? results.to_python(2) : nullptr;
}

PyObject* try_zipf_ls(const Request& request, PyObject* const* logits, PyObject* label) {
    TensorView student, dense, target;
    if (!plain_logits(logits[0], student) || !plain_logits(logits[1], dense, true, 3) || dense.rows != student.rows ||
        dense.columns != student.columns || dense.positions < 1 || label == Py_None ||
        !plain_target(label, student, request, target))
        return nullptr;
    ZipfArgs args = args_of<ZipfArgs>(request, student, target, accumulation(student, student));
    args.dense = dense.matrix;
    args.dense_stride = dense.outer_stride;
    args.positions = dense.positions;
    Results results;
    const LossOutputs out = results.allocate(request, args.accumulate, 2);
    args.gradient = results.gradient(request, 0, logits[0]);
    return unlocked([&] { return zipf_ls(*request.kernels, args, out); }) < 0 ? results.to_python(1) : nullptr;
}

// of: (row loss number, "uskd" or "zipf_ls"; (student_logits, other logits or the fields of a top-k teacher, target);
// numbers; settings; common; instruction set; threads). Return None for an unusual call, else the result of
// to_python().
PyObject* direct_loss(PyObject*, PyObject* const* of, Py_ssize_t count) {
    return guarded([=]() -> PyObject* {
        if (count != 7 || !PyTuple_Check(of[1]) || PyTuple_GET_SIZE(of[1]) != 3) throw unexpected("seven arguments");
        PyObject* const logits[] = {PyTuple_GET_ITEM(of[1], 0), PyTuple_GET_ITEM(of[1], 1)};
        PyObject* const label = PyTuple_GET_ITEM(of[1], 2);
        Request request;
        PyObject* result = nullptr;
        if (!parse_request(of + 2, request))
            result = nullptr;
        else if (PyLong_CheckExact(of[0]))
            result = try_row_loss(request, logits, label, int(PyLong_AsLong(of[0])));
        else if (PyUnicode_CompareWithASCIIString(of[0], "uskd") == 0)
            result = try_uskd(request, logits, label);
        else
            result = try_zipf_ls(request, logits, label);
        return result ? result : Py_NewRef(Py_None);
    });
}

// of: (stored gradient, incoming gradient, instruction set, threads). Scale the stored gradient in place. Return False,
// without scaling, if the incoming gradient is not a plain number, or the backward pass is differentiated or repeated.
PyObject* direct_scale(PyObject*, PyObject* const* of, Py_ssize_t count) {
    return guarded([=]() -> PyObject* {
        if (count != 4) throw unexpected("four arguments");
        const TorchObjects& torch = torch_objects();
        TensorView gradient;
        DlTensor incoming = {};
        DType dtype;
        if (!plain(of[1], incoming, dtype) || incoming.dims != 0 || dtype == kInt64 || truth(torch.grad_enabled) ||
            truth(torch.keeps_graph) || !unobserved())
            Py_RETURN_FALSE;
        const void* const number = start(incoming);
        if ((dtype == kFloat32 && *static_cast<const float*>(number) == 1) ||
            (dtype == kFloat64 && *static_cast<const double*>(number) == 1))
            Py_RETURN_TRUE;
        const Kernels* const kernels = kernels_named(of[2]);
        // A hook of saved tensors may return another layout than the kernel's.
        if (!kernels || !plain_logits(of[0], gradient) || gradient.matrix.col_stride != 1 ||
            gradient.matrix.row_stride != gradient.columns)
            Py_RETURN_FALSE;
        void* const stored = const_cast<void*>(gradient.matrix.data);
        const int threads = int(PyLong_AsLong(of[3]));
        const ScaleArgs args = {stored, stored, gradient.matrix.dtype, number,           dtype,
                                0,      1.0,    gradient.rows,         gradient.columns, threads};
        unlocked([&] {
            kernels->scale_gradient(args);
            return int64_t(-1);
        });
        Py_RETURN_TRUE;
    });
}

template <class Function>
PyCFunction untyped(Function* function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef methods[] = {{"direct_begin", untyped(&direct_begin), METH_FASTCALL, nullptr},
                         {"direct_loss", untyped(&direct_loss), METH_FASTCALL, nullptr},
                         {"direct_scale", untyped(&direct_scale), METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

} // namespace

bool bind_direct(PyObject* module) {
    return PyModule_AddFunctions(module, methods) == 0;
}

} // namespace fused_kd

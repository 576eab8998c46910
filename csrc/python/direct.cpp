// Calls of ordinary tensors, whole: checks, room for what is made, and the kernels. A training step leaves none of our
// instructions in the caches, and then their number is what a call costs: the same in Python takes several times as
// long. Whatever is out of the ordinary, a wrong argument above all, is left to Python, which checks it by name.
// fused_kd/direct.py calls this.
#include "direct.h"

#include <exception>
#include <new>
#include <type_traits>

#include "../cpu/core.h"
#include "../losses/row_losses.h"
#include "asked.h"

namespace fused_kd {
namespace {

// Tensors as torch.empty_like makes them.
PyObject* like(PyObject* tensor) {
    return called(PyObject_VectorcallDict(torch_given().empty_like, &tensor, 1, torch_given().contiguous));
}

// What a call makes, owned until Python has it: the loss, a gradient of each logits that want one, and the parts.
class Made {
  public:
    Made() = default;
    Made(const Made&) = delete;
    ~Made() {
        for (PyObject* each : {loss_, parts_, gradients_[0], gradients_[1]})
            Py_XDECREF(each);
    }

    LossOutputs room(const Asked& asked, DType accumulate, int kinds) {
        const TorchGiven& torch = torch_given();
        loss_ = like(PyTuple_GetItem(torch.scalars, accumulate));
        if (asked.want_parts) parts_ = like(PyTuple_GetItem(torch.parts, 2 * (kinds - 2) + accumulate));
        LossOutputs out = {asked.reduction, address(loss_), parts_ ? address(parts_) : unused_, {}};
        out.norms[0] = &norms_[0];
        out.norms[1] = &norms_[1];
        return out;
    }

    // Where the gradient of logits goes.
    Gradient gradient(const Asked& asked, int place, PyObject* logits, int64_t padding = 0) {
        if (!asked.grad || !requires_grad(logits)) return {nullptr, 1, padding};
        gradients_[place] = like(logits);
        return {address(gradients_[place]), 1, padding};
    }

    // The loss alone, or (loss, parts or None), and where a gradient is wanted one or None of each logits.
    PyObject* handed_over(int logits) const {
        const int size = gradients_[0] || gradients_[1] ? 2 + logits : 2;
        if (size == 2 && !parts_) return Py_NewRef(loss_);
        PyObject* const fields[] = {loss_, parts_, gradients_[0], gradients_[1]};
        PyObject* const tuple = called(PyTuple_New(size));
        for (int k = 0; k < size; ++k)
            PyTuple_SET_ITEM(tuple, k, Py_NewRef(fields[k] ? fields[k] : Py_None));
        return tuple;
    }

  private:
    static void* address(PyObject* tensor) {
        DlTensor view = {};
        if (torch_given().exchange->view(tensor, &view) != 0) throw Failed();
        return start(view);
    }

    PyObject *loss_ = nullptr, *parts_ = nullptr, *gradients_[2] = {};
    double unused_[4], norms_[2]; // norms: 1, as float16 logits are no ordinary ones
};

// Runs the kernels without Python's lock; the first bad row, or -1.
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

// What Python gets of a function here, its exceptions as Python's.
template <class Function>
PyObject* guarded(const Function& function) {
    try {
        if (!torch_given().exchange) throw unexpected("direct_begin before this");
        return function();
    } catch (const Failed&) {
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

DType accumulation(const Seen& student, const Seen& other) {
    return student.matrix.dtype == kFloat64 || other.matrix.dtype == kFloat64 ? kFloat64 : kFloat32;
}

// What the arguments of every kernel have.
template <class Args>
Args args_of(const Asked& asked, const Seen& student, const Seen& target, DType accumulate) {
    Args args = {};
    args.student = student.matrix;
    args.target = target.matrix;
    args.rows = student.rows;
    args.classes = student.columns;
    args.ignore_index = asked.ignore_index;
    args.accumulate = accumulate;
    args.threads = asked.threads;
    if constexpr (std::is_base_of<LossArgs, Args>::value) args.hyper = asked.hyper;
    return args;
}

// More in a row are no probabilities, but for what bfloat16 rounds. The same is in fused_kd/losses/_topk.py.
constexpr double kMostKept = 1.05;

// others: (log_probs, indices, the number of the rest), of which the loss has a kernel.
PyObject* topk_loss_of(const Asked& asked, PyObject* logits, PyObject* others, PyObject* label, int number) {
    using namespace common;
    if (PyTuple_GET_SIZE(others) != 3) throw unexpected("three fields of a top-k teacher");
    PyObject *const log_probs = PyTuple_GET_ITEM(others, 0), *const indices = PyTuple_GET_ITEM(others, 1);
    Seen student, kept, classes, target;
    int64_t padding;
    if (!plain_logits(logits, student) || !without_padding(asked, student, padding) || !plain_matrix(log_probs, kept) ||
        kept.matrix.dtype == kInt64 || requires_grad(log_probs) || !plain_matrix(indices, classes) ||
        classes.matrix.dtype != kInt64)
        return nullptr;
    if (kept.dims != 2 || classes.dims != 2 || !same_shape(kept, classes) || kept.rows != student.rows ||
        kept.columns < 1 || kept.columns > student.columns || asked.standardize ||
        !plain_target(label, student, asked, target) || target.matrix.dtype != kInt64)
        return nullptr;
    TopKArgs args = args_of<TopKArgs>(asked, student, target, accumulation(student, kept));
    args.log_probs = kept.matrix;
    args.indices = classes.matrix;
    args.kept = kept.columns;
    args.rest = int(PyLong_AsLong(PyTuple_GET_ITEM(others, 2)));
    args.loss = number;
    if (label == Py_None) args.ignore_index = -1;
    std::vector<double> sums(size_t(student.rows));
    args.sums = sums.data();
    Made made;
    const LossOutputs out = made.room(asked, args.accumulate, kRowParts);
    args.gradient = made.gradient(asked, 0, logits, padding);
    if (unlocked([&] { return topk_loss(*asked.kernels, args, out); }) >= 0) return nullptr;
    for (double sum : sums)
        if (sum > kMostKept) return nullptr;
    return made.handed_over(1);
}

// None of what is not ordinary. A bad row is left to Python, which says what is wrong with it.
PyObject* row_loss_of(const Asked& asked, PyObject* const* logits, PyObject* label, int number) {
    using namespace common;
    if (PyTuple_Check(logits[1])) return topk_loss_of(asked, logits[0], logits[1], label, number);
    Seen student, teacher, target;
    int64_t padding, of_teacher;
    if (!plain_logits(logits[0], student)) return nullptr;
    teacher = student; // not read where the loss has no teacher
    if (number & kTeacher && !(plain_logits(logits[1], teacher, true) && !requires_grad(logits[1]))) return nullptr;
    if (!without_padding(asked, student, padding) || !without_padding(asked, teacher, of_teacher)) return nullptr;
    if (!same_shape(student, teacher) || !plain_target(label, student, asked, target)) return nullptr;
    RowArgs args = args_of<RowArgs>(asked, student, target, accumulation(student, teacher));
    args.teacher = teacher.matrix;
    args.loss = number;
    args.standardize = asked.standardize;
    if (label == Py_None) args.ignore_index = -1;
    Made made;
    const LossOutputs out = made.room(asked, args.accumulate, kRowParts);
    args.gradient = made.gradient(asked, 0, logits[0], padding);
    return unlocked([&] { return row_loss(*asked.kernels, args, out); }) < 0 ? made.handed_over(1) : nullptr;
}

PyObject* uskd_of(const Asked& asked, PyObject* const* logits, PyObject* label) {
    Seen student, weak, target;
    if (asked.rank < 0 || !plain_logits(logits[0], student) || !plain_logits(logits[1], weak) ||
        !same_shape(student, weak) || label == Py_None || !plain_target(label, student, asked, target))
        return nullptr;
    const DType accumulate = accumulation(student, weak);
    TargetProbsArgs first = args_of<TargetProbsArgs>(asked, student, target, accumulate);
    first.square = asked.square;
    UskdArgs args = args_of<UskdArgs>(asked, student, target, accumulate);
    args.weak = weak.matrix;
    args.rank = asked.rank;
    args.square = asked.square;
    Made made;
    const LossOutputs out = made.room(asked, accumulate, 4);
    args.student_gradient = made.gradient(asked, 0, logits[0]);
    args.weak_gradient = made.gradient(asked, 1, logits[1]);
    const int64_t bad_row = unlocked([&] {
        double sums[3];
        const int64_t bad_row = uskd_batch_sums(*asked.kernels, first, sums);
        return bad_row < 0 ? uskd(*asked.kernels, args, sums, out) : bad_row;
    });
    return bad_row < 0 ? made.handed_over(2) : nullptr;
}

PyObject* zipf_ls_of(const Asked& asked, PyObject* const* logits, PyObject* label) {
    Seen student, dense, target;
    if (!plain_logits(logits[0], student) || !plain_logits(logits[1], dense, true, 3) || dense.rows != student.rows ||
        dense.columns != student.columns || dense.positions < 1 || label == Py_None ||
        !plain_target(label, student, asked, target))
        return nullptr;
    ZipfArgs args = args_of<ZipfArgs>(asked, student, target, accumulation(student, student));
    args.dense = dense.matrix;
    args.dense_stride = dense.outer_stride;
    args.positions = dense.positions;
    Made made;
    const LossOutputs out = made.room(asked, args.accumulate, 2);
    args.gradient = made.gradient(asked, 0, logits[0]);
    return unlocked([&] { return zipf_ls(*asked.kernels, args, out); }) < 0 ? made.handed_over(1) : nullptr;
}

// (which: the number of a row loss, or "uskd" or "zipf_ls"; (student_logits, other logits or the fields of a top-k
// teacher, target); numbers; settings; common; instruction set; threads). None of what is not ordinary; else the loss,
// or what handed_over() says.
PyObject* direct_loss(PyObject*, PyObject* const* of, Py_ssize_t count) {
    return guarded([=]() -> PyObject* {
        if (count != 7 || !PyTuple_Check(of[1]) || PyTuple_GET_SIZE(of[1]) != 3) throw unexpected("seven arguments");
        PyObject* const logits[] = {PyTuple_GET_ITEM(of[1], 0), PyTuple_GET_ITEM(of[1], 1)};
        PyObject* const label = PyTuple_GET_ITEM(of[1], 2);
        Asked asked;
        PyObject* made = nullptr;
        if (!understood(of + 2, asked))
            made = nullptr;
        else if (PyLong_CheckExact(of[0]))
            made = row_loss_of(asked, logits, label, int(PyLong_AsLong(of[0])));
        else if (PyUnicode_CompareWithASCIIString(of[0], "uskd") == 0)
            made = uskd_of(asked, logits, label);
        else
            made = zipf_ls_of(asked, logits, label);
        return made ? made : Py_NewRef(Py_None);
    });
}

// (stored gradient, what comes in, instruction set, threads): multiplies the one by the other, where that is a plain
// number and nobody differentiates this backward pass or asks for the gradient again. False where it left it alone.
PyObject* direct_scale(PyObject*, PyObject* const* of, Py_ssize_t count) {
    return guarded([=]() -> PyObject* {
        if (count != 4) throw unexpected("four arguments");
        const TorchGiven& torch = torch_given();
        Seen gradient;
        DlTensor incoming = {};
        DType dtype;
        if (!plain(of[1], incoming, dtype) || incoming.dims != 0 || dtype == kInt64 || truth(torch.grad_enabled) ||
            truth(torch.keeps_graph) || !unwatched())
            Py_RETURN_FALSE;
        const void* const number = start(incoming);
        if ((dtype == kFloat32 && *static_cast<const float*>(number) == 1) ||
            (dtype == kFloat64 && *static_cast<const double*>(number) == 1))
            Py_RETURN_TRUE;
        const Kernels* const kernels = kernels_named(of[2]);
        if (!kernels || !plain_logits(of[0], gradient)) Py_RETURN_FALSE;
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

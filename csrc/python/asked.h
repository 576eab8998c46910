// What a call of ordinary tensors asks for, and whether it is one. Every function here says false, or nothing, of what
// needs a closer look; it throws where Python has raised.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#include "../cpu/core.h"
#include "tensors.h"

namespace fused_kd {

struct Failed {}; // a Python exception is set

inline PyObject* called(PyObject* result) {
    if (!result) throw Failed();
    return result;
}

inline Failed unexpected(const char* wanted) {
    PyErr_Format(PyExc_TypeError, "fused_kd: expected %s", wanted);
    return Failed();
}

// What fused_kd/backends/native/direct.py hands over once, all of it kept for good.
struct TorchGiven {
    const DlExchange* exchange;
    PyObject* tensor_type;             // torch.Tensor
    PyObject *empty_like, *contiguous; // and its keywords
    PyObject* scalars;                 // without dimensions, of float32 and float64
    PyObject* parts;                   // of 2, 3 and 4 elements, of either dtype
    PyObject* places;                  // of HyperParameters, by name
    PyObject* ranks;                   // their numbers, by name
    PyObject *grad_enabled, *keeps_graph;
    PyObject* watchers;                               // functions whose results are false where nothing watches a call
    PyObject* levels;                                 // torch.autograd.forward_ad's globals
    PyObject *requires_grad, *is_neg, *current_level; // names
    PyObject *reduction, *ignore_index, *standardize, *rank, *square, *process_group;
};

inline TorchGiven& torch_given() {
    static TorchGiven given = {};
    return given;
}

// (torch.Tensor's exchange capsule, and the fields of TorchGiven after it): whether the interface is one known here.
inline PyObject* direct_begin(PyObject*, PyObject* const* of, Py_ssize_t count) {
    if (count != 12) return unexpected("12 arguments"), nullptr;
    const auto* const exchange = static_cast<const DlExchange*>(PyCapsule_GetPointer(of[0], "dlpack_exchange_api"));
    if (!exchange) return nullptr;
    if (exchange->major != 1 || !exchange->view) Py_RETURN_FALSE;
    for (Py_ssize_t k = 1; k < count; ++k)
        Py_INCREF(of[k]);
    const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
    torch_given() = {exchange,
                     of[1],
                     of[2],
                     of[3],
                     of[4],
                     of[5],
                     of[6],
                     of[7],
                     of[8],
                     of[9],
                     of[10],
                     of[11],
                     name("requires_grad"),
                     name("is_neg"),
                     name("_current_level"),
                     name("reduction"),
                     name("ignore_index"),
                     name("logit_standardization"),
                     name("rank"),
                     name("square"),
                     name("process_group")};
    Py_RETURN_TRUE;
}

inline bool truth(PyObject* function) {
    PyObject* const value = called(PyObject_CallNoArgs(function));
    const int truth = PyObject_IsTrue(value);
    Py_DECREF(value);
    if (truth < 0) throw Failed();
    return truth != 0;
}

// Whether nothing watches, records or transforms what is done to tensors.
inline bool unwatched() {
    const TorchGiven& torch = torch_given();
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(torch.watchers); ++k)
        if (truth(PyTuple_GET_ITEM(torch.watchers, k))) return false;
    PyObject* const level = PyDict_GetItemWithError(torch.levels, torch.current_level);
    return level && PyLong_CheckExact(level) && PyLong_AsLong(level) < 0;
}

inline bool requires_grad(PyObject* tensor) {
    PyObject* const value = called(PyObject_GetAttr(tensor, torch_given().requires_grad));
    Py_DECREF(value);
    return value == Py_True;
}

// Whether it is a tensor of no subclass whose memory has its values. (A view may stand for their negative.)
inline bool plain(PyObject* tensor, DlTensor& out, DType& dtype) {
    const TorchGiven& torch = torch_given();
    if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != torch.tensor_type || !see(*torch.exchange, tensor, out, dtype))
        return false;
    PyObject* const negative = called(PyObject_CallMethodNoArgs(tensor, torch.is_neg));
    Py_DECREF(negative);
    return negative == Py_False;
}

// Of one to three dimensions: (rows), (rows, columns) or (rows, positions, columns).
inline bool plain_matrix(PyObject* tensor, Seen& out) {
    DlTensor view = {};
    if (!plain(tensor, view, out.matrix.dtype) || view.dims < 1 || view.dims > 3) return false;
    const int last = view.dims - 1;
    out.dims = view.dims;
    out.rows = view.shape[0];
    out.columns = last > 0 ? view.shape[last] : 0;
    out.positions = last > 1 ? view.shape[1] : 0;
    out.outer_stride = view.strides[0];
    out.matrix.data = start(view);
    out.matrix.row_stride = view.strides[last > 1 ? 1 : 0];
    out.matrix.col_stride = last > 0 ? view.strides[last] : 1;
    return true;
}

// float16 gradients are stored times a power of two, which Python chooses; logits without gradient may be float16.
inline bool plain_logits(PyObject* tensor, Seen& out, bool half = false, int dims = 2) {
    return plain_matrix(tensor, out) && out.dims == dims && out.columns >= 2 && out.matrix.dtype != kInt64 &&
           (half || out.matrix.dtype != kFloat16);
}

inline bool same_shape(const Seen& a, const Seen& b) {
    return a.rows == b.rows && a.columns == b.columns;
}

// As fused_kd/losses/_options.py checks them: finite, at least 0, and some within bounds.
inline bool hyper_parameters_of(PyObject* named, HyperParameters& out) {
    constexpr size_t kCorrect = offsetof(HyperParameters, correct) / sizeof(double);
    constexpr size_t kTemperature = offsetof(HyperParameters, temperature) / sizeof(double);
    constexpr size_t kSmoothing = offsetof(HyperParameters, label_smoothing) / sizeof(double);
    double values[sizeof(HyperParameters) / sizeof(double)] = {};
    values[kTemperature] = 1;
    PyObject *name, *value;
    for (Py_ssize_t at = 0; PyDict_Next(named, &at, &name, &value);) {
        PyObject* const found = PyDict_GetItemWithError(torch_given().places, name);
        if (!found || !(PyFloat_CheckExact(value) || PyLong_CheckExact(value))) return false;
        const size_t place = PyLong_AsSize_t(found);
        const double x = PyFloat_AsDouble(value);
        if (!(x >= 0 && x < INFINITY) || (place == kTemperature && x == 0)) {
            PyErr_Clear(); // an int beyond a double
            return false;
        }
        if ((place == kCorrect || place == kSmoothing) && x >= 1) return false;
        values[place] = x;
    }
    std::memcpy(&out, values, sizeof out);
    return true;
}

struct Asked {
    const Kernels* kernels = nullptr;
    int threads = 1;
    HyperParameters hyper = {};
    Reduction reduction = kMean;
    int64_t ignore_index = -1;
    bool standardize = false, square = true, want_parts = false;
    bool grad = false; // whether gradients are wanted of what requires them
    int rank = -1;
    int64_t num_classes = 0; // 0 if the logits have no padding
};

inline bool settings_of(PyObject* named, Asked& out) {
    const TorchGiven& torch = torch_given();
    const auto get = [named](PyObject* name) { return PyDict_GetItemWithError(named, name); };
    const auto flag = [&](PyObject* name, bool& out) {
        PyObject* const value = get(name);
        if (value) out = value == Py_True;
        return !value || PyBool_Check(value);
    };
    PyObject *const reduction = get(torch.reduction), *const ignored = get(torch.ignore_index);
    PyObject *const rank = get(torch.rank), *const group = get(torch.process_group);
    if (!reduction || !PyUnicode_CheckExact(reduction) || !ignored || !PyLong_CheckExact(ignored)) return false;
    if (PyUnicode_CompareWithASCIIString(reduction, "mean") == 0)
        out.reduction = kMean;
    else if (PyUnicode_CompareWithASCIIString(reduction, "sum") == 0)
        out.reduction = kSum;
    else // "none": row by row
        return false;
    int overflow = 0;
    out.ignore_index = PyLong_AsLongLongAndOverflow(ignored, &overflow);
    if (rank) {
        PyObject* const number = PyUnicode_CheckExact(rank) ? PyDict_GetItemWithError(torch.ranks, rank) : nullptr;
        if (!number) return false;
        out.rank = int(PyLong_AsLong(number));
    }
    return !overflow && (!group || group == Py_None) && flag(torch.standardize, out.standardize) &&
           flag(torch.square, out.square);
}

// (weight, normalizer, class_dim, num_classes, backend, return_parts)
inline bool common_of(PyObject* tuple, Asked& out) {
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 6) return false;
    for (Py_ssize_t k = 0; k < 3; ++k)
        if (PyTuple_GET_ITEM(tuple, k) != Py_None) return false;
    PyObject* const num_classes = PyTuple_GET_ITEM(tuple, 3);
    if (num_classes != Py_None) {
        int overflow = 0;
        out.num_classes = PyLong_CheckExact(num_classes) ? PyLong_AsLongLongAndOverflow(num_classes, &overflow) : 0;
        if (out.num_classes < 2) return false;
    }
    PyObject *const backend = PyTuple_GET_ITEM(tuple, 4), *const parts = PyTuple_GET_ITEM(tuple, 5);
    out.want_parts = parts == Py_True;
    return PyBool_Check(parts) && PyUnicode_CheckExact(backend) &&
           (PyUnicode_CompareWithASCIIString(backend, "auto") == 0 ||
            PyUnicode_CompareWithASCIIString(backend, "native") == 0);
}

inline const Kernels* kernels_named(PyObject* name) {
    static const std::vector<const Kernels*> runnable = runnable_kernels();
    for (const Kernels* each : runnable)
        if (PyUnicode_CompareWithASCIIString(name, each->name) == 0) return each;
    return nullptr;
}

// numbers, settings, common, instruction set, threads
inline bool understood(PyObject* const* of, Asked& out) {
    out.kernels = kernels_named(of[3]);
    out.threads = int(PyLong_AsLong(of[4]));
    if (!out.kernels || !common_of(of[2], out) || !settings_of(of[1], out) || !hyper_parameters_of(of[0], out.hyper) ||
        !unwatched())
        return false;
    out.grad = truth(torch_given().grad_enabled);
    return true;
}

// Leaves out the columns after the classes, and says how many there are.
inline bool without_padding(const Asked& asked, Seen& out, int64_t& padding) {
    padding = asked.num_classes ? out.columns - asked.num_classes : 0;
    out.columns -= padding;
    return padding >= 0;
}

// Class indices, probabilities, or None for the class 0 of every row, which must not be asked for then.
inline bool plain_target(PyObject* label, const Seen& student, const Asked& asked, Seen& out) {
    static const int64_t none = 0;
    if (label == Py_None) {
        out.matrix = {&none, kInt64, 0, 1};
        return asked.hyper.ce_weight == 0;
    }
    if (!plain_matrix(label, out) || out.rows != student.rows) return false;
    if (out.matrix.dtype == kInt64) return out.dims == 1;
    return out.dims == 2 && out.columns == student.columns && !requires_grad(label);
}

} // namespace fused_kd

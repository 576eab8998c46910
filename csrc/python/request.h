// The settings of a direct call, and checks that its tensors are ordinary. Each function returns false or null if the
// call needs Python's full checks, and throws if a Python exception is set.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>

#include "../cpu/core.h"
#include "tensors.h"

namespace fused_kd {

struct PythonError {}; // a Python exception is set

inline PyObject* checked(PyObject* result) {
    if (!result) throw PythonError();
    return result;
}

inline PythonError unexpected(const char* wanted) {
    PyErr_Format(PyExc_TypeError, "fused_kd: expected %s", wanted);
    return PythonError();
}

// The objects that fused_kd/backends/native/direct.py passes once. The module keeps references to them forever.
struct TorchObjects {
    const DlExchange* exchange;
    PyObject* tensor_type;             // torch.Tensor
    PyObject *empty_like, *contiguous; // and its keyword arguments
    PyObject* scalars;                 // 0-dimensional tensors of float32 and float64
    PyObject* parts;                   // tensors of 2, 3 and 4 elements, each in both dtypes
    PyObject* places;                  // index of each field of HyperParameters, by name
    PyObject* ranks;                   // the Rank values of USKD, by name
    PyObject *grad_enabled, *keeps_graph;
    PyObject* observers;                              // functions that return true if something observes the call
    PyObject* levels;                                 // torch.autograd.forward_ad's globals
    PyObject *requires_grad, *is_neg, *current_level; // interned attribute names
    PyObject *reduction, *ignore_index, *standardize, *rank, *square, *process_group;
};

inline TorchObjects& torch_objects() {
    static TorchObjects objects = {};
    return objects;
}

// Arguments: torch.Tensor's exchange capsule, then the fields of TorchObjects after `exchange`. Return whether the
// version of the interface is supported.
inline PyObject* direct_begin(PyObject*, PyObject* const* of, Py_ssize_t count) {
    if (count != 12) return unexpected("12 arguments"), nullptr;
    const auto* const exchange = static_cast<const DlExchange*>(PyCapsule_GetPointer(of[0], "dlpack_exchange_api"));
    if (!exchange) return nullptr;
    if (exchange->major != 1 || !exchange->view) Py_RETURN_FALSE;
    for (Py_ssize_t k = 1; k < count; ++k)
        Py_INCREF(of[k]);
    const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
    torch_objects() = {exchange,
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
    PyObject* const value = checked(PyObject_CallNoArgs(function));
    const int truth = PyObject_IsTrue(value);
    Py_DECREF(value);
    if (truth < 0) throw PythonError();
    return truth != 0;
}

// Return whether nothing observes, records or transforms tensor operations.
inline bool unobserved() {
    const TorchObjects& torch = torch_objects();
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(torch.observers); ++k)
        if (truth(PyTuple_GET_ITEM(torch.observers, k))) return false;
    PyObject* const level = PyDict_GetItemWithError(torch.levels, torch.current_level);
    return level && PyLong_CheckExact(level) && PyLong_AsLong(level) < 0;
}

inline bool requires_grad(PyObject* tensor) {
    PyObject* const value = checked(PyObject_GetAttr(tensor, torch_objects().requires_grad));
    Py_DECREF(value);
    return value == Py_True;
}

// Return whether this is a torch.Tensor, not a subclass, whose memory holds its values (a view may be lazily negated).
inline bool plain(PyObject* tensor, DlTensor& out, DType& dtype) {
    const TorchObjects& torch = torch_objects();
    if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != torch.tensor_type ||
        !view_tensor(*torch.exchange, tensor, out, dtype))
        return false;
    PyObject* const negative = checked(PyObject_CallMethodNoArgs(tensor, torch.is_neg));
    Py_DECREF(negative);
    return negative == Py_False;
}

// Read a tensor of one to three dimensions: (rows), (rows, columns) or (rows, positions, columns).
inline bool plain_matrix(PyObject* tensor, TensorView& out) {
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

// Float16 logits that need a gradient go through Python, which chooses the power of two of the stored gradient.
inline bool plain_logits(PyObject* tensor, TensorView& out, bool half = false, int dims = 2) {
    return plain_matrix(tensor, out) && out.dims == dims && out.columns >= 2 && out.matrix.dtype != kInt64 &&
           (half || out.matrix.dtype != kFloat16);
}

inline bool same_shape(const TensorView& a, const TensorView& b) {
    return a.rows == b.rows && a.columns == b.columns;
}

// The same bounds as in fused_kd/losses/_options.py: finite, at least 0, and for some an upper bound.
inline bool parse_hyper_parameters(PyObject* named, HyperParameters& out) {
    constexpr size_t kCorrect = offsetof(HyperParameters, correct) / sizeof(double);
    constexpr size_t kTemperature = offsetof(HyperParameters, temperature) / sizeof(double);
    constexpr size_t kSmoothing = offsetof(HyperParameters, label_smoothing) / sizeof(double);
    double values[sizeof(HyperParameters) / sizeof(double)] = {};
    values[kTemperature] = 1;
    PyObject *name, *value;
    for (Py_ssize_t at = 0; PyDict_Next(named, &at, &name, &value);) {
        PyObject* const found = PyDict_GetItemWithError(torch_objects().places, name);
        if (!found || !(PyFloat_Check(value) || PyLong_CheckExact(value))) return false;
        const size_t place = PyLong_AsSize_t(found);
        const double x = PyFloat_AsDouble(value);
        if (!(x >= 0 && x < INFINITY) || (place == kTemperature && x == 0)) {
            PyErr_Clear(); // an int too large for a double
            return false;
        }
        if ((place == kCorrect || place == kSmoothing) && x >= 1) return false;
        values[place] = x;
    }
    std::memcpy(&out, values, sizeof out);
    return true;
}

struct Request {
    const Kernels* kernels = nullptr;
    int threads = 1;
    HyperParameters hyper = {};
    Reduction reduction = kMean;
    int64_t ignore_index = -1;
    bool standardize = false, square = true, want_parts = false;
    bool grad = false; // whether to compute gradients of logits that require them
    int rank = -1;
    int64_t num_classes = 0; // 0 if the logits have no padding
};

inline bool parse_settings(PyObject* named, Request& out) {
    const TorchObjects& torch = torch_objects();
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

// tuple: (weight, normalizer, class_dim, num_classes, backend, return_parts)
inline bool parse_common(PyObject* tuple, Request& out) {
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

inline const Kernels* kernels_named(PyObject* given) {
    const char* const name = PyUnicode_AsUTF8(given);
    if (!name) throw PythonError();
    return fused_kd::kernels_named(name);
}

// of: (numbers, settings, common, instruction set, threads)
inline bool parse_request(PyObject* const* of, Request& out) {
    out.kernels = kernels_named(of[3]);
    out.threads = int(PyLong_AsLong(of[4]));
    if (!out.kernels || !parse_common(of[2], out) || !parse_settings(of[1], out) ||
        !parse_hyper_parameters(of[0], out.hyper) || !unobserved())
        return false;
    out.grad = truth(torch_objects().grad_enabled);
    return true;
}

// Drop the columns after the classes from a view; `padding` is their number.
inline bool without_padding(const Request& request, TensorView& out, int64_t& padding) {
    padding = request.num_classes ? out.columns - request.num_classes : 0;
    out.columns -= padding;
    return padding >= 0;
}

// The target is class indices, probabilities, or None. None reads class 0 in every row, so it needs ce_weight == 0.
inline bool plain_target(PyObject* label, const TensorView& student, const Request& request, TensorView& out) {
    static const int64_t none = 0;
    if (label == Py_None) {
        out.matrix = {&none, kInt64, 0, 1};
        return request.hyper.ce_weight == 0;
    }
    if (!plain_matrix(label, out) || out.rows != student.rows) return false;
    if (out.matrix.dtype == kInt64) return out.dims == 1;
    return out.dims == 2 && out.columns == student.columns && !requires_grad(label);
}

} // namespace fused_kd

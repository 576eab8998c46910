// Arguments from Python are tuples of plain integers: addresses, sizes and strides. So the module needs no PyTorch
// header, and one build works with every PyTorch. fused_kd/backends/native/boundary.py makes the tuples.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../cpu/kernels.h"

namespace fused_kd {

// Reads the fields of a tuple in order. It uses Python's C API, not pybind11's casters, because a call at a thousand
// classes is short.
class Fields {
  public:
    Fields(const pybind11::handle& tuple, Py_ssize_t size) : tuple_(tuple.ptr()) {
        if (!PyTuple_Check(tuple_) || PyTuple_GET_SIZE(tuple_) != size)
            throw pybind11::value_error("fused_kd: expected a tuple of " + std::to_string(size));
    }

    int64_t integer() { return checked(int64_t(PyLong_AsLongLong(next()))); }
    double number() { return checked(PyFloat_AsDouble(next())); }
    bool flag() { return integer() != 0; }
    void* address() { return checked(PyLong_AsVoidPtr(next())); }
    double* doubles() { return static_cast<double*>(address()); }
    DType dtype() { return DType(integer()); }
    pybind11::handle tuple() { return next(); }
    const char* text() {
        const char* const text = PyUnicode_AsUTF8(next());
        if (!text) throw pybind11::error_already_set();
        return text;
    }

  private:
    PyObject* next() { return PyTuple_GET_ITEM(tuple_, at_++); }

    template <class T>
    static T checked(T value) {
        if (PyErr_Occurred()) throw pybind11::error_already_set();
        return value;
    }

    PyObject* tuple_;
    Py_ssize_t at_ = 0;
};

// given: (address, dtype, strides in elements); a vector has a single stride.
inline Matrix matrix(const pybind11::handle& given) {
    Fields fields(given, 3);
    const void* const data = fields.address();
    const DType dtype = fields.dtype();
    const pybind11::handle strides = fields.tuple();
    const bool two = PyTuple_Check(strides.ptr()) && PyTuple_GET_SIZE(strides.ptr()) == 2;
    Fields each(strides, two ? 2 : 1);
    const int64_t row = each.integer();
    return {data, dtype, row, two ? each.integer() : 1};
}

struct Shape {
    explicit Shape(const pybind11::handle& given) {
        Fields fields(given, 2);
        rows = fields.integer();
        classes = fields.integer();
    }
    int64_t rows, classes;
};

// given: (address or 0, scale of the stored gradient), and if `padded` the columns after the classes
inline Gradient gradient_of(const pybind11::handle& given, bool padded = false) {
    Fields fields(given, padded ? 3 : 2);
    return {fields.address(), fields.number(), padded ? fields.integer() : 0}; // braces evaluate from left to right
}

// given: the fields in the order of the struct.
inline HyperParameters hyper_parameters(const pybind11::handle& given) {
    Fields x(given, 9);
    return {x.number(), x.number(), x.number(), x.number(), x.number(),
            x.number(), x.number(), x.number(), x.number()}; // braces evaluate from left to right
}

} // namespace fused_kd

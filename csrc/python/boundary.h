// What crosses from Python: addresses, sizes and strides as plain integers in tuples, so that no PyTorch header is
// needed and one build works with every PyTorch. fused_kd/backends/native/boundary.py makes them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "../cpu/kernels.h"

namespace fused_kd {

typedef std::tuple<uintptr_t, int, pybind11::tuple> Given; // address, dtype, strides in elements
typedef std::array<int64_t, 2> Shape;                      // rows, classes
typedef std::array<double, 9> GivenHyperParameters;        // the fields in their order

inline Matrix matrix(const Given& given) {
    const pybind11::tuple& strides = std::get<2>(given);
    const int64_t col = strides.size() > 1 ? strides[1].cast<int64_t>() : 1;
    return {reinterpret_cast<const void*>(std::get<0>(given)), DType(std::get<1>(given)), strides[0].cast<int64_t>(),
            col};
}

inline void* address(uintptr_t data) {
    return reinterpret_cast<void*>(data);
}

inline const double* doubles(uintptr_t data) {
    return reinterpret_cast<const double*>(data);
}

inline HyperParameters hyper_parameters(const GivenHyperParameters& x) {
    return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8]};
}

} // namespace fused_kd

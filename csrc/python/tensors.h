// Tensors without PyTorch's headers, through DLPack's C exchange interface: PyTorch has it from 2.10 on, as
// torch.Tensor.__dlpack_c_exchange_api__. It gives address, dtype and strides in tens of nanoseconds; through Python it
// takes most of a microsecond. The structures follow DLPack 1.
#pragma once

#include <Python.h>

#include "../cpu/kernels.h"

namespace fused_kd {

struct DlTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t dims;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides; // strides count elements
    uint64_t byte_offset;
};

// Fields that we do not use are void*.
struct DlExchange {
    uint32_t major, minor;
    void* older;
    void* allocate;
    void* managed;
    void* to_python;
    int (*view)(void* tensor, DlTensor* out); // 0, or -1 with a Python exception
    void* stream;
};

// A tensor in the kernels' terms. Dense logits (rows, positions, columns) also have an outer stride, from row to row.
struct TensorView {
    Matrix matrix;
    int dims;
    int64_t rows, columns, positions, outer_stride;
};

inline bool dtype_of(const DlTensor& tensor, DType& out) {
    enum { kInt = 0, kFloat = 2, kBFloat = 4 }; // DLDataTypeCode
    if (tensor.lanes != 1) return false;
    if (tensor.code == kFloat && tensor.bits == 32)
        out = kFloat32;
    else if (tensor.code == kFloat && tensor.bits == 64)
        out = kFloat64;
    else if (tensor.code == kBFloat && tensor.bits == 16)
        out = kBFloat16;
    else if (tensor.code == kFloat && tensor.bits == 16)
        out = kFloat16;
    else if (tensor.code == kInt && tensor.bits == 64)
        out = kInt64;
    else
        return false;
    return true;
}

inline void* start(const DlTensor& tensor) {
    return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

// Return false, without an exception, if the tensor is not on the CPU, has no memory, or has another dtype.
inline bool view_tensor(const DlExchange& exchange, PyObject* tensor, DlTensor& out, DType& dtype) {
    constexpr int32_t kCpu = 1;
    if (exchange.view(tensor, &out) != 0) {
        PyErr_Clear();
        return false;
    }
    return out.device_type == kCpu && out.data && dtype_of(out, dtype);
}

} // namespace fused_kd

// Loads and stores rows of logits, of any dtype and stride, four classes at a time: 8 bytes in half precision, 16 in
// float32. Rows that are not contiguous use single elements. A row that is not aligned to that can be read in chunks
// that are: they start up to three classes before the row, and what lies outside it is not accessed.
#pragma once

#include "device.h"

namespace fused_kd {
namespace cuda {

constexpr int kChunk = 4;

__device__ __forceinline__ float bits_as_bfloat16(uint32_t bits) {
    return __uint_as_float(bits << 16);
}

__device__ __forceinline__ float bits_as_half(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

template <class A>
__device__ __forceinline__ A load_one(const void* p, DType dtype, int64_t i) {
    switch (dtype) {
    case kFloat32:
        return A(static_cast<const float*>(p)[i]);
    case kFloat64:
        return A(static_cast<const double*>(p)[i]);
    case kBFloat16:
        return A(bits_as_bfloat16(static_cast<const uint16_t*>(p)[i]));
    default:
        return A(bits_as_half(static_cast<const uint16_t*>(p)[i]));
    }
}

// One row of a matrix.
struct RowView {
    const char* data;
    int64_t stride; // in elements
    DType dtype;
    bool vectors; // whether a chunk within the row can be one load
};

__device__ __forceinline__ bool aligned_for_chunks(const void* p, DType dtype) {
    // Never float64: a chunk is two loads of 16 bytes, and float64 need not be fast.
    return dtype != kFloat64 && (reinterpret_cast<uintptr_t>(p) & uintptr_t(kChunk * element_size(dtype) - 1)) == 0;
}

// The chunks start `before` classes before the row.
__device__ __forceinline__ RowView row_view(const Matrix& m, int64_t row, int before = 0) {
    const char* data = static_cast<const char*>(m.data) + row * m.row_stride * element_size(m.dtype);
    const char* first = data - before * element_size(m.dtype);
    return {data, m.col_stride, m.dtype, m.col_stride == 1 && aligned_for_chunks(first, m.dtype)};
}

// The number of classes before a contiguous row at which its chunks are aligned.
__device__ __forceinline__ int classes_before(const Matrix& m, int64_t row) {
    if (m.col_stride != 1 || m.dtype == kFloat64) return 0;
    const uintptr_t size = uintptr_t(element_size(m.dtype));
    return int((reinterpret_cast<uintptr_t>(m.data) + uintptr_t(row * m.row_stride) * size) / size % kChunk);
}

__device__ __forceinline__ bool within(int j, int classes) {
    return unsigned(j) < unsigned(classes); // j may be negative
}

template <class A>
__device__ __forceinline__ A load_one(const RowView& row, int64_t j) {
    return load_one<A>(row.data, row.dtype, j * row.stride);
}

// A chunk as it is in memory, so that many loads are in flight before the first is converted. In half precision a chunk
// loaded as one vector takes two words, otherwise one word per element.
struct RawChunk {
    uint32_t word[kChunk];
};

__device__ __forceinline__ bool whole_vector(const RowView& row, int base, int classes) {
    return row.vectors && base >= 0 && base + kChunk <= classes;
}

__device__ __forceinline__ RawChunk load_raw(const RowView& row, int base, int classes) {
    RawChunk raw = {{0, 0, 0, 0}};
    if (whole_vector(row, base, classes)) {
        if (row.dtype == kFloat32) {
            const uint4 v = *reinterpret_cast<const uint4*>(row.data + int64_t(base) * 4);
            raw = {{v.x, v.y, v.z, v.w}};
        } else {
            const uint2 v = *reinterpret_cast<const uint2*>(row.data + int64_t(base) * 2);
            raw.word[0] = v.x;
            raw.word[1] = v.y;
        }
        return raw;
    }
#pragma unroll
    for (int k = 0; k < kChunk; ++k)
        if (within(base + k, classes)) {
            const int64_t i = (base + k) * row.stride;
            raw.word[k] = row.dtype == kFloat32 ? reinterpret_cast<const uint32_t*>(row.data)[i]
                                                : reinterpret_cast<const uint16_t*>(row.data)[i];
        }
    return raw;
}

// The values of a chunk; 0 outside the row.
__device__ __forceinline__ void convert(const RawChunk& raw, const RowView& row, int base, int classes,
                                        float (&out)[kChunk]) {
    const bool packed = row.dtype != kFloat32 && whole_vector(row, base, classes);
    const uint32_t words[kChunk] = {
        packed ? raw.word[0] & 0xffffu : raw.word[0], packed ? raw.word[0] >> 16 : raw.word[1],
        packed ? raw.word[1] & 0xffffu : raw.word[2], packed ? raw.word[1] >> 16 : raw.word[3]};
#pragma unroll
    for (int k = 0; k < kChunk; ++k)
        out[k] = row.dtype == kFloat32    ? __uint_as_float(words[k])
                 : row.dtype == kBFloat16 ? bits_as_bfloat16(words[k])
                                          : bits_as_half(words[k]);
}

template <class A>
__device__ __forceinline__ void load_chunk(const RowView& row, int base, int classes, A (&out)[kChunk]) {
    if constexpr (sizeof(A) == sizeof(float)) {
        if (row.dtype != kFloat64) return convert(load_raw(row, base, classes), row, base, classes, out);
    }
#pragma unroll
    for (int k = 0; k < kChunk; ++k)
        out[k] = within(base + k, classes) ? load_one<A>(row, base + k) : A(0);
}

__device__ __forceinline__ uint32_t bfloat16_bits(float x) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

__device__ __forceinline__ uint32_t half_bits(float x) {
    return __half_as_ushort(__float2half_rn(x));
}

// A row of a contiguous gradient, to write; null data if the gradient is not wanted.
struct GradientRow {
    char* data;
    DType dtype;
    bool vectors;
};

__device__ __forceinline__ GradientRow gradient_row(void* gradient, DType dtype, int64_t row, int64_t classes,
                                                    int before = 0) {
    char* data = gradient ? static_cast<char*>(gradient) + row * classes * element_size(dtype) : nullptr;
    return {data, dtype, aligned_for_chunks(data - before * element_size(dtype), dtype)};
}

template <class A>
__device__ __forceinline__ void store_chunk(const GradientRow& row, int base, int classes, const A (&x)[kChunk]) {
    char* const at = row.data + int64_t(base) * element_size(row.dtype);
    if (row.vectors && base >= 0 && base + kChunk <= classes) {
        if (row.dtype == kFloat32) {
            *reinterpret_cast<float4*>(at) = make_float4(float(x[0]), float(x[1]), float(x[2]), float(x[3]));
            return;
        }
        uint32_t bits[kChunk];
#pragma unroll
        for (int k = 0; k < kChunk; ++k)
            bits[k] = row.dtype == kBFloat16 ? bfloat16_bits(float(x[k])) : half_bits(float(x[k]));
        *reinterpret_cast<uint2*>(at) = make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
        return;
    }
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
        if (!within(base + k, classes)) continue;
        if (row.dtype == kFloat32)
            reinterpret_cast<float*>(at)[k] = float(x[k]);
        else if (row.dtype == kFloat64)
            reinterpret_cast<double*>(at)[k] = double(x[k]);
        else
            reinterpret_cast<uint16_t*>(at)[k] =
                uint16_t(row.dtype == kBFloat16 ? bfloat16_bits(float(x[k])) : half_bits(float(x[k])));
    }
}

} // namespace cuda
} // namespace fused_kd

// Convert pieces of a row, of any dtype and stride, to contiguous floats or doubles, and back.
// Included by sources compiled once per instruction set, like simd.h.
#pragma once

#include "../kernels.h"
#include "simd.h"

namespace fused_kd {
namespace FKD_ISA {

FKD_INLINE float float_of_bits(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

FKD_INLINE uint32_t bits_of_float(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

struct BFloat16 {
    typedef uint16_t Storage;
    static constexpr bool kBFloat = true;
    static FKD_INLINE float load(uint16_t h) { return float_of_bits(uint32_t(h) << 16); }
    static FKD_INLINE uint16_t store(float x) {
        const uint32_t bits = bits_of_float(x);
        const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u); // round to nearest, ties to even
        return uint16_t(x != x ? 0x7fc0u : rounded >> 16);
    }
};

struct Float16 {
    typedef uint16_t Storage;
    static constexpr bool kBFloat = false;
    static FKD_INLINE float load(uint16_t h) {
        // Multiplying by 2^112 raises the exponent, also correctly for subnormals; inf and NaN need their own case.
        const uint32_t magnitude = (uint32_t(h) & 0x7fffu) << 13;
        const float finite = float_of_bits(magnitude) * float_of_bits(0x77800000u);
        const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits_of_float(finite);
        return float_of_bits(bits | (uint32_t(h) & 0x8000u) << 16);
    }
    static FKD_INLINE uint16_t store(float x) {
        const uint32_t sign = bits_of_float(x) & 0x80000000u, magnitude = bits_of_float(x) ^ sign;
        // Below 2^-14, adding 0.5 rounds to the step of the subnormals, ties to even.
        const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
        const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
        h = magnitude >= 0x477ff000u ? 0x7c00u : h;
        h = magnitude > 0x7f800000u ? 0x7e00u : h;
        return uint16_t(h | sign >> 16);
    }
};

template <class T>
struct Native {
    typedef T Storage;
    static FKD_INLINE T load(T x) { return x; }
    static FKD_INLINE T store(T x) { return x; }
};

// Loops that the compiler vectorizes. The 16-bit floats have vector instructions below.
template <class Format, class A>
FKD_INLINE void gather(const void* base, int64_t stride, int64_t n, A* out) {
    const typename Format::Storage* p = static_cast<const typename Format::Storage*>(base);
    if (stride == 1)
        for (int64_t j = 0; j < n; ++j)
            out[j] = A(Format::load(p[j]));
    else
        for (int64_t j = 0; j < n; ++j)
            out[j] = A(Format::load(p[j * stride]));
}

template <class Format, class A>
FKD_INLINE void put(const A* in, int64_t n, void* base) {
    typename Format::Storage* p = static_cast<typename Format::Storage*>(base);
    for (int64_t j = 0; j < n; ++j)
        p[j] = typename Format::Storage(Format::store(in[j]));
}

// 16-bit floats by vector instructions, with a prefetch for the next calls. Return how many elements were converted:
// none to or from doubles, or if the processor has no such instruction.
constexpr int64_t kAhead = 2048;

template <class Format, class A>
FKD_INLINE int64_t half_to_float(const uint16_t*, int64_t, A*) {
    return 0;
}
template <class A>
FKD_INLINE int64_t float_to_half_vectors(const A*, int64_t, uint16_t*) {
    return 0;
}
template <class A>
FKD_INLINE int64_t float_to_bfloat_vectors(const A*, int64_t, uint16_t*) {
    return 0;
}

#if defined(__AVX512F__) || (defined(__F16C__) && defined(__AVX2__))
constexpr bool kHalfVectors = true;

#if defined(__AVX512F__)
typedef __m256i Halves;
FKD_INLINE Halves load_halves(const uint16_t* p, AllLanes) {
    return _mm256_loadu_si256(reinterpret_cast<const Halves*>(p));
}
FKD_INLINE Halves load_halves(const uint16_t* p, const SomeLanes<float>& lanes) {
    return _mm256_maskz_loadu_epi16(__mmask16((1u << lanes.count) - 1u), p);
}
template <bool bfloat>
FKD_INLINE FloatVec widen(Halves x) {
    if (bfloat) return (FloatVec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
    return (FloatVec)_mm512_cvtph_ps(x);
}
#else
typedef __m128i Halves;
FKD_INLINE Halves load_halves(const uint16_t* p, AllLanes) {
    return _mm_loadu_si128(reinterpret_cast<const Halves*>(p));
}
FKD_INLINE Halves load_halves(const uint16_t* p, const SomeLanes<float>& lanes) {
    if (lanes.count >= kLanes<float>) return load_halves(p, AllLanes{});
    Halves halves = {};
    __builtin_memcpy(&halves, p, sizeof(uint16_t) * size_t(lanes.count));
    return halves;
}
template <bool bfloat>
FKD_INLINE FloatVec widen(Halves x) {
    if (bfloat) return (FloatVec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16);
    return (FloatVec)_mm256_cvtph_ps(x);
}
#endif

// The remaining elements, and so a single target, use the same instruction: Float16 converts subnormals the same way
// only while PyTorch does not flush them to zero (torch.set_flush_denormal).
template <class Format, class Lanes>
FKD_INLINE FloatVec load_half(const uint16_t* p, const Lanes& lanes) {
    return widen<Format::kBFloat>(load_halves(p, lanes));
}

template <class Format>
FKD_INLINE int64_t half_to_float(const uint16_t* p, int64_t n, float* out) {
    for_lanes<float>(n, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        __builtin_prefetch(p + j + kAhead);
        store(out + j, load_half<Format>(p + j, lanes), lanes);
    });
    return n;
}

// Converts, and returns the largest element but those left out.
template <class Format, int K>
FKD_NOINLINE float half_to_float(const uint16_t* p, int64_t n, const Without<K>& without, float* out) {
    FloatVec max = splat<float>(-INFINITY);
    const FloatVec lowest = max;
    for_lanes<float>(n, without, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        __builtin_prefetch(p + j + kAhead);
        const FloatVec x = load_half<Format>(p + j, lanes);
        store(out + j, x, lanes);
        max = max_of(keep(lanes, x, lowest), max);
    });
    return max_lanes<float>(max);
}

FKD_INLINE int64_t float_to_half_vectors(const float* in, int64_t n, uint16_t* p) {
    int64_t j = 0;
    for (; j + kLanes<float> <= n; j += kLanes<float>)
#if defined(__AVX512F__)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + j), _mm512_cvtps_ph(_mm512_loadu_ps(in + j), 0));
#else
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + j), _mm256_cvtps_ph(_mm256_loadu_ps(in + j), 0));
#endif
    return j;
}
#else
constexpr bool kHalfVectors = false;
#endif

// AVX-512 BF16 rounds as BFloat16::store does, but takes subnormal numbers as 0.
#if defined(__AVX512F__) && defined(FKD_WITH_AVX512BF16)
inline FKD_NOINLINE
    __attribute__((target("avx512bf16"))) int64_t float_to_bfloat(const float* in, int64_t n, uint16_t* p) {
    constexpr int kSubnormal = 0x20;
    int64_t j = 0;
    for (; j + 32 <= n; j += 32) {
        const __m512 low = _mm512_loadu_ps(in + j), high = _mm512_loadu_ps(in + j + 16);
        if (__builtin_expect(_mm512_fpclass_ps_mask(low, kSubnormal) | _mm512_fpclass_ps_mask(high, kSubnormal), 0))
            put<BFloat16>(in + j, 32, p + j);
        else
            _mm512_storeu_si512(p + j, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    return j;
}
FKD_INLINE int64_t float_to_bfloat_vectors(const float* in, int64_t n, uint16_t* p) {
    return __builtin_cpu_supports("avx512bf16") ? float_to_bfloat(in, n, p) : 0;
}
#endif

FKD_INLINE const char* element(const Matrix& m, int64_t row, int64_t column) {
    return static_cast<const char*>(m.data) + (row * m.row_stride + column * m.col_stride) * element_size(m.dtype);
}

template <class A>
constexpr DType dtype_of() {
    return sizeof(A) == 8 ? kFloat64 : kFloat32;
}

template <class A>
FKD_NOINLINE void convert(const void* p, DType dtype, int64_t stride, int64_t n, A* out) {
    const uint16_t* half = static_cast<const uint16_t*>(p);
    int64_t done = 0;
    switch (dtype) {
    case kFloat32:
        gather<Native<float>>(p, stride, n, out);
        break;
    case kFloat64:
        gather<Native<double>>(p, stride, n, out);
        break;
    case kBFloat16:
        if (stride == 1) done = half_to_float<BFloat16>(half, n, out);
        gather<BFloat16>(half + done * stride, stride, n - done, out + done);
        break;
    default:
        if (stride == 1) done = half_to_float<Float16>(half, n, out);
        gather<Float16>(half + done * stride, stride, n - done, out + done);
    }
}

// Return n elements from (row, column): in place if usable as they are, else converted into `staging`.
template <class A>
FKD_INLINE const A* read(const Matrix& m, int64_t row, int64_t column, int64_t n, A* staging) {
    const char* p = element(m, row, column);
    if (m.dtype == dtype_of<A>() && m.col_stride == 1) return reinterpret_cast<const A*>(p);
    convert(p, m.dtype, m.col_stride, n, staging);
    return staging;
}

// Write n elements to a contiguous row of any dtype.
template <class A>
FKD_NOINLINE void write(const A* in, int64_t n, void* out, DType dtype) {
    uint16_t* half = static_cast<uint16_t*>(out);
    int64_t done = 0;
    switch (dtype) {
    case kFloat32:
        put<Native<float>>(in, n, out);
        break;
    case kFloat64:
        put<Native<double>>(in, n, out);
        break;
    case kBFloat16:
        done = float_to_bfloat_vectors(in, n, half);
        put<BFloat16>(in + done, n - done, half + done);
        break;
    default:
        done = float_to_half_vectors(in, n, half);
        put<Float16>(in + done, n - done, half + done);
    }
}

// Write n elements with non-temporal stores, to memory that will not be read soon: an ordinary store that misses the
// caches first reads the line that it overwrites. The caller must fence.
template <class A>
FKD_NOINLINE void stream(const A* in, int64_t n, A* out) {
    int64_t j = 0;
#if defined(__AVX512F__) || defined(__AVX2__)
    for (; j < n && (reinterpret_cast<uintptr_t>(out + j) & uintptr_t(kBytes - 1)); ++j)
        out[j] = in[j];
    for (; j + kLanes<A> <= n; j += kLanes<A>) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + j), _mm512_loadu_si512(in + j));
#else
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out + j),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + j)));
#endif
    }
#endif
    for (; j < n; ++j)
        out[j] = in[j];
}

FKD_INLINE void fence() {
#if defined(__AVX512F__) || defined(__AVX2__)
    _mm_sfence();
#endif
}

} // namespace FKD_ISA
} // namespace fused_kd

// Float16 as csrc/cuda uses it, by the compiler's own type.
#pragma once

#include <cstring>

struct HalfBits {
    unsigned short bits;
};
inline HalfBits __ushort_as_half(unsigned short bits) {
    return {bits};
}
inline unsigned short __half_as_ushort(HalfBits h) {
    return h.bits;
}
inline float __half2float(HalfBits h) {
    _Float16 x;
    memcpy(&x, &h, sizeof x);
    return float(x);
}
inline HalfBits __float2half_rn(float x) {
    const _Float16 rounded = _Float16(x);
    HalfBits h;
    memcpy(&h, &rounded, sizeof h);
    return h;
}

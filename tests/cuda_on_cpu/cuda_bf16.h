// Bfloat16 as csrc/cuda uses it: rounding to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

struct BFloat16Bits {
    unsigned short bits;
};
inline unsigned short __bfloat16_as_ushort(BFloat16Bits b) {
    return b.bits;
}
inline BFloat16Bits __float2bfloat16_rn(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<unsigned short>(x != x ? 0x7fffu : rounded)};
}

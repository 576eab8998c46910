// Sort keys as integers: ascending integers are descending keys.
#pragma once

#include <stdint.h>
#include <string.h>

#include "compile.h"

namespace fused_kd {
namespace FKD_ISA {

FKD_HD uint32_t descending_bits(float key) {
    key += 0.0f; // -0 becomes 0
    uint32_t bits;
    memcpy(&bits, &key, sizeof bits);
    return bits ^ ((bits >> 31) ? 0u : 0x7fffffffu);
}

FKD_HD uint64_t descending_bits(double key) {
    key += 0.0;
    uint64_t bits;
    memcpy(&bits, &key, sizeof bits);
    return bits ^ ((bits >> 63) ? uint64_t(0) : ~uint64_t(0) >> 1);
}

template <class A>
using KeyBits = decltype(descending_bits(A(0)));

} // namespace FKD_ISA
} // namespace fused_kd

// How functions shared by CPU and GPU are declared.
#pragma once

#if defined(__CUDACC__)
#define FKD_HD __host__ __device__ inline
#else
#define FKD_HD static inline
#endif

// The sources in cpu/ that are compiled once per instruction set define FKD_ISA. Otherwise the linker could merge their
// inline functions, and AVX-512 code could run on a CPU without AVX-512.
#ifndef FKD_ISA
#define FKD_ISA common
#endif

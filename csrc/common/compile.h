// How functions are declared that the CPU and the GPU share.
#pragma once

#if defined(__CUDACC__)
#define FKD_HD __host__ __device__ inline
#else
#define FKD_HD static inline
#endif

// The files in cpu/ that are compiled once per instruction set define FKD_ISA, so that the linker cannot merge one
// build's inline functions into another's and run AVX-512 code where there is none.
#ifndef FKD_ISA
#define FKD_ISA common
#endif

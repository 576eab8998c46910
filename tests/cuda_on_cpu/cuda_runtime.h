// As much of CUDA as csrc/cuda uses, on a CPU: a stand-in for the header of that name, so that tests run the very
// kernels where there is no GPU. Slow, and no model of time or of memory's ordering: the threads of a block are fibers,
// and each warp in turn runs as far as it can without the others, first to last, or last to first if `backwards`. A
// barrier that is missing shows in one of the two orders.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static
#define FKD_DYNAMIC_SHARED(name) char* const name = emulated::the_block.shared

struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

struct dim3 {
    unsigned x;
    explicit dim3(unsigned n = 1) : x(n) {}
};

// For a float, as in CUDA; <math.h> has them for double.
using std::exp;
using std::fma;
using std::fmax;
using std::fmin;
using std::log;
using std::log1p;

namespace emulated {

constexpr int kMostThreads = 1024;
constexpr size_t kStack = 128 * 1024, kShared = 48 * 1024, kMostShared = 227 * 1024;

struct Barrier {
    int expected = 0, arrived = 0;
    long generation = 0;
    void open_if_complete() {
        if (arrived && arrived == expected) {
            arrived = 0;
            ++generation;
        }
    }
};

struct Fiber {
    ucontext_t start; // begins on a stack of its own; from then on jumps, which take no system call, switch
    jmp_buf resume;
    bool started = false, done = true;
    Barrier* at = nullptr; // waiting for its generation to pass
    long generation = 0;
    int shuffles = 0;
};

struct Block {
    Fiber fibers[kMostThreads];
    Barrier block, warps[kMostThreads / 32];
    int slots[2][kMostThreads];
    jmp_buf scheduler;
    int current = 0;
    alignas(16) char shared[kMostShared];
    std::vector<char> stacks = std::vector<char>(kMostThreads * kStack);
};

inline Block the_block;
inline size_t shared_on_request = kMostShared; // what a block may ask for; tests set less
inline bool backwards = false;
inline long launches = 0;
inline dim3 thread_index, block_index, block_size, grid_size;
inline void (*body)(void*);
inline void* body_arguments;

inline void wait(Barrier& barrier) {
    Fiber& fiber = the_block.fibers[the_block.current];
    fiber.at = &barrier;
    fiber.generation = barrier.generation;
    ++barrier.arrived;
    barrier.open_if_complete();
    if (_setjmp(fiber.resume) == 0) _longjmp(the_block.scheduler, 1);
}

inline void run_fiber() {
    body(body_arguments);
    Fiber& fiber = the_block.fibers[the_block.current];
    fiber.done = true;
    // A thread that has ended is waited for no more.
    for (Barrier* barrier : {&the_block.block, &the_block.warps[the_block.current / 32]}) {
        --barrier->expected;
        barrier->open_if_complete();
    }
    _longjmp(the_block.scheduler, 1);
}

// Until its next barrier, or its end. Not inline: it returns twice.
__attribute__((noinline)) inline void run_on(Fiber& fiber) {
    if (_setjmp(the_block.scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

inline void run_block(int threads) {
    Block& b = the_block;
    b.block = Barrier();
    b.block.expected = threads;
    for (int w = 0; w < threads / 32; ++w) {
        b.warps[w] = Barrier();
        b.warps[w].expected = 32;
    }
    memset(b.shared, 0xa5, sizeof b.shared);
    for (int t = 0; t < threads; ++t) {
        Fiber& fiber = b.fibers[t];
        fiber.started = fiber.done = false;
        fiber.at = nullptr;
        fiber.shuffles = 0;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = b.stacks.data() + size_t(t) * kStack;
        fiber.start.uc_stack.ss_size = kStack;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, run_fiber, 0);
    }
    const auto at = [](int i, int n) { return backwards ? n - 1 - i : i; };
    for (int left = threads; left > 0;) {
        bool moved = false;
        for (int w = 0; w < threads / 32; ++w)
            for (bool moving = true; moving; moved |= moving) {
                moving = false;
                for (int lane = 0; lane < 32; ++lane) {
                    const int t = 32 * at(w, threads / 32) + at(lane, 32);
                    Fiber& fiber = b.fibers[t];
                    if (fiber.done || (fiber.at && fiber.at->generation == fiber.generation)) continue;
                    b.current = t;
                    thread_index = dim3(unsigned(t));
                    moving = true;
                    run_on(fiber);
                    left -= fiber.done;
                }
            }
        if (!moved) {
            fprintf(stderr, "the threads of a block wait at different barriers\n");
            abort();
        }
    }
}

} // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

inline void __syncthreads() {
    emulated::wait(emulated::the_block.block);
}

inline void __syncwarp() {
    emulated::wait(emulated::the_block.warps[emulated::the_block.current / 32]);
}

namespace emulated {

// The values that the lanes of the warp offer. Two sets of slots by turns, so that one barrier does: none can be two
// exchanges ahead of another.
inline const int* exchange(int value) {
    const int self = the_block.current;
    int* const slots = the_block.slots[the_block.fibers[self].shuffles++ & 1];
    slots[self] = value;
    __syncwarp();
    return slots + self / 32 * 32;
}

} // namespace emulated

inline int __shfl_xor_sync(unsigned, int value, int mask) {
    return emulated::exchange(value)[(threadIdx.x % 32) ^ unsigned(mask)];
}
inline uint32_t __shfl_up_sync(unsigned, uint32_t value, int step) {
    const int lane = int(threadIdx.x % 32);
    return uint32_t(emulated::exchange(int(value))[lane < step ? lane : lane - step]);
}
inline int __popc(uint32_t bits) {
    return __builtin_popcount(bits);
}
inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
    const uint32_t before = *at;
    *at += value;
    return before;
}
inline float __fdividef(float a, float b) {
    return a / b;
}

inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorIllegalAddress = 700
};
struct cudaFuncAttributes {};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
typedef struct Stream* cudaStream_t;

namespace emulated {

// A call that fails leaves its error until somebody takes it; a context that a fault has ruined gives the fault's for
// ever.
inline cudaError_t last_error = cudaSuccess, ruined = cudaSuccess;

inline cudaError_t result(cudaError_t error) {
    if (ruined != cudaSuccess) error = ruined;
    if (error != cudaSuccess) last_error = error;
    return error;
}

} // namespace emulated

inline cudaError_t cudaPeekAtLastError() {
    return emulated::ruined != cudaSuccess ? emulated::ruined : emulated::last_error;
}
inline cudaError_t cudaGetLastError() {
    const cudaError_t error = cudaPeekAtLastError();
    emulated::last_error = cudaSuccess;
    return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
           : error == cudaErrorInvalidDevice      ? "invalid device ordinal"
           : error == cudaErrorIllegalAddress     ? "an illegal memory access was encountered"
                                                  : "invalid argument";
}
inline cudaError_t cudaSetDevice(int device) {
    return emulated::result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
    if (device != 0) return emulated::result(cudaErrorInvalidDevice);
    *value = int(emulated::shared_on_request);
    return emulated::result(cudaSuccess);
}

namespace emulated {

// The kernel that has asked for more shared memory than a block gets, and how much.
inline const void* asking = nullptr;
inline size_t asked = 0;

} // namespace emulated

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || size_t(bytes) > emulated::shared_on_request) return emulated::result(cudaErrorInvalidValue);
    emulated::asking = reinterpret_cast<const void*>(kernel);
    emulated::asked = size_t(bytes);
    return emulated::result(cudaSuccess);
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return emulated::result(cudaSuccess);
}

template <class Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 blocks, dim3 threads, void** pointers, size_t shared,
                             cudaStream_t) {
    using namespace emulated;
    if (blocks.x == 0 || blocks.x > 0x7fffffffu || threads.x == 0 || threads.x > kMostThreads || threads.x % 32)
        return result(cudaErrorInvalidConfiguration);
    const bool has_asked = asking == reinterpret_cast<const void*>(kernel);
    if (shared > (has_asked ? asked : kShared)) return result(cudaErrorInvalidValue);
    if (const cudaError_t error = result(cudaSuccess)) return error;
    struct Call {
        void (*kernel)(Arguments);
        Arguments* arguments;
    } call = {kernel, static_cast<Arguments*>(pointers[0])};
    body = [](void* p) {
        const Call& c = *static_cast<Call*>(p);
        c.kernel(*c.arguments);
    };
    body_arguments = &call;
    block_size = threads;
    grid_size = blocks;
    ++launches;
    for (unsigned i = 0; i < blocks.x; ++i) {
        block_index = dim3(i);
        run_block(int(threads.x));
    }
    return cudaSuccess;
}

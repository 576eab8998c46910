// The part of CUDA's runtime that the library and CUB call. Launches go to a launcher (driver.py). The runtime's own
// decisions are made here: which launches to refuse, and the effect of an error on later calls.
//
// Errors work as in CUDA. Each call returns its error and stores it as the thread's last error: cudaPeekAtLastError
// reads it, cudaGetLastError reads and clears it. A kernel that faults ruins the context: from then on every call
// returns that error, even after clearing it.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>

namespace {

constexpr int kDevices = 2, kMultiprocessors = 132, kMostThreads = 1024;
// Shared memory of a block by default, and of a multiprocessor.
constexpr size_t kShared = 48 * 1024, kSharedOfAll = 228 * 1024;

struct Launch {
    const char* kernel;
    unsigned grid[3], block[3];
    size_t shared;
    void** arguments;
    int device;
};
// Returns 0, the error that refuses the launch, or, if the kernel faulted, the negative of the context's error.
using Launcher = int (*)(const Launch*);

struct Function {
    std::string name;
    size_t most_shared = kShared;
};

// By the address of the host's stub. Static constructors fill it, so it is made at the first use.
std::map<const void*, Function>& functions() {
    static std::map<const void*, Function> all;
    return all;
}

Launcher launcher = nullptr;
cudaError_t sticky = cudaSuccess;
int architecture = 90;
size_t shared_limit = SIZE_MAX; // set by tests
long launches = 0, waits = 0;
bool backwards = false;
thread_local cudaError_t last = cudaSuccess;
thread_local int device = 0;
thread_local struct {
    dim3 grid, block;
    size_t shared;
    void* stream;
} configuration;

// Every call returns through this.
cudaError_t result(cudaError_t error) {
    if (sticky != cudaSuccess) error = sticky;
    if (error != cudaSuccess) last = error;
    return error;
}

// The shared memory that a block may ask for with cudaFuncSetAttribute.
size_t shared_on_request() {
    const size_t given = architecture == 80 || architecture == 87 ? 163 : architecture / 10 == 8 ? 99 : 227;
    return given * 1024 < shared_limit ? given * 1024 : shared_limit;
}

bool is_function(const void* stub) {
    return functions().count(stub) != 0;
}

cudaError_t refusal(const Function& function, dim3 grid, dim3 block, size_t shared) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    if (block.x == 0 || block.y == 0 || block.z == 0 || block.z > 64) return cudaErrorInvalidConfiguration;
    if (uint64_t(block.x) * block.y * block.z > kMostThreads) return cudaErrorInvalidConfiguration;
    return shared > function.most_shared ? cudaErrorInvalidValue : cudaSuccess;
}

cudaError_t run(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared) {
    if (sticky != cudaSuccess) return sticky;
    if (!is_function(stub)) return cudaErrorInvalidDeviceFunction;
    const Function& function = functions()[stub];
    if (const cudaError_t refused = refusal(function, grid, block, shared)) return refused;
    if (!launcher) return cudaErrorNotReady;
    ++launches;
    const Launch launch = {
        function.name.c_str(), {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, arguments, device};
    const int answer = launcher(&launch);
    if (answer >= 0) return cudaError_t(answer);
    sticky = cudaError_t(-answer);
    return sticky;
}

} // namespace

extern "C" {

// For driver.py and the tests.

void ptx_set_launcher(Launcher f, int compute_capability) {
    launcher = f;
    architecture = compute_capability;
}
// Restore a healthy context.
void ptx_reset() {
    sticky = last = cudaSuccess;
    device = 0;
}
// As if a kernel had faulted.
void ptx_ruin(int error) {
    sticky = cudaError_t(error);
}
// As if the device gave a block no more than this.
void ptx_limit_shared(size_t bytes) {
    shared_limit = bytes;
}
void ptx_run_backwards(bool yes) {
    backwards = yes;
}
bool ptx_runs_backwards() {
    return backwards;
}
long ptx_launches() {
    return launches;
}
// Number of calls that wait for the GPU; the library promises none.
long ptx_waits() {
    return waits;
}

// Called by nvcc's host code.

void** __cudaRegisterFatBinary(void*) {
    static void* handle = nullptr;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    functions()[stub].name = name;
}
char __cudaInitModule(void**) {
    return 1;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *static_cast<void**>(stream) = configuration.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
    return result(is_function(stub) ? cudaSuccess : cudaErrorInvalidDeviceFunction);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
    return result(run(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared));
}

// CUDA's public functions.

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
    return result(run(stub, grid, block, arguments, shared));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
    return result(run(stub, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes));
}

cudaError_t cudaGetLastError() {
    const cudaError_t error = sticky != cudaSuccess ? sticky : last;
    last = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() {
    return sticky != cudaSuccess ? sticky : last;
}
const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorInvalidConfiguration:
        return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction:
        return "invalid device function";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorIllegalAddress:
        return "an illegal memory access was encountered";
    case cudaErrorLaunchOutOfResources:
        return "too many resources requested for launch";
    default:
        return "an error without a message in tools/ptx/cuda/runtime.cpp";
    }
}
const char* cudaGetErrorName(cudaError_t error) {
    return cudaGetErrorString(error);
}

cudaError_t cudaGetDeviceCount(int* count) {
    *count = kDevices;
    return result(cudaSuccess);
}
cudaError_t cudaGetDevice(int* current) {
    *current = device;
    return result(cudaSuccess);
}
cudaError_t cudaSetDevice(int wanted) {
    if (wanted < 0 || wanted >= kDevices) return result(cudaErrorInvalidDevice);
    device = wanted;
    return result(cudaSuccess);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int of) {
    if (of < 0 || of >= kDevices) return result(cudaErrorInvalidDevice);
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
        *value = kMultiprocessors;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = architecture / 10;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = architecture % 10;
        break;
    case cudaDevAttrMaxThreadsPerBlock:
        *value = kMostThreads;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = int(kShared);
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = int(shared_on_request());
        break;
    case cudaDevAttrMaxGridDimX:
        *value = 0x7fffffff;
        break;
    case cudaDevAttrWarpSize:
        *value = 32;
        break;
    default:
        fprintf(stderr, "tools/ptx/cuda/runtime.cpp: attribute %d of a device is not known\n", int(attribute));
        return result(cudaErrorInvalidValue);
    }
    return result(cudaSuccess);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
    if (!is_function(stub)) return result(cudaErrorInvalidDeviceFunction);
    memset(attributes, 0, sizeof *attributes);
    attributes->ptxVersion = attributes->binaryVersion = architecture;
    attributes->maxThreadsPerBlock = kMostThreads;
    attributes->maxDynamicSharedSizeBytes = int(functions()[stub].most_shared);
    return result(cudaSuccess);
}
cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
    if (!is_function(stub)) return result(cudaErrorInvalidDeviceFunction);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || size_t(value) > shared_on_request())
        return result(cudaErrorInvalidValue);
    functions()[stub].most_shared = size_t(value);
    return result(cudaSuccess);
}
// By threads and dynamic shared memory; only ptxas knows the registers.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* stub, int threads,
                                                                   size_t shared, unsigned) {
    if (!is_function(stub)) return result(cudaErrorInvalidDeviceFunction);
    if (threads < 1 || threads > kMostThreads || shared > functions()[stub].most_shared)
        return result(cudaErrorInvalidValue);
    const int by_threads = 2048 / threads, by_shared = int(kSharedOfAll / (shared + 1024));
    *blocks = by_threads < by_shared ? by_threads : by_shared;
    if (*blocks > 32) *blocks = 32;
    return result(cudaSuccess);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* stub, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, threads, shared, 0);
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
    ++waits;
    return result(cudaSuccess);
}
cudaError_t cudaDeviceSynchronize() {
    ++waits;
    return result(cudaSuccess);
}

} // extern "C"

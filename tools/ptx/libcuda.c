/* The functions of CUDA's driver that Triton's launcher calls. They do nothing and report success:
   tools/ptx/host.py measures the time of a launch before it would reach a GPU. */

static int launched;

int launches(void) { return launched; }

static int attribute(int* value) {
  *value = 1024; /* registers, threads or bytes: enough of any attribute */
  return 0;
}

int cuInit(unsigned flags) { return 0; }
int cuGetErrorString(int code, const char** text) { *text = "none"; return 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGet(int* device, int number) { *device = number; return 0; }
int cuDeviceGetAttribute(int* value, int which, int device) { *value = 1 << 20; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = &launched; return 0; }
int cuCtxGetCurrent(void** context) { *context = &launched; return 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuCtxGetLimit(unsigned long* value, int which) { *value = 0; return 0; }
int cuCtxSetLimit(int which, unsigned long value) { return 0; }
int cuModuleLoadData(void** module, const void* image) { *module = &launched; return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { *function = &launched; return 0; }
int cuFuncGetAttribute(int* value, int which, void* function) { return attribute(value); }
int cuFuncSetAttribute(void* function, int which, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuPointerGetAttribute(void* value, int which, unsigned long pointer) {
  *(unsigned long*)value = pointer;
  return 0;
}
int cuLaunchKernelEx(const void* config, void* function, void** arguments, void** extra) {
  launched++;
  return 0;
}

/* libcuda (with -DFAKE_HIP: the HIP runtime) without a card. Code is a text; a line "// entry NAME BYTES" in it is a
   kernel that takes that many bytes. With -DFAKE_OLD it lacks what CUDA 12.4 brought. */
#include "fake.h"

typedef struct {
    const char* code;
    char* copy;
    int is_loaded;
} Module;

typedef struct {
    Module* module;
    char name[64];
    size_t bytes;
} Function;

static const char* error_name(int number)
{
    switch (number) {
    case 1: return API("CUDA_ERROR_INVALID_VALUE", "hipErrorInvalidValue");
    case 2: return API("CUDA_ERROR_OUT_OF_MEMORY", "hipErrorOutOfMemory");
    case 3: return API("CUDA_ERROR_NOT_INITIALIZED", "hipErrorNotInitialized");
    case 34: return API("CUDA_ERROR_STUB_LIBRARY", NULL);
    case 200: return API("CUDA_ERROR_INVALID_IMAGE", "hipErrorInvalidImage");
    case 209: return API("CUDA_ERROR_NO_BINARY_FOR_GPU", "hipErrorNoBinaryForGpu");
    case 400: return API("CUDA_ERROR_INVALID_HANDLE", "hipErrorInvalidHandle");
    case 500: return API("CUDA_ERROR_NOT_FOUND", "hipErrorNotFound");
    case 700: return API("CUDA_ERROR_ILLEGAL_ADDRESS", "hipErrorIllegalAddress");
    case 701: return API("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "hipErrorLaunchOutOfResources");
    case 719: return API("CUDA_ERROR_LAUNCH_FAILED", "hipErrorLaunchFailure");
    default: return NULL;
    }
}

#ifdef FAKE_HIP
EXPORT const char* hipGetErrorName(int number) { return error_name(number) ? error_name(number) : "hipErrorUnknown"; }
EXPORT const char* hipGetErrorString(int number) { return number == 2 ? "out of memory" : NULL; }
#else
EXPORT int cuGetErrorName(int number, const char** answer)
{
    *answer = error_name(number);
    return *answer == NULL;
}
EXPORT int cuGetErrorString(int number, const char** answer)
{
    *answer = number == 2 ? "out of memory" : NULL;
    return *answer == NULL;
}
#endif

#define VERSION API(cuDriverGetVersion, hipRuntimeGetVersion)
EXPORT int VERSION(int* version)
{
    FAIL_IF_PLANNED(VERSION);
    *version = API(12080, 70253211);
    return 0;
}

#define LOAD API(cuModuleLoadData, hipModuleLoadData)
EXPORT int LOAD(Module** module, const char* code)
{
    note("%s", TEXT(LOAD));
    FAIL_IF_PLANNED(LOAD);
    if (strncmp(code, "FAKE", 4) != 0) return 200;
    *module = calloc(1, sizeof **module);
    /* CUDA copies the code; HIP goes on reading it where it is. */
    (*module)->copy = strdup(code);
    (*module)->code = API((*module)->copy, code);
    (*module)->is_loaded = 1;
    return 0;
}

#define UNLOAD API(cuModuleUnload, hipModuleUnload)
EXPORT int UNLOAD(Module* module)
{
    note("%s", TEXT(UNLOAD));
    FAIL_IF_PLANNED(UNLOAD);
    module->is_loaded = 0;
    return 0;
}

#define GET_FUNCTION API(cuModuleGetFunction, hipModuleGetFunction)
EXPORT int GET_FUNCTION(Function** function, Module* module, const char* name)
{
    note("%s %s", TEXT(GET_FUNCTION), name);
    FAIL_IF_PLANNED(GET_FUNCTION);
    if (strcmp(module->code, module->copy) != 0) return 200;
    const char* entry = module->code;
    while ((entry = strstr(entry, "// entry "))) {
        char found[64];
        size_t bytes;
        entry += strlen("// entry ");
        if (sscanf(entry, "%63s %zu", found, &bytes) == 2 && strcmp(found, name) == 0) {
            *function = calloc(1, sizeof **function);
            (*function)->module = module;
            (*function)->bytes = bytes;
            snprintf((*function)->name, sizeof (*function)->name, "%s", name);
            return 0;
        }
    }
    return 500;
}

#define GET_ATTRIBUTE API(cuFuncGetAttribute, hipFuncGetAttribute)
EXPORT int GET_ATTRIBUTE(int* value, int which, Function* function)
{
    (void)function;
    FAIL_IF_PLANNED(GET_ATTRIBUTE);
    const int values[] = {1024, 2048, 0, 16, 96};
    if (which < 0 || which > 4) return 1;
    *value = values[which];
    return 0;
}

#ifndef FAKE_HIP
EXPORT int cuFuncSetAttribute(Function* function, int which, int value)
{
    note("cuFuncSetAttribute %s %d %d", function->name, which, value);
    FAIL_IF_PLANNED(cuFuncSetAttribute);
    return 0;
}
#ifndef FAKE_OLD
EXPORT int cuFuncGetParamInfo(Function* function, size_t index, size_t* offset, size_t* size)
{
    if (index != 0) return 1;
    *offset = 0;
    *size = function->bytes;
    return 0;
}
#endif
#endif

#define LAUNCH API(cuLaunchKernel, hipModuleLaunchKernel)
EXPORT int LAUNCH(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, void* stream, void** parameters, void** extra)
{
    if (getenv("FAKE_LOG") != NULL) {
        char bytes[1024] = "";
        const unsigned char* argument = parameters[0];
        for (size_t i = 0; i < function->bytes && i < 500; i++) sprintf(bytes + 2 * i, "%02x", argument[i]);
        note("%s %s (%u %u %u) (%u %u %u) %u %#zx %d %s", TEXT(LAUNCH), function->name, gx, gy, gz, bx, by, bz, shared,
             (size_t)stream, extra == NULL, bytes);
    }
    FAIL_IF_PLANNED(LAUNCH);
    return function->module->is_loaded ? 0 : 400;
}

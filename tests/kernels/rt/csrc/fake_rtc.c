/* libnvrtc (with -DFAKE_HIP: libhiprtc) that compiles nothing: its code is "FAKE", the options, the headers' names and
   the source. With -DFAKE_OLD it cannot say what it compiles for. With -DFAKE_BUILTINS it is NVRTC's second library.

   FAKE_VERSION   as "12.8"
   FAKE_BUILTINS  when set, compiling needs the second library, by its name
   In a source: "#error TEXT" fails, "#warn TEXT" is said, "#nothing" makes no code, "#crash" ends the process, "#hang"
   never ends, "#chatter" prints.
*/
#include "fake.h"

#ifdef FAKE_BUILTINS
EXPORT int fake_builtins(void) { return 1; }
#else

#include <dlfcn.h>

typedef struct {
    char *source, *name, *headers, *code;
    char log[512];
} Program;

static char* joined(const char* before, const char* text)
{
    char* all = malloc(strlen(before) + strlen(text) + 2);
    sprintf(all, "%s%s\n", before, text);
    return all;
}

#define ERROR_STRING API(nvrtcGetErrorString, hiprtcGetErrorString)
EXPORT const char* ERROR_STRING(int error)
{
    switch (error) {
    case 1: return API("NVRTC_ERROR_OUT_OF_MEMORY", "HIPRTC_ERROR_OUT_OF_MEMORY");
    case 6: return API("NVRTC_ERROR_COMPILATION", "HIPRTC_ERROR_COMPILATION");
    case 7: return API("NVRTC_ERROR_BUILTIN_OPERATION_FAILURE", "HIPRTC_ERROR_BUILTIN_OPERATION_FAILURE");
    default: return NULL;
    }
}

#define VERSION API(nvrtcVersion, hiprtcVersion)
EXPORT int VERSION(int* major, int* minor)
{
    FAIL_IF_PLANNED(VERSION);
    const char* version = getenv("FAKE_VERSION");
    return sscanf(version ? version : API("12.8", "9.0"), "%d.%d", major, minor) != 2;
}

#if !defined(FAKE_HIP) && !defined(FAKE_OLD)
static const int archs[] = {120, 75, 80, 86, 87, 90, 100, 101};
EXPORT int nvrtcGetNumSupportedArchs(int* count)
{
    *count = sizeof archs / sizeof *archs;
    return 0;
}
EXPORT int nvrtcGetSupportedArchs(int* answer)
{
    memcpy(answer, archs, sizeof archs);
    return 0;
}
#endif

#define CREATE API(nvrtcCreateProgram, hiprtcCreateProgram)
EXPORT int CREATE(Program** program, const char* source, const char* name, int count, const char* const* texts,
                  const char* const* names)
{
    note("%s %s", TEXT(CREATE), name);
    FAIL_IF_PLANNED(CREATE);
    *program = calloc(1, sizeof **program);
    (*program)->source = strdup(source);
    (*program)->name = strdup(name);
    (*program)->headers = strdup("");
    for (int i = 0; i < count; i++) {
        (*program)->headers = joined((*program)->headers, names[i]);
        (*program)->headers = joined((*program)->headers, texts[i]);
    }
    return 0;
}

static const char* said(const Program* program, const char* word)
{
    const char* at = strstr(program->source, word);
    return at ? at + strlen(word) : NULL;
}

#define COMPILE API(nvrtcCompileProgram, hiprtcCompileProgram)
EXPORT int COMPILE(Program* program, int count, const char* const* options)
{
    char* all = strdup("FAKE\n");
    for (int i = 0; i < count; i++) all = joined(all, options[i]);
    note("%s %s", TEXT(COMPILE), program->name);
    FAIL_IF_PLANNED(COMPILE);
    if (getenv("FAKE_BUILTINS") && !dlopen("libnvrtc-builtins.so.12.8", RTLD_LAZY | RTLD_NOLOAD)) return 7;
    const char* text;
    if (said(program, "#crash")) abort();
    if (said(program, "#hang")) sleep(600);
    if (said(program, "#chatter")) {
        printf("warning: nobody asked\n");
        fflush(stdout);
    }
    if ((text = said(program, "#warn "))) snprintf(program->log, sizeof program->log, "%.200s", text);
    if ((text = said(program, "#error "))) {
        snprintf(program->log, sizeof program->log, "%s: note: compiling\n%s(3): error: %.*s\n1 error detected.\n",
                 program->name, program->name, (int)strcspn(text, "\n"), text);
        return 6;
    }
    program->code = said(program, "#nothing") ? strdup("") : joined(joined(all, program->headers), program->source);
    return 0;
}

#define LOG_SIZE API(nvrtcGetProgramLogSize, hiprtcGetProgramLogSize)
EXPORT int LOG_SIZE(Program* program, size_t* size)
{
    FAIL_IF_PLANNED(LOG_SIZE);
    *size = strlen(program->log) + 1;
    return 0;
}

#define LOG API(nvrtcGetProgramLog, hiprtcGetProgramLog)
EXPORT int LOG(Program* program, char* log)
{
    FAIL_IF_PLANNED(LOG);
    strcpy(log, program->log);
    return 0;
}

#define CODE_SIZE API(nvrtcGetCUBINSize, hiprtcGetCodeSize)
EXPORT int CODE_SIZE(Program* program, size_t* size)
{
    FAIL_IF_PLANNED(CODE_SIZE);
    *size = strlen(program->code);
    return 0;
}

#define CODE API(nvrtcGetCUBIN, hiprtcGetCode)
EXPORT int CODE(Program* program, char* code)
{
    FAIL_IF_PLANNED(CODE);
    memcpy(code, program->code, strlen(program->code));
    return 0;
}

#define DESTROY API(nvrtcDestroyProgram, hiprtcDestroyProgram)
EXPORT int DESTROY(Program** program)
{
    note("%s %s", TEXT(DESTROY), (*program)->name);
    *program = NULL;
    return 0;
}
#endif

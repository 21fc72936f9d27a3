/* What the fake libraries share: a log of their calls, and calls that fail when they are told to.

   FAKE_LOG   a file; every call adds a line
   FAKE_FAIL  "cuLaunchKernel:700:3": the third call of that function answers 700 ("cuLaunchKernel:700": the first,
              "cuLaunchKernel:700:0": every one);
              from 700 on the device is lost, and every call after it answers the same until FAKE_FAIL changes
*/
#pragma once
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

#ifdef FAKE_HIP
#define API(cuda, hip) hip
#else
#define API(cuda, hip) cuda
#endif
#define TEXT(name) TEXT_(name)
#define TEXT_(name) #name

static void note(const char* form, ...)
{
    const char* path = getenv("FAKE_LOG");
    if (path == NULL) return;
    char line[4096];
    va_list arguments;
    va_start(arguments, form);
    int length = vsnprintf(line, sizeof line - 1, form, arguments);
    va_end(arguments);
    if (length > (int)sizeof line - 2) length = sizeof line - 2;
    line[length] = '\n';
    int file = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (file < 0 || write(file, line, (size_t)length + 1) < 0) abort();
    close(file);
}

/* The error that this call of `function` is to answer; 0 for none. */
static int planned(const char* function)
{
    static char plan[128];
    static int calls, lost;
    const char* wanted = getenv("FAKE_FAIL");
    if (wanted == NULL) wanted = "";
    if (strcmp(plan, wanted) != 0) {
        snprintf(plan, sizeof plan, "%s", wanted);
        calls = lost = 0;
    }
    if (lost) return lost;
    char name[64] = "";
    int number = 0, which = 1;
    if (sscanf(plan, "%63[^:]:%d:%d", name, &number, &which) < 2 || strcmp(name, function) != 0) return 0;
    if (which != 0 && ++calls != which) return 0;
    if (number >= 700 && number < 720) lost = number;
    return number;
}

#define FAIL_IF_PLANNED(name)                     \
    do {                                          \
        int error_ = planned(TEXT(name));         \
        if (error_) return error_;                \
    } while (0)

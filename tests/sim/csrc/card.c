#define _POSIX_C_SOURCE 200809L

#include "card.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int read_file(struct card *card)
{
    const char *path = getenv("EDGEKV_SIM_CARD");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file)
        return -1;
    size_t length = fread(card->text, 1, sizeof card->text, file);
    fclose(file);
    if (length == 0 || length == sizeof card->text)
        return -1;
    card->text[length] = '\0';
    return 0;
}

static const char *find(const struct card *card, const char *key)
{
    char quoted[64];
    snprintf(quoted, sizeof quoted, "\n\"%s\":", key);
    const char *at = strstr(card->text, quoted);
    return at ? at + strlen(quoted) : "";
}

static double monotonic_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

int card_open(struct card *card)
{
    const struct timespec moment = {0, 2000000};
    for (;;) {
        if (read_file(card))
            return -1;
        /* The clock is the machine's: the writer's time.monotonic() tells the same time. */
        if (monotonic_s() >= strtod(find(card, "hang_until"), NULL))
            return 0;
        nanosleep(&moment, NULL);
    }
}

uint64_t card_number(const struct card *card, const char *key)
{
    return strtoull(find(card, key), NULL, 10);
}

int card_is(const struct card *card, const char *key)
{
    return strncmp(find(card, key), "true", 4) == 0;
}

void card_text(const struct card *card, const char *key, char *to, size_t size)
{
    const char *from = find(card, key);
    from += *from == '"';
    size_t length = strcspn(from, "\"\n");
    snprintf(to, size, "%.*s", (int)length, from);
}

int pci_parse(const char *text, struct pci *to)
{
    return sscanf(text, "%x:%x:%x.%x", &to->domain, &to->bus, &to->device, &to->function) == 4 ? 0 : -1;
}

void card_pci(const struct card *card, struct pci *to)
{
    char text[32];
    card_text(card, "pci_id", text, sizeof text);
    if (pci_parse(text, to))
        memset(to, 0, sizeof *to);
}

static int in_both_lists(const struct card *card, uint32_t pid)
{
    const char *at = find(card, "both_lists");
    const char *end = strchr(at, ']');
    while (end && at < end) {
        char *after;
        unsigned long number = strtoul(at, &after, 10);
        if (after != at && number == pid)
            return 1;
        at = after != at ? after : at + 1;
    }
    return 0;
}

static void read_other(const struct card *card, size_t index, struct process *to)
{
    char key[64], bytes[32];
    snprintf(key, sizeof key, "other.%zu.pid", index);
    to->pid = (uint32_t)card_number(card, key);
    snprintf(key, sizeof key, "other.%zu.name", index);
    card_text(card, key, to->name, sizeof to->name);
    snprintf(key, sizeof key, "other.%zu.bytes", index);
    card_text(card, key, bytes, sizeof bytes);
    int known = card_is(card, "pids_known") && strncmp(bytes, "null", 4) != 0;
    to->num_bytes = known ? strtoull(bytes, NULL, 10) : UINT64_MAX;
}

static size_t add_others(const struct card *card, int computing, struct process *processes, size_t count)
{
    size_t others = (size_t)card_number(card, "others");
    for (size_t i = 0; i < others && count < MOST_PROCESSES; i++) {
        read_other(card, i, &processes[count]);
        count += !computing || in_both_lists(card, processes[count].pid);
    }
    return count;
}

size_t card_computing(const struct card *card, struct process *processes)
{
    size_t count = 0;
    uint64_t own = card_number(card, "own_bytes");
    if (own > 0) {
        uint64_t listed = card_number(card, "listed_pid");
        uint64_t pid = listed ? listed : card_number(card, "own_pid");
        processes[0].pid = pid ? (uint32_t)pid : (uint32_t)getpid();
        processes[0].num_bytes = card_is(card, "pids_known") ? own : UINT64_MAX;
        card_text(card, "own_name", processes[0].name, sizeof processes[0].name);
        count = 1;
    }
    return add_others(card, 1, processes, count);
}

size_t card_drawing(const struct card *card, struct process *processes)
{
    return add_others(card, 0, processes, 0);
}

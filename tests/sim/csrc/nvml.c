/* libnvidia-ml.so.1 with one card that is what the card file says: as much of it as nvidia-ml-py's wrappers of memory,
 * processes and the PCI link call, and a few facts. Layouts and numbers are those of pynvml.py (NVML_ERROR_*, c_nvmlMemory_v2_t, ...). */
#include "card.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

enum status {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
    ARGUMENT_VERSION_MISMATCH = 25
};

struct memory {
    unsigned long long total, free, used;
};

struct memory_v2 {
    unsigned version;
    unsigned long long total, reserved, free, used;
};

struct process_info {
    unsigned pid;
    unsigned long long used_gpu_memory;
    unsigned gpu_instance_id, compute_instance_id;
};

struct pci_info {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
};

static atomic_int sessions;
static char the_device; /* its address is the handle */

/* What every call begins with: is the library started, and (device not NULL) can the card be spoken to? */
static enum status begin(struct card *card, const void *device)
{
    if (sessions == 0)
        return UNINITIALIZED;
    if (card_open(card))
        return DRIVER_NOT_LOADED;
    if (!device)
        return SUCCESS;
    if (device != &the_device)
        return INVALID_ARGUMENT;
    return card_is(card, "gone") ? GPU_IS_LOST : SUCCESS;
}

static enum status give_text(const char *text, char *to, unsigned size)
{
    if (strlen(text) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return SUCCESS;
}

enum status nvmlInitWithFlags(unsigned flags)
{
    struct card card;
    (void)flags;
    if (card_open(&card) || card_is(&card, "init_fails"))
        return DRIVER_NOT_LOADED;
    sessions++;
    return SUCCESS;
}

enum status nvmlShutdown(void)
{
    struct card card;
    enum status status = begin(&card, NULL);
    if (status == SUCCESS)
        sessions--;
    return status;
}

const char *nvmlErrorString(enum status status)
{
    return status == SUCCESS ? "The operation was successful" : "An error of the simulated driver";
}

/* A text of the card file; `device` NULL: one about the driver, which a lost card does not hide. */
static enum status give_key(void *device, const char *key, char *to, unsigned size)
{
    struct card card;
    char text[256];
    enum status status = begin(&card, device);
    if (status != SUCCESS)
        return status;
    card_text(&card, key, text, sizeof text);
    return give_text(text, to, size);
}

enum status nvmlSystemGetDriverVersion(char *version, unsigned size)
{
    return give_key(NULL, "driver", version, size);
}

enum status nvmlSystemGetNVMLVersion(char *version, unsigned size)
{
    return give_key(NULL, "library", version, size);
}

enum status nvmlSystemGetProcessName(unsigned pid, char *name, unsigned size)
{
    struct card card;
    struct process processes[2 * MOST_PROCESSES];
    enum status status = begin(&card, NULL);
    if (status != SUCCESS)
        return status;
    size_t count = card_computing(&card, processes);
    count += card_drawing(&card, processes + count);
    for (size_t i = 0; i < count; i++)
        if (processes[i].pid == pid)
            return give_text(processes[i].name, name, size);
    return NOT_FOUND;
}

enum status nvmlDeviceGetCount_v2(unsigned *count)
{
    struct card card;
    enum status status = begin(&card, NULL);
    *count = 1; /* a card that fell off the bus is still counted */
    return status;
}

enum status nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device)
{
    struct card card;
    enum status status = begin(&card, &the_device);
    if (status == SUCCESS && index > 0)
        return INVALID_ARGUMENT;
    *device = &the_device;
    return status;
}

enum status nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, void **device)
{
    struct card card;
    struct pci asked, own;
    enum status status = begin(&card, &the_device);
    if (status != SUCCESS)
        return status;
    if (pci_parse(bus_id, &asked))
        return INVALID_ARGUMENT;
    card_pci(&card, &own);
    if (memcmp(&asked, &own, sizeof own) != 0)
        return NOT_FOUND;
    *device = &the_device;
    return SUCCESS;
}

enum status nvmlDeviceGetName(void *device, char *name, unsigned size)
{
    return give_key(device, "name", name, size);
}

enum status nvmlDeviceGetUUID(void *device, char *uuid, unsigned size)
{
    return give_key(device, "uuid", uuid, size);
}

enum status nvmlDeviceGetPciInfo_v3(void *device, struct pci_info *info)
{
    struct card card;
    struct pci pci;
    enum status status = begin(&card, device);
    if (status != SUCCESS)
        return status;
    card_pci(&card, &pci);
    memset(info, 0, sizeof *info);
    info->domain = pci.domain;
    info->bus = pci.bus;
    info->device = pci.device;
    info->pci_device_id = 0x268410de;
    /* As NVML has it: four digits of the domain in the old place, eight in the new one. */
    snprintf(info->bus_id_legacy, sizeof info->bus_id_legacy, "%04X:%02X:%02X.0", pci.domain & 0xffff, pci.bus & 0xff,
             pci.device & 0xff);
    snprintf(info->bus_id, sizeof info->bus_id, "%08X:%02X:%02X.0", pci.domain, pci.bus, pci.device);
    return SUCCESS;
}

enum status nvmlDeviceGetMemoryInfo(void *device, struct memory *memory)
{
    struct card card;
    enum status status = begin(&card, device);
    if (status != SUCCESS)
        return status;
    memory->total = card_number(&card, "total_bytes");
    memory->used = card_number(&card, "used_bytes"); /* version 1 counts the reserved bytes as used */
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

enum status nvmlDeviceGetMemoryInfo_v2(void *device, struct memory_v2 *memory)
{
    struct card card;
    enum status status = begin(&card, device);
    if (status != SUCCESS)
        return status;
    if (memory->version != (sizeof *memory | 2u << 24))
        return ARGUMENT_VERSION_MISMATCH;
    unsigned long long used = card_number(&card, "used_bytes");
    memory->total = card_number(&card, "total_bytes");
    memory->reserved = card_number(&card, "reserved_bytes");
    memory->used = used > memory->reserved ? used - memory->reserved : 0;
    memory->free = memory->total - used;
    return SUCCESS;
}

static enum status give_processes(const struct process *processes, size_t count, unsigned *room, struct process_info *to)
{
    unsigned had = *room;
    *room = (unsigned)count;
    if (had < count)
        return INSUFFICIENT_SIZE;
    for (size_t i = 0; i < count; i++) {
        /* UINT64_MAX is also what NVML writes where it does not know (WDDM). */
        to[i] = (struct process_info){processes[i].pid, processes[i].num_bytes, ~0u, ~0u};
    }
    return SUCCESS;
}

enum status nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *room, struct process_info *to)
{
    struct card card;
    struct process processes[MOST_PROCESSES];
    enum status status = begin(&card, device);
    return status != SUCCESS ? status : give_processes(processes, card_computing(&card, processes), room, to);
}

enum status nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned *room, struct process_info *to)
{
    struct card card;
    struct process processes[MOST_PROCESSES];
    enum status status = begin(&card, device);
    return status != SUCCESS ? status : give_processes(processes, card_drawing(&card, processes), room, to);
}

/* Version 2 of the lists differs in nothing but its name; drivers before 510 have only that. */
enum status nvmlDeviceGetComputeRunningProcesses_v2(void *device, unsigned *room, struct process_info *to)
{
    return nvmlDeviceGetComputeRunningProcesses_v3(device, room, to);
}

enum status nvmlDeviceGetGraphicsRunningProcesses_v2(void *device, unsigned *room, struct process_info *to)
{
    return nvmlDeviceGetGraphicsRunningProcesses_v3(device, room, to);
}

static enum status give_number(void *device, const char *key, unsigned *to)
{
    struct card card;
    enum status status = begin(&card, device);
    if (status == SUCCESS)
        *to = (unsigned)card_number(&card, key);
    return status;
}

enum status nvmlDeviceGetCurrPcieLinkGeneration(void *device, unsigned *generation)
{
    return give_number(device, "pcie_generation", generation);
}

enum status nvmlDeviceGetMaxPcieLinkGeneration(void *device, unsigned *generation)
{
    return give_number(device, "pcie_generation", generation);
}

enum status nvmlDeviceGetCurrPcieLinkWidth(void *device, unsigned *width)
{
    return give_number(device, "pcie_width", width);
}

enum status nvmlDeviceGetMaxPcieLinkWidth(void *device, unsigned *width)
{
    return give_number(device, "pcie_width", width);
}

enum status nvmlDeviceGetPcieThroughput(void *device, unsigned counter, unsigned *kb_per_s)
{
    return give_number(device, counter == 0 ? "pcie_sent_kb_s" : "pcie_received_kb_s", kb_per_s);
}

enum status nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor)
{
    unsigned capability = 0;
    enum status status = give_number(device, "compute_capability", &capability);
    *major = (int)capability / 10;
    *minor = (int)capability % 10;
    return status;
}

enum status nvmlDeviceGetMemoryBusWidth(void *device, unsigned *bits)
{
    return give_number(device, "memory_bus_bits", bits);
}

enum status nvmlDeviceGetMaxClockInfo(void *device, unsigned type, unsigned *mhz)
{
    const unsigned memory = 2;
    return type == memory ? give_number(device, "memory_clock_mhz", mhz) : NOT_SUPPORTED;
}

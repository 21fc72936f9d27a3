/* libamd_smi.so with one card that is what the card file says. The functions not here are stubs that build.py writes:
 * amdsmi's Python binding looks all of them up when it is imported. Layouts are those of amdsmi_wrapper.py, which
 * tests/unit/smi/test_bindings.py holds against `sim_layout`. */
#include "card.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

typedef enum {
    SUCCESS = 0,
    INVAL = 1,
    NOT_SUPPORTED = 2,
    OUT_OF_RESOURCES = 15,
    NOT_FOUND = 31,
    NOT_INIT = 32,
    DRIVER_NOT_LOADED = 34
} status_t;

enum { PROCESSOR_AMD_GPU = 1, VRAM_DDR5 = 13, VRAM_GDDR6 = 22, MEMORY_VRAM = 0, MEMORY_VIS_VRAM = 1, MEMORY_GTT = 2 };

struct vram_usage {
    uint32_t vram_total, vram_used; /* MiB */
    uint32_t reserved[2];
};

struct asic_info {
    char market_name[256];
    uint32_t vendor_id;
    char vendor_name[256];
    uint32_t subvendor_id;
    uint64_t device_id;
    uint32_t rev_id;
    char asic_serial[256];
    uint32_t oam_id, num_of_compute_units;
    uint64_t target_graphics_version;
    uint32_t subsystem_id;
    uint32_t reserved[21];
};

struct driver_info {
    char driver_version[256], driver_date[256], driver_name[256];
};

struct vram_info {
    uint32_t vram_type;
    char vram_vendor[256];
    uint64_t vram_size; /* MiB */
    uint32_t vram_bit_width;
    uint64_t vram_max_bandwidth;
    uint64_t reserved[37];
};

struct engine_usage {
    uint64_t gfx, enc;
    uint32_t reserved[12];
};

struct memory_usage {
    uint64_t gtt_mem, cpu_mem, vram_mem;
    uint32_t reserved[10];
};

struct proc_info {
    char name[256];
    uint32_t pid;
    uint64_t mem;
    struct engine_usage engine_usage;
    struct memory_usage memory_usage;
    char container_name[256];
    uint32_t cu_occupancy;
    uint32_t reserved[11];
};

struct version {
    uint32_t major, minor, release;
    const char *build;
};

/* What the compiler made of the above: `struct.field offset` lines, and `struct size`. */
const char *sim_layout(void)
{
    static char text[4096];
    size_t at = 0;
#define FIELD(type, field) \
    at += (size_t)snprintf(text + at, sizeof text - at, "%s.%s %zu\n", #type, #field, offsetof(struct type, field))
#define SIZE(type) at += (size_t)snprintf(text + at, sizeof text - at, "%s %zu\n", #type, sizeof(struct type))
    FIELD(vram_usage, vram_total);
    FIELD(vram_usage, vram_used);
    SIZE(vram_usage);
    FIELD(asic_info, market_name);
    FIELD(asic_info, vendor_id);
    FIELD(asic_info, vendor_name);
    FIELD(asic_info, device_id);
    FIELD(asic_info, asic_serial);
    FIELD(asic_info, oam_id);
    FIELD(asic_info, num_of_compute_units);
    FIELD(asic_info, target_graphics_version);
    SIZE(asic_info);
    FIELD(driver_info, driver_version);
    FIELD(driver_info, driver_name);
    SIZE(driver_info);
    FIELD(vram_info, vram_type);
    FIELD(vram_info, vram_vendor);
    FIELD(vram_info, vram_size);
    FIELD(vram_info, vram_bit_width);
    FIELD(vram_info, vram_max_bandwidth);
    SIZE(vram_info);
    FIELD(proc_info, name);
    FIELD(proc_info, pid);
    FIELD(proc_info, mem);
    FIELD(proc_info, engine_usage);
    FIELD(proc_info, memory_usage);
    FIELD(proc_info, cu_occupancy);
    SIZE(proc_info);
    FIELD(version, release);
    FIELD(version, build);
    SIZE(version);
    return text;
}

static atomic_int sessions;
static char the_socket, the_card; /* their addresses are the handles */

static status_t begin(struct card *card)
{
    if (sessions == 0)
        return NOT_INIT;
    return card_open(card) ? DRIVER_NOT_LOADED : SUCCESS;
}

/* What every call about the card begins with. */
static status_t begin_card(struct card *card, const void *handle)
{
    status_t status = begin(card);
    if (status != SUCCESS)
        return status;
    if (handle != &the_card)
        return INVAL;
    return card_is(card, "gone") ? NOT_FOUND : SUCCESS;
}

static int is_apu(const struct card *card)
{
    char vendor[16];
    card_text(card, "vendor", vendor, sizeof vendor);
    return strcmp(vendor, "amd-apu") == 0;
}

status_t amdsmi_init(uint64_t flags)
{
    struct card card;
    (void)flags;
    if (card_open(&card) || card_is(&card, "init_fails"))
        return DRIVER_NOT_LOADED;
    sessions++;
    return SUCCESS;
}

status_t amdsmi_shut_down(void)
{
    struct card card;
    status_t status = begin(&card);
    if (status == SUCCESS)
        sessions--;
    return status;
}

status_t amdsmi_status_code_to_string(status_t status, const char **text)
{
    *text = status == SUCCESS ? "AMDSMI_STATUS_SUCCESS" : "an error of the simulated driver";
    return SUCCESS;
}

status_t amdsmi_get_lib_version(struct version *version)
{
    struct card card;
    char text[64];
    status_t status = begin(&card);
    if (status != SUCCESS)
        return status;
    memset(version, 0, sizeof *version);
    card_text(&card, "library", text, sizeof text);
    sscanf(text, "%u.%u.%u", &version->major, &version->minor, &version->release);
    version->build = "s";
    return SUCCESS;
}

/* One handle; a caller without room is told the number first. */
static status_t give_handle(uint32_t *count, void **handles, void *handle)
{
    if (handles && *count < 1)
        return OUT_OF_RESOURCES;
    if (handles)
        handles[0] = handle;
    *count = 1;
    return SUCCESS;
}

status_t amdsmi_get_socket_handles(uint32_t *count, void **sockets)
{
    struct card card;
    status_t status = begin(&card);
    return status != SUCCESS ? status : give_handle(count, sockets, &the_socket);
}

status_t amdsmi_get_processor_handles(void *socket, uint32_t *count, void **processors)
{
    struct card card;
    status_t status = begin(&card);
    if (status != SUCCESS)
        return status;
    return socket != &the_socket ? INVAL : give_handle(count, processors, &the_card);
}

static uint64_t bdf(const struct card *card)
{
    struct pci pci;
    card_pci(card, &pci);
    /* Bit fields, from the lowest: function 3, device 5, bus 8, domain 48. */
    return pci.function | (uint64_t)pci.device << 3 | (uint64_t)pci.bus << 8 | (uint64_t)pci.domain << 16;
}

status_t amdsmi_get_processor_handle_from_bdf(uint64_t asked, void **processor)
{
    struct card card;
    status_t status = begin_card(&card, &the_card);
    if (status != SUCCESS)
        return status;
    *processor = &the_card;
    return asked == bdf(&card) ? SUCCESS : NOT_FOUND;
}

status_t amdsmi_get_processor_type(void *processor, uint32_t *type)
{
    struct card card;
    *type = PROCESSOR_AMD_GPU; /* an APU's graphics are a GPU too */
    return begin_card(&card, processor);
}

status_t amdsmi_get_gpu_device_bdf(void *processor, uint64_t *to)
{
    struct card card;
    status_t status = begin_card(&card, processor);
    if (status == SUCCESS)
        *to = bdf(&card);
    return status;
}

static uint64_t vram(const struct card *card, int used)
{
    if (is_apu(card)) /* only the carve-out is VRAM there */
        return card_number(card, used ? "carveout_used_bytes" : "carveout_bytes");
    return card_number(card, used ? "used_bytes" : "total_bytes");
}

static status_t memory(void *processor, uint32_t type, int used, uint64_t *to)
{
    struct card card;
    status_t status = begin_card(&card, processor);
    if (status != SUCCESS)
        return status;
    if (type == MEMORY_VRAM || type == MEMORY_VIS_VRAM)
        *to = vram(&card, used);
    else if (type == MEMORY_GTT)
        *to = card_number(&card, used ? "gtt_used_bytes" : "gtt_total_bytes");
    else
        return INVAL;
    return SUCCESS;
}

status_t amdsmi_get_gpu_memory_total(void *processor, uint32_t type, uint64_t *total)
{
    return memory(processor, type, 0, total);
}

status_t amdsmi_get_gpu_memory_usage(void *processor, uint32_t type, uint64_t *used)
{
    return memory(processor, type, 1, used);
}

status_t amdsmi_get_gpu_vram_usage(void *processor, struct vram_usage *usage)
{
    struct card card;
    status_t status = begin_card(&card, processor);
    if (status != SUCCESS)
        return status;
    memset(usage, 0, sizeof *usage);
    usage->vram_total = (uint32_t)(vram(&card, 0) >> 20);
    usage->vram_used = (uint32_t)(vram(&card, 1) >> 20);
    return SUCCESS;
}

status_t amdsmi_get_gpu_vram_info(void *processor, struct vram_info *info)
{
    struct card card;
    status_t status = begin_card(&card, processor);
    if (status != SUCCESS)
        return status;
    memset(info, 0, sizeof *info);
    info->vram_type = is_apu(&card) ? VRAM_DDR5 : VRAM_GDDR6;
    strcpy(info->vram_vendor, is_apu(&card) ? "UNKNOWN" : "SAMSUNG");
    info->vram_size = vram(&card, 0) >> 20;
    info->vram_bit_width = 256;
    info->vram_max_bandwidth = UINT64_MAX; /* not known */
    return SUCCESS;
}

status_t amdsmi_get_gpu_asic_info(void *processor, struct asic_info *info)
{
    struct card card;
    status_t status = begin_card(&card, processor);
    if (status != SUCCESS)
        return status;
    memset(info, 0, sizeof *info);
    card_text(&card, "name", info->market_name, sizeof info->market_name);
    info->vendor_id = 0x1002;
    strcpy(info->vendor_name, "Advanced Micro Devices Inc. [AMD/ATI]");
    info->device_id = 0x744c;
    strcpy(info->asic_serial, "0x00000000DEADBEEF");
    info->oam_id = UINT32_MAX;
    info->num_of_compute_units = 96;
    info->target_graphics_version = is_apu(&card) ? 0x1151 : 0x1100;
    return SUCCESS;
}

status_t amdsmi_get_gpu_driver_info(void *processor, struct driver_info *info)
{
    struct card card;
    status_t status = begin_card(&card, processor);
    if (status != SUCCESS)
        return status;
    memset(info, 0, sizeof *info);
    strcpy(info->driver_name, "amdgpu");
    card_text(&card, "driver", info->driver_version, sizeof info->driver_version);
    return SUCCESS;
}

/* As the real one, this lists who computes (KFD's processes): a game is not among them. */
status_t amdsmi_get_gpu_process_list(void *processor, uint32_t *room, struct proc_info *list)
{
    struct card card;
    struct process processes[MOST_PROCESSES];
    status_t status = begin_card(&card, processor);
    if (status != SUCCESS)
        return status;
    uint32_t count = (uint32_t)card_computing(&card, processes), had = *room;
    *room = count;
    if (had == 0)
        return SUCCESS;
    int apu = is_apu(&card);
    for (uint32_t i = 0; i < count && i < had; i++) {
        memset(&list[i], 0, sizeof list[i]);
        strcpy(list[i].name, processes[i].name);
        list[i].pid = processes[i].pid;
        list[i].mem = processes[i].num_bytes;
        *(apu ? &list[i].memory_usage.gtt_mem : &list[i].memory_usage.vram_mem) = processes[i].num_bytes;
        list[i].cu_occupancy = UINT32_MAX;
    }
    return had < count ? OUT_OF_RESOURCES : SUCCESS;
}

/* A stand-in for NVIDIA's libnvidia-ml.so.1 with three cards: a whole one, one split in two, and one that is lost. The
   instances of the second are the first and the third of four that it could have. Handles are pointers into `units`. */

#include <stdio.h>
#include <stdlib.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15 };

struct unit {
    const char *uuid, *name;
    unsigned long long total, used;
};
struct memory {
    unsigned long long total, free, used;
};

static const struct unit units[] = {
    {"GPU-5d5ba0d6", "NVIDIA A100-SXM4-40GB", 40960ULL << 20, 1024ULL << 20},
    {"GPU-1c2d3e4f", "NVIDIA A100-SXM4-40GB", 40960ULL << 20, 0},
    {"MIG-c7384736", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20096ULL << 20, 0}, /* its memory is not told */
    {"MIG-a28ad590", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20096ULL << 20, 20ULL << 20},
};
static const struct unit *const cards = units, *const split = units + 1, *const instances = units + 2;

int nvmlInitWithFlags(unsigned flags) {
    return flags == 0 && getenv("FAKE_NVML_WITHOUT_DRIVER") == NULL ? SUCCESS : DRIVER_NOT_LOADED;
}

int nvmlShutdown(void) { return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = 3;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, const struct unit **handle) {
    *handle = cards + index;
    return index < 2 ? SUCCESS : GPU_IS_LOST;
}

int nvmlDeviceGetMigMode(const struct unit *card, unsigned *current, unsigned *pending) {
    *current = *pending = 1;
    return card == split ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetMaxMigDeviceCount(const struct unit *card, unsigned *count) {
    *count = card == split ? 4 : 0;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(const struct unit *card, unsigned index, const struct unit **handle) {
    *handle = instances + index / 2;
    return card == split && index % 2 == 0 ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceGetUUID(const struct unit *unit, char *text, unsigned size) {
    snprintf(text, size, "%s", unit->uuid);
    return SUCCESS;
}

int nvmlDeviceGetName(const struct unit *unit, char *text, unsigned size) {
    snprintf(text, size, "%s", unit->name);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(const struct unit *unit, struct memory *memory) {
    *memory = (struct memory){unit->total, unit->total - unit->used, unit->used};
    return unit == instances ? NOT_SUPPORTED : SUCCESS;
}

// Stand-in for libnvidia-ml.so.1 and libcuda.so.1: what fastrl asks them, answered from the text file $NVML_STANDIN.
//
// Its lines: "KEY VALUE" (cards, driver), "CARD KEY VALUE" (used, total, millijoules, milliwatts, busy, sm_mhz, top_sm_mhz,
// reasons, partition), "CARD process PID BYTES" (PID 0: whoever asks), "FUNCTION fails CODE", "name PID COMMAND".
// What a card has no line for it does not support.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9 };
typedef unsigned long long u64;
typedef struct { unsigned version; u64 total, reserved, free, used; } Memory;
typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } Process;
typedef struct { unsigned gpu, memory; } Rates;

static int cards[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The rest of the n-th line that begins with `start` and a blank into out[size]; 0 if there is none.
static int line(const char* start, int n, char* out, size_t size) {
  const char* path = getenv("NVML_STANDIN");
  FILE* file = path ? fopen(path, "r") : NULL;
  char text[512];
  int found = 0;
  while (file && !found && fgets(text, sizeof text, file)) {
    size_t length = strlen(start);
    if (strncmp(text, start, length) == 0 && text[length] == ' ' && n-- == 0) {
      text[strcspn(text, "\n")] = 0;
      snprintf(out, size, "%s", text + length + 1);
      found = 1;
    }
  }
  if (file) fclose(file);
  return found;
}

static int fails(const char* function) {
  char start[128], text[512];
  snprintf(start, sizeof start, "%s fails", function);
  return line(start, 0, text, sizeof text) ? atoi(text) : SUCCESS;
}

static int number(int card, const char* key, u64* out) {
  char start[128], text[512];
  snprintf(start, sizeof start, "%d %s", card, key);
  if (!line(start, 0, text, sizeof text)) return NOT_SUPPORTED;
  *out = strtoull(text, NULL, 10);
  return SUCCESS;
}

static int count(void) {
  char text[512];
  return line("cards", 0, text, sizeof text) ? atoi(text) : 0;
}

#define CHECK(code) do { int c_ = (code); if (c_) return c_; } while (0)
#define GIVES(function, type, key)               \
  int function(int* card, type* out) {           \
    u64 value;                                   \
    CHECK(fails(#function));                     \
    CHECK(number(*card, key, &value));           \
    *out = (type)value;                          \
    return SUCCESS;                              \
  }

int nvmlInitWithFlags(unsigned flags) {
  (void)flags;
  return getenv("NVML_STANDIN") ? fails("nvmlInitWithFlags") : DRIVER_NOT_LOADED;
}
int nvmlShutdown(void) { return SUCCESS; }
const char* nvmlErrorString(int code) { return code == 15 ? "GPU is lost" : "an error of the stand-in"; }

int nvmlSystemGetDriverVersion(char* out, unsigned size) {
  return line("driver", 0, out, size) ? SUCCESS : NOT_SUPPORTED;
}

int nvmlSystemGetProcessName(unsigned pid, char* out, unsigned size) {
  char start[64];
  snprintf(start, sizeof start, "name %u", pid);
  return line(start, 0, out, size) ? SUCCESS : NOT_FOUND;
}

// UUIDs are those of cuDeviceGetUuid_v2 below: all zeros but for the card's number
int nvmlDeviceGetHandleByUUID(const char* uuid, int** out) {
  for (int card = 0; card < count(); card++) {
    char own[64];
    u64 partition = 0;
    number(card, "partition", &partition);
    snprintf(own, sizeof own, "%s-00000000-0000-0000-0000-%012x", partition ? "MIG" : "GPU", card);
    *out = &cards[card];
    if (strcmp(uuid, own) == 0) return SUCCESS;
  }
  return NOT_FOUND;
}

int nvmlDeviceGetName(int* card, char* out, unsigned size) {
  snprintf(out, size, "Stand-in %d", *card);
  return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(int* card, Memory* out) {
  CHECK(fails("nvmlDeviceGetMemoryInfo_v2"));
  CHECK(number(*card, "total", &out->total));
  return number(*card, "used", &out->used);
}

int nvmlDeviceGetComputeRunningProcesses_v3(int* card, unsigned* size, Process* out) {
  char start[64], text[512];
  unsigned found = 0;
  CHECK(fails("nvmlDeviceGetComputeRunningProcesses_v3"));
  snprintf(start, sizeof start, "%d process", *card);
  for (; line(start, found, text, sizeof text); found++) {
    if (found < *size && out) {
      char* rest;
      unsigned pid = strtoul(text, &rest, 10);
      out[found] = (Process){pid ? pid : (unsigned)getpid(), strtoull(rest, NULL, 10), -1, -1};
    }
  }
  int fits = found <= *size;
  *size = found;
  return fits ? SUCCESS : INSUFFICIENT_SIZE;
}

GIVES(nvmlDeviceGetTotalEnergyConsumption, u64, "millijoules")
GIVES(nvmlDeviceGetPowerUsage, unsigned, "milliwatts")
GIVES(nvmlDeviceGetCurrentClocksEventReasons, u64, "reasons")

int nvmlDeviceGetUtilizationRates(int* card, Rates* out) {
  u64 value;
  CHECK(number(*card, "busy", &value));
  *out = (Rates){(unsigned)value, 0};
  return SUCCESS;
}

static int clock_of(int* card, const char* key, int kind, unsigned* out) {
  u64 value;
  CHECK(kind == 1 ? SUCCESS : NOT_SUPPORTED);  // of the streaming multiprocessors alone
  CHECK(number(*card, key, &value));
  *out = (unsigned)value;
  return SUCCESS;
}
int nvmlDeviceGetClockInfo(int* card, int kind, unsigned* out) { return clock_of(card, "sm_mhz", kind, out); }
int nvmlDeviceGetMaxClockInfo(int* card, int kind, unsigned* out) { return clock_of(card, "top_sm_mhz", kind, out); }

// The device's number in CUDA, through CUDA_VISIBLE_DEVICES with numbers of cards.
static int visible(int index) {
  const char* names = getenv("CUDA_VISIBLE_DEVICES");
  if (!names) return index < count() ? index : -1;
  for (; names && *names; names = strchr(names, ','), names += names != NULL)
    if (index-- == 0) return atoi(names);
  return -1;
}

int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int* out, int index) { return (*out = visible(index)) < 0 ? 101 : 0; }
int cuDeviceGetCount(int* out) {
  for (*out = 0; visible(*out) >= 0; ++*out) {}
  return 0;
}
int cuDeviceGetUuid_v2(char* out, int device) {
  memset(out, 0, 16);
  out[15] = (char)device;
  return 0;
}

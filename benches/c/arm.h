/* What C programs that measure calls of the kernels have in common: `caller.c`, `families.c` and `attention.c`. Needs no CUDA
 * headers: what is used of CUDA is declared here. Each program includes it once.
 *
 *     FLASHINFER_RS_LIB_DIR=… ./a.out ARM
 *
 * prints `ready`, then answers each line of standard input with one line: a number, `-` where this arm does not have that
 * case, or `error TEXT`, after which it ends. */
#ifndef FLASHINFER_RS_ARM_H
#define FLASHINFER_RS_ARM_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tvm_ffi.h"

enum { BATCHES = 15, FIRST = 5 };
/* How often a graph is timed, and how long a timed run of it should last. */
enum { TIMINGS = 5 };
static const double TIMED_NS = 10e6;

/* ---- errors ---- */

/* Ends this program: after an error of CUDA no later figure is worth anything. */
__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...) {
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    for (char *c = text; *c; c++)
        if (*c == '\n' || *c == '\r') *c = ' ';
    printf("error %s\n", text);
    fflush(stdout);
    exit(1);
}

/* ---- CUDA ---- */

typedef void *stream_t;
typedef void *event_t;
typedef void *graph_t;
typedef void *graph_exec_t;
enum { COPY_TO_DEVICE = 1, COPY_ON_DEVICE = 3, STREAM_NON_BLOCKING = 1, CAPTURE_THREAD_LOCAL = 1, ATTRIBUTE_L2 = 38 };

static struct {
    const char *(*error)(int);
    int (*set_device)(int);
    int (*malloc)(void **, size_t);
    int (*free)(void *);
    int (*memset)(void *, int, size_t);
    int (*memcpy)(void *, const void *, size_t, int);
    int (*memcpy_async)(void *, const void *, size_t, int, stream_t);
    int (*attribute)(int *, int, int);
    int (*stream_create)(stream_t *, unsigned);
    int (*stream_wait)(stream_t);
    int (*device_wait)(void);
    int (*capture_begin)(stream_t, int);
    int (*capture_end)(stream_t, graph_t *);
    int (*instantiate)(graph_exec_t *, graph_t, unsigned long long);
    int (*graph_launch)(graph_exec_t, stream_t);
    int (*graph_exec_destroy)(graph_exec_t);
    int (*graph_destroy)(graph_t);
    int (*event_create)(event_t *);
    int (*event_record)(event_t, stream_t);
    int (*event_wait)(event_t);
    int (*event_elapsed)(float *, event_t, event_t);
} cuda;

static struct {
    int (*load)(void **, const void *);
    int (*function)(void **, void *, const char *);
    int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, stream_t, void **,
                  void **);
} driver;

static struct {
    int (*set_stream)(int32_t, int32_t, stream_t, stream_t *);
    void (*take_error)(void **);
} ffi;

#define CUDA(call) cuda_check((call), #call)

static void cuda_check(int code, const char *call) {
    if (code != 0) fail("%s: CUDA error %d, %s", call, code, cuda.error(code));
}

struct symbol {
    void **place;
    const char *name;
};

static void *open_library(const char *folder, const char *name, int flags) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    void *library = dlopen(path, RTLD_NOW | flags);
    if (library == NULL) fail("%s; the libraries are looked for in FLASHINFER_RS_LIB_DIR", dlerror());
    return library;
}

static void find(void *library, const struct symbol *symbols, size_t count) {
    for (size_t i = 0; i < count; i++) {
        *symbols[i].place = dlsym(library, symbols[i].name);
        if (*symbols[i].place == NULL) fail("%s", dlerror());
    }
}

#define FIND(library, ...)                                                                     \
    do {                                                                                       \
        const struct symbol symbols[] = {__VA_ARGS__};                                         \
        find((library), symbols, sizeof symbols / sizeof symbols[0]);                          \
    } while (0)
#define SYMBOL(pointer, name) {(void **)&(pointer), (name)}

/* libtvm_ffi.so goes first and is global: the kernels look for its functions among what is loaded. Answers the folder with
 * the libraries. */
static const char *load(void) {
    const char *folder = getenv("FLASHINFER_RS_LIB_DIR");
    if (folder == NULL) fail("FLASHINFER_RS_LIB_DIR is not set; expected the folder with libtvm_ffi.so and the kernels");
    void *libcuda = dlopen("libcuda.so.1", RTLD_NOW);
    if (libcuda == NULL) fail("there is no NVIDIA driver: %s", dlerror());
    void *tvm_ffi = open_library(folder, "libtvm_ffi.so", RTLD_GLOBAL);
    void *cudart = open_library(folder, "libcudart.so.13", RTLD_LOCAL);
    FIND(libcuda, SYMBOL(driver.load, "cuModuleLoadData"), SYMBOL(driver.function, "cuModuleGetFunction"),
         SYMBOL(driver.launch, "cuLaunchKernel"));
    FIND(tvm_ffi, SYMBOL(ffi.set_stream, "TVMFFIEnvSetStream"), SYMBOL(ffi.take_error, "TVMFFIErrorMoveFromRaised"));
    FIND(cudart, SYMBOL(cuda.error, "cudaGetErrorString"), SYMBOL(cuda.set_device, "cudaSetDevice"),
         SYMBOL(cuda.malloc, "cudaMalloc"), SYMBOL(cuda.free, "cudaFree"), SYMBOL(cuda.memset, "cudaMemset"),
         SYMBOL(cuda.memcpy, "cudaMemcpy"), SYMBOL(cuda.memcpy_async, "cudaMemcpyAsync"),
         SYMBOL(cuda.attribute, "cudaDeviceGetAttribute"), SYMBOL(cuda.stream_create, "cudaStreamCreateWithFlags"),
         SYMBOL(cuda.stream_wait, "cudaStreamSynchronize"), SYMBOL(cuda.device_wait, "cudaDeviceSynchronize"),
         SYMBOL(cuda.capture_begin, "cudaStreamBeginCapture"), SYMBOL(cuda.capture_end, "cudaStreamEndCapture"),
         SYMBOL(cuda.instantiate, "cudaGraphInstantiate"), SYMBOL(cuda.graph_launch, "cudaGraphLaunch"),
         SYMBOL(cuda.graph_exec_destroy, "cudaGraphExecDestroy"), SYMBOL(cuda.graph_destroy, "cudaGraphDestroy"),
         SYMBOL(cuda.event_create, "cudaEventCreate"), SYMBOL(cuda.event_record, "cudaEventRecord"),
         SYMBOL(cuda.event_wait, "cudaEventSynchronize"), SYMBOL(cuda.event_elapsed, "cudaEventElapsedTime"));
    return folder;
}

static function *find_kernel(const char *folder, const char *library, const char *symbol) {
    function *kernel = NULL;
    FIND(open_library(folder, library, RTLD_LOCAL), SYMBOL(kernel, symbol));
    return kernel;
}

/* ---- calling ---- */

static stream_t stream;

/* What a kernel raised: an error object with kind at 24 and message at 40, each a pointer and a length. */
__attribute__((noreturn, cold)) static void raised(const char *name, int code) {
    struct bytes {
        const char *data;
        size_t size;
    };
    void *error = NULL;
    if (code == -1) ffi.take_error(&error);
    if (error == NULL) fail("%s answered %d", name, code);
    const struct bytes *kind = (const void *)((const char *)error + 24), *message = kind + 1;
    fail("%s: %.*s: %.*s", name, (int)kind->size, kind->data, (int)message->size, message->data);
}

static void use_stream(stream_t to, stream_t *previous) {
    int code = ffi.set_stream(DEVICE_CUDA, 0, to, previous);
    if (code != 0) raised("TVMFFIEnvSetStream", code);
}

/* Packed once, called often. It points into itself, so it must stay where it is. */
struct packed {
    function *function;
    const char *name;
    int32_t count;
    struct dltensor views[17];
    struct any args[27];
};

static void call(const struct packed *it) {
    struct any result = none();
    int code = it->function(NULL, it->args, it->count, &result);
    if (code != 0) raised(it->name, code);
}

/* ---- memory ---- */

/* Device memory that grows and is used again by every request; it is carved from the start. */
struct pool {
    char *base;
    size_t size, used;
    /* What it is full of: zeros, random bf16 in (-low, low), which makes heads of 128 about unit vectors, uniform f32 between
     * low and high, about normal f32, or bytes of 0 and 1. */
    enum { EMPTY, RANDOM_BF16, RANDOM_F32, NORMAL_F32, RANDOM_BITS } content;
    float low, high;
};

static size_t aligned(size_t bytes) {
    return (bytes + 255) & ~(size_t)255;
}

/* Uniform in (0, 1). */
static float uniform(void) {
    static uint64_t state = 0x9e3779b97f4a7c15u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return ((float)(state >> 41) + 0.5f) / (float)(1 << 23);
}

/* Of variance 1: the sum of twelve that are uniform. */
static float normal(void) {
    float sum = -6.0f;
    for (int i = 0; i < 12; i++) sum += uniform();
    return sum;
}

static void fill(struct pool *pool) {
    if (pool->content == EMPTY) {
        CUDA(cuda.memset(pool->base, 0, pool->size));
        return;
    }
    size_t block = pool->size < (size_t)(16 << 20) ? pool->size : (size_t)(16 << 20);
    char *host = malloc(block);
    if (host == NULL) fail("no memory for %zu bytes", block);
    if (pool->content == RANDOM_BF16)
        for (size_t i = 0; i < block / 2; i++) {
            float value = pool->low * (2.0f * uniform() - 1.0f);
            memcpy(host + 2 * i, (char *)&value + 2, 2);
        }
    else if (pool->content == RANDOM_BITS)
        for (size_t i = 0; i < block; i++) host[i] = uniform() < 0.5f;
    else
        for (size_t i = 0; i < block / 4; i++) {
            float value = pool->content == RANDOM_F32 ? pool->low + (pool->high - pool->low) * uniform() : normal();
            memcpy(host + 4 * i, &value, 4);
        }
    CUDA(cuda.memcpy(pool->base, host, block, COPY_TO_DEVICE));
    free(host);
    for (size_t done = block; done < pool->size; done += block) {
        size_t rest = pool->size - done;
        CUDA(cuda.memcpy(pool->base + done, pool->base, rest < block ? rest : block, COPY_ON_DEVICE));
    }
}

/* Makes room for a request and starts carving anew. */
static void reserve(struct pool *pool, size_t bytes) {
    pool->used = 0;
    if (bytes > pool->size) {
        CUDA(cuda.device_wait());
        CUDA(cuda.free(pool->base));
        void *base = NULL;
        CUDA(cuda.malloc(&base, bytes));
        pool->base = base;
        pool->size = bytes;
        fill(pool);
        CUDA(cuda.device_wait());
    }
}

static void *carve(struct pool *pool, size_t bytes) {
    char *place = pool->base + pool->used;
    pool->used += aligned(bytes);
    if (pool->used > pool->size) fail("carved %zu of %zu bytes: the request was measured wrongly", pool->used, pool->size);
    return place;
}

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (memory == NULL) fail("no memory for %zu times %zu bytes", count, size);
    return memory;
}

/* ---- measuring ---- */

static double now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return 1e9 * (double)time.tv_sec + (double)time.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

static double median(double *values, size_t count) {
    qsort(values, count, sizeof *values, ascending);
    return count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

/* What is measured: launch number `i` of something, on `stream`. */
typedef void launcher(const void *context, size_t i);

/* Nanoseconds of host time per launch: batches from an idle GPU, short enough for the launch queue; the FIRST warm up. */
static double host_ns(launcher *launch, const void *context, size_t batch) {
    double values[FIRST + BATCHES];
    for (size_t i = 0; i < FIRST + BATCHES; i++) {
        CUDA(cuda.stream_wait(stream));
        double start = now_ns();
        for (size_t j = 0; j < batch; j++) launch(context, j);
        values[i] = (now_ns() - start) / (double)batch;
    }
    CUDA(cuda.stream_wait(stream));
    return median(values + FIRST, BATCHES);
}

static graph_exec_t capture(launcher *launch, const void *context, size_t count) {
    graph_t graph = NULL;
    graph_exec_t exec = NULL;
    CUDA(cuda.capture_begin(stream, CAPTURE_THREAD_LOCAL));
    for (size_t i = 0; i < count; i++) launch(context, i);
    CUDA(cuda.capture_end(stream, &graph));
    CUDA(cuda.instantiate(&exec, graph, 0));
    CUDA(cuda.graph_destroy(graph));
    CUDA(cuda.graph_launch(exec, stream));
    CUDA(cuda.stream_wait(stream));
    return exec;
}

/* Nanoseconds of GPU time per launch: a graph of so many, replayed, between two events. */
static double gpu_ns(launcher *launch, const void *context, size_t nodes) {
    static event_t start = NULL, end = NULL;
    if (start == NULL) {
        CUDA(cuda.event_create(&start));
        CUDA(cuda.event_create(&end));
    }
    launch(context, 0);
    CUDA(cuda.stream_wait(stream));
    graph_exec_t exec = capture(launch, context, nodes);
    double values[TIMINGS];
    size_t replays = 1;
    /* The first timing says how many replays the others take. */
    for (size_t i = 0; i <= TIMINGS; i++) {
        float ms = 0;
        CUDA(cuda.event_record(start, stream));
        for (size_t j = 0; j < replays; j++) CUDA(cuda.graph_launch(exec, stream));
        CUDA(cuda.event_record(end, stream));
        CUDA(cuda.event_wait(end));
        CUDA(cuda.event_elapsed(&ms, start, end));
        double ns = 1e6 * (double)ms;
        if (i > 0) values[i - 1] = ns / (double)(replays * nodes);
        else if (ns > 0) replays = 1 + (size_t)(TIMED_NS / ns);
    }
    CUDA(cuda.graph_exec_destroy(exec));
    return median(values, TIMINGS);
}

/* ---- requests ---- */

/* Whether the numbers of a request are there, are all of it, and are positive. */
static bool numbers(const char *text, int64_t *values, int count) {
    for (int i = 0; i < count; i++) {
        char *end = NULL;
        values[i] = strtoll(text, &end, 10);
        if (end == text || values[i] < 1) return false;
        text = end;
    }
    return *text == '\0';
}

static bool starts(const char **text, const char *with) {
    size_t length = strlen(with);
    if (strncmp(*text, with, length) != 0) return false;
    *text += length;
    return true;
}

/* The answer to a request, or a negative number where this arm does not have the case. */
typedef double answerer(const void *arm, const char *request);

/* Says that it is ready, and answers until nobody asks any more. */
static int serve(answerer *answer, const void *arm) {
    printf("ready\n");
    fflush(stdout);
    char *line = NULL;
    size_t capacity = 0;
    while (getline(&line, &capacity, stdin) > 0) {
        line[strcspn(line, "\r\n")] = '\0';
        double value = answer(arm, line);
        if (value < 0) printf("-\n");
        else printf("%.3f\n", value);
        fflush(stdout);
    }
    free(line);
    return 0;
}

#endif

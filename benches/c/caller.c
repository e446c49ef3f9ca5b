/* The kernels called from C, as a measure for calling them from Rust.
 *
 *     cc -O2 caller.c -ldl
 *     FLASHINFER_RS_LIB_DIR=… ./a.out ARM
 *
 * prints `ready`, then answers each line of standard input with one line: a number, `-` where this arm does not have that
 * case, or `error TEXT`, after which it ends. Needs no CUDA headers: what is used of CUDA is declared here.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tvm_ffi.h"

enum { BATCHES = 15, FIRST = 5, GEMMA_BATCH = 200, GDN_BATCH = 50 };
enum { Q_HEADS = 16, K_HEADS = 16, V_HEADS = 32, HEAD = 128, WORKSPACE = 128 << 10 };
/* Bounds on the launches of a captured graph, and how long a timed run of it should last. */
enum { MOST_SETS = 256, LEAST_NODES = 16, TIMINGS = 5 };
static const double TIMED_NS = 10e6;
static const double EPS = 1e-6;

static const struct dtype BF16 = {CODE_BFLOAT, 16, 1}, F32 = {CODE_FLOAT, 32, 1}, I64 = {CODE_INT, 64, 1},
                          U8 = {CODE_UINT, 8, 1};

/* ---- the arms ---- */

struct arm {
    const char *name;
    /* What it is: arguments packed once, programmatic dependent launch, a replayed graph, or none of these. */
    bool packed, pdl, graph;
    /* Answers `host empty` and `gpu copy` only. */
    bool limits;
};

static const struct arm ARMS[] = {
    {"c", false, false, false, false},      {"c-packed", true, false, false, false},
    {"c-pdl", false, true, false, false},   {"c-graph", false, false, true, false},
    {"limits", false, false, false, true},
};

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
    int (*release)(void *);
    function *gemma_rmsnorm, *gdn_prefill;
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

/* libtvm_ffi.so goes first and is global: the kernels look for its functions among what is loaded. */
static void load(void) {
    const char *folder = getenv("FLASHINFER_RS_LIB_DIR");
    if (folder == NULL) fail("FLASHINFER_RS_LIB_DIR is not set; expected the folder with norm.so and libtvm_ffi.so");
    void *libcuda = dlopen("libcuda.so.1", RTLD_NOW);
    if (libcuda == NULL) fail("there is no NVIDIA driver: %s", dlerror());
    void *tvm_ffi = open_library(folder, "libtvm_ffi.so", RTLD_GLOBAL);
    void *cudart = open_library(folder, "libcudart.so.13", RTLD_LOCAL);
    void *norm = open_library(folder, "norm.so", RTLD_LOCAL);
    void *gdn = open_library(folder, "gdn_prefill_sm90.so", RTLD_LOCAL);
    FIND(libcuda, SYMBOL(driver.load, "cuModuleLoadData"), SYMBOL(driver.function, "cuModuleGetFunction"),
         SYMBOL(driver.launch, "cuLaunchKernel"));
    FIND(tvm_ffi, SYMBOL(ffi.set_stream, "TVMFFIEnvSetStream"), SYMBOL(ffi.take_error, "TVMFFIErrorMoveFromRaised"),
         SYMBOL(ffi.release, "TVMFFIObjectDecRef"));
    FIND(norm, SYMBOL(ffi.gemma_rmsnorm, "__tvm_ffi_gemma_rmsnorm"));
    FIND(gdn, SYMBOL(ffi.gdn_prefill, "__tvm_ffi_gdn_prefill"));
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

struct gemma {
    struct tensor out, input, weight;
};

struct gdn {
    struct tensor output, state, q, k, v, cu_seqlens, alpha, beta, workspace;
};

/* Packed once, called often. It points into itself, so it must stay where it is. */
struct packed {
    function *function;
    const char *name;
    int32_t count;
    struct dltensor views[9];
    struct any args[11];
};

/* One call: stream set, everything packed on the stack, stream restored. */
static void gemma_rmsnorm(const struct gemma *it, double eps, bool enable_pdl, stream_t on) {
    stream_t previous = NULL;
    use_stream(on, &previous);
    struct dltensor views[3] = {view(&it->out), view(&it->input), view(&it->weight)};
    struct any args[5] = {pointer_to(&views[0]), pointer_to(&views[1]), pointer_to(&views[2]), number(eps),
                          boolean(enable_pdl)};
    struct any result = none();
    int code = ffi.gemma_rmsnorm(NULL, args, 5, &result);
    use_stream(previous, NULL);
    if (code != 0) raised("gemma_rmsnorm", code);
}

static void gdn_prefill(const struct gdn *it, double scale, stream_t on) {
    stream_t previous = NULL;
    use_stream(on, &previous);
    struct dltensor views[9] = {view(&it->output), view(&it->state),      view(&it->q),
                                view(&it->k),      view(&it->v),          view(&it->cu_seqlens),
                                view(&it->alpha),  view(&it->beta),       view(&it->workspace)};
    struct any args[11] = {pointer_to(&views[0]), pointer_to(&views[1]), pointer_to(&views[2]), pointer_to(&views[3]),
                           pointer_to(&views[4]), pointer_to(&views[5]), none(),                pointer_to(&views[6]),
                           pointer_to(&views[7]), number(scale),         pointer_to(&views[8])};
    struct any result = none();
    int code = ffi.gdn_prefill(NULL, args, 11, &result);
    use_stream(previous, NULL);
    if (code != 0) raised("gdn_prefill", code);
}

static void call(const struct packed *it) {
    struct any result = none();
    int code = it->function(NULL, it->args, it->count, &result);
    if (code != 0) raised(it->name, code);
}

static void pack_gemma(struct packed *to, const struct gemma *it, bool enable_pdl) {
    const struct tensor *tensors[3] = {&it->out, &it->input, &it->weight};
    *to = (struct packed){.function = ffi.gemma_rmsnorm, .name = "gemma_rmsnorm", .count = 5};
    for (int i = 0; i < 3; i++) {
        to->views[i] = view(tensors[i]);
        to->args[i] = pointer_to(&to->views[i]);
    }
    to->args[3] = number(EPS);
    to->args[4] = boolean(enable_pdl);
}

static void pack_gdn(struct packed *to, const struct gdn *it) {
    const struct tensor *tensors[9] = {&it->output, &it->state,      &it->q,     &it->k,   &it->v,
                                       &it->cu_seqlens, &it->alpha, &it->beta, &it->workspace};
    static const int places[9] = {0, 1, 2, 3, 4, 5, 7, 8, 10};
    *to = (struct packed){.function = ffi.gdn_prefill, .name = "gdn_prefill", .count = 11};
    for (int i = 0; i < 9; i++) {
        to->views[i] = view(tensors[i]);
        to->args[places[i]] = pointer_to(&to->views[i]);
    }
    to->args[6] = none();
    to->args[9] = number(0.0);
}

/* ---- memory ---- */

/* Device memory that grows and is used again by every request; it is carved from the start. */
struct pool {
    char *base;
    size_t size, used;
    /* Whether it holds random bf16 in (-low, low), which makes heads of 128 about unit vectors; else uniform f32 between
     * low and high. */
    enum { EMPTY, RANDOM_BF16, RANDOM_F32 } content;
    float low, high;
};

static struct pool inputs = {.content = RANDOM_BF16, .low = 0.15f};
static struct pool outputs = {.content = EMPTY};
static struct pool alphas = {.content = RANDOM_F32, .low = 0.9f, .high = 1.0f};
static struct pool betas = {.content = RANDOM_F32, .low = 0.0f, .high = 1.0f};

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
    else
        for (size_t i = 0; i < block / 4; i++) {
            float value = pool->low + (pool->high - pool->low) * uniform();
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

/* Sets of buffers that are larger than three times the L2 cache together, as far as MOST_SETS go. */
static size_t rotation(size_t set_bytes) {
    int l2 = 0;
    CUDA(cuda.attribute(&l2, ATTRIBUTE_L2, 0));
    size_t sets = 3 * (size_t)l2 / set_bytes + 1;
    return sets < MOST_SETS ? sets : MOST_SETS;
}

static struct gemma *gemma_sets(int64_t rows, int64_t cols, size_t *count, bool rotate) {
    size_t matrix = aligned((size_t)rows * (size_t)cols * 2), row = aligned((size_t)cols * 2);
    *count = rotate ? rotation(2 * matrix + row) : 1;
    reserve(&inputs, *count * (matrix + row));
    reserve(&outputs, *count * matrix);
    struct gemma *sets = allocate(*count, sizeof *sets);
    for (size_t i = 0; i < *count; i++) {
        sets[i].out = dense(carve(&outputs, matrix), BF16, 2, (int64_t[]){rows, cols});
        sets[i].input = dense(carve(&inputs, matrix), BF16, 2, (int64_t[]){rows, cols});
        sets[i].weight = dense(carve(&inputs, row), BF16, 1, (int64_t[]){cols});
    }
    return sets;
}

/* The offsets of equally long sequences, on the device. */
static void *offsets(int64_t tokens, int64_t sequences) {
    if (sequences < 1 || tokens < sequences || tokens % sequences != 0)
        fail("%lld tokens do not make %lld sequences of equal length, none empty", (long long)tokens,
             (long long)sequences);
    static void *place = NULL;
    CUDA(cuda.free(place));
    size_t bytes = (size_t)(sequences + 1) * sizeof(int64_t);
    CUDA(cuda.malloc(&place, bytes));
    int64_t *host = allocate((size_t)sequences + 1, sizeof *host);
    for (int64_t i = 0; i <= sequences; i++) host[i] = i * (tokens / sequences);
    CUDA(cuda.memcpy(place, host, bytes, COPY_TO_DEVICE));
    free(host);
    return place;
}

static struct gdn *gdn_sets(int64_t tokens, int64_t sequences, size_t *count, bool rotate) {
    static void *workspace = NULL;
    if (workspace == NULL) {
        CUDA(cuda.malloc(&workspace, WORKSPACE));
        CUDA(cuda.memset(workspace, 0, WORKSPACE));
    }
    int64_t *cu_seqlens = offsets(tokens, sequences);
    size_t head = (size_t)tokens * HEAD * 2;
    size_t q = aligned(Q_HEADS * head), k = aligned(K_HEADS * head), v = aligned(V_HEADS * head);
    size_t gate = aligned((size_t)tokens * V_HEADS * 4), state = aligned((size_t)sequences * V_HEADS * HEAD * HEAD * 4);
    *count = rotate ? rotation(q + k + 2 * v + 2 * gate + state) : 1;
    reserve(&inputs, *count * (q + k + v));
    reserve(&outputs, *count * (v + state));
    reserve(&alphas, *count * gate);
    reserve(&betas, *count * gate);
    struct gdn *sets = allocate(*count, sizeof *sets);
    for (size_t i = 0; i < *count; i++) {
        struct gdn *it = &sets[i];
        it->output = dense(carve(&outputs, v), BF16, 3, (int64_t[]){tokens, V_HEADS, HEAD});
        it->state = dense(carve(&outputs, state), F32, 4, (int64_t[]){sequences, V_HEADS, HEAD, HEAD});
        it->q = dense(carve(&inputs, q), BF16, 3, (int64_t[]){tokens, Q_HEADS, HEAD});
        it->k = dense(carve(&inputs, k), BF16, 3, (int64_t[]){tokens, K_HEADS, HEAD});
        it->v = dense(carve(&inputs, v), BF16, 3, (int64_t[]){tokens, V_HEADS, HEAD});
        it->cu_seqlens = dense(cu_seqlens, I64, 1, (int64_t[]){sequences + 1});
        it->alpha = dense(carve(&alphas, gate), F32, 2, (int64_t[]){tokens, V_HEADS});
        it->beta = dense(carve(&betas, gate), F32, 2, (int64_t[]){tokens, V_HEADS});
        it->workspace = dense(workspace, U8, 1, (int64_t[]){WORKSPACE});
    }
    return sets;
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

/* Nanoseconds of GPU time per launch: a graph over all `sets`, replayed, between two events. */
static double gpu_ns(launcher *launch, const void *context, size_t sets) {
    size_t nodes = sets * ((LEAST_NODES + sets - 1) / sets);
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

/* ---- the cases ---- */

/* What every launcher here is given. */
struct work {
    const struct arm *arm;
    const struct gemma *gemma;
    const struct gdn *gdn;
    const struct packed *packed;
    size_t sets;
    char *const *to, *const *from;
    size_t bytes;
    void *empty;
};

static void launch_gemma(const void *context, size_t i) {
    const struct work *work = context;
    gemma_rmsnorm(&work->gemma[i % work->sets], EPS, work->arm->pdl, stream);
}

static void launch_gdn(const void *context, size_t i) {
    const struct work *work = context;
    gdn_prefill(&work->gdn[i % work->sets], 0.0, stream);
}

static void launch_packed(const void *context, size_t i) {
    const struct work *work = context;
    (void)i;
    call(work->packed);
}

static void launch_copy(const void *context, size_t i) {
    const struct work *work = context;
    size_t set = i % work->sets;
    CUDA(cuda.memcpy_async(work->to[set], work->from[set], work->bytes, COPY_ON_DEVICE, stream));
}

static void launch_empty(const void *context, size_t i) {
    const struct work *work = context;
    (void)i;
    int code = driver.launch(work->empty, 1, 1, 1, 1, 1, 1, 0, stream, NULL, NULL);
    if (code != 0) fail("cuLaunchKernel of the empty kernel: CUDA error %d", code);
}

static double host_gemma(const struct arm *arm, int64_t rows, int64_t cols) {
    size_t sets = 0;
    struct packed packed;
    struct gemma *gemma = gemma_sets(rows, cols, &sets, false);
    pack_gemma(&packed, gemma, arm->pdl);
    struct work work = {.arm = arm, .gemma = gemma, .packed = &packed, .sets = sets};
    double ns = host_ns(arm->packed ? launch_packed : launch_gemma, &work, GEMMA_BATCH);
    free(gemma);
    return ns;
}

static double host_gdn(const struct arm *arm, int64_t tokens) {
    size_t sets = 0;
    struct packed packed;
    struct gdn *gdn = gdn_sets(tokens, 1, &sets, false);
    pack_gdn(&packed, gdn);
    struct work work = {.arm = arm, .gdn = gdn, .packed = &packed, .sets = sets};
    double ns = host_ns(arm->packed ? launch_packed : launch_gdn, &work, GDN_BATCH);
    free(gdn);
    return ns;
}

/* Microseconds from the first launch to the end of the last. */
static double series(const struct arm *arm, int64_t count, int64_t rows, int64_t cols) {
    size_t sets = 0;
    struct packed packed;
    struct gemma *gemma = gemma_sets(rows, cols, &sets, false);
    pack_gemma(&packed, gemma, arm->pdl);
    struct work work = {.arm = arm, .gemma = gemma, .packed = &packed, .sets = sets};
    launcher *launch = arm->packed ? launch_packed : launch_gemma;
    /* The kernel must have been loaded before it is captured. */
    launch(&work, 0);
    CUDA(cuda.stream_wait(stream));
    graph_exec_t exec = arm->graph ? capture(launch, &work, (size_t)count) : NULL;
    double values[FIRST + BATCHES];
    for (size_t i = 0; i < FIRST + BATCHES; i++) {
        double start = now_ns();
        if (exec != NULL) CUDA(cuda.graph_launch(exec, stream));
        else
            for (int64_t j = 0; j < count; j++) launch(&work, (size_t)j);
        CUDA(cuda.stream_wait(stream));
        values[i] = (now_ns() - start) / 1e3;
    }
    if (exec != NULL) CUDA(cuda.graph_exec_destroy(exec));
    free(gemma);
    return median(values + FIRST, BATCHES);
}

static double gpu_gemma(const struct arm *arm, int64_t rows, int64_t cols) {
    size_t sets = 0;
    struct gemma *gemma = gemma_sets(rows, cols, &sets, true);
    struct work work = {.arm = arm, .gemma = gemma, .sets = sets};
    double ns = gpu_ns(launch_gemma, &work, sets);
    free(gemma);
    return ns;
}

static double gpu_gdn(const struct arm *arm, int64_t tokens, int64_t sequences) {
    size_t sets = 0;
    struct gdn *gdn = gdn_sets(tokens, sequences, &sets, true);
    struct work work = {.arm = arm, .gdn = gdn, .sets = sets};
    double ns = gpu_ns(launch_gdn, &work, sets);
    free(gdn);
    return ns;
}

static double gpu_copy(size_t bytes) {
    size_t sets = rotation(2 * bytes);
    reserve(&inputs, sets * aligned(bytes));
    reserve(&outputs, sets * aligned(bytes));
    char **to = allocate(sets, sizeof *to), **from = allocate(sets, sizeof *from);
    for (size_t i = 0; i < sets; i++) {
        to[i] = carve(&outputs, bytes);
        from[i] = carve(&inputs, bytes);
    }
    struct work work = {.sets = sets, .to = to, .from = from, .bytes = bytes};
    double ns = gpu_ns(launch_copy, &work, sets);
    free(to);
    free(from);
    return ns;
}

static double host_empty(void) {
    static const char text[] = ".version 6.3\n.target sm_75\n.address_size 64\n.visible .entry nothing() { ret; }\n";
    static void *kernel = NULL;
    if (kernel == NULL) {
        void *module = NULL;
        int code = driver.load(&module, text);
        if (code == 0) code = driver.function(&kernel, module, "nothing");
        if (code != 0) fail("loading the empty kernel: CUDA error %d", code);
    }
    struct work work = {.empty = kernel};
    return host_ns(launch_empty, &work, GEMMA_BATCH);
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

/* The answer, or a negative number where this arm does not have the case. */
static double answer(const struct arm *arm, const char *request) {
    const char *rest = request;
    int64_t n[3];
    if (strcmp(request, "host empty") == 0) return arm->limits ? host_empty() : -1;
    if (strcmp(request, "host tracking") == 0) return -1;
    if (starts(&rest, "gpu copy ")) {
        if (numbers(rest, n, 1)) return arm->limits ? gpu_copy((size_t)n[0]) : -1;
    } else if (starts(&rest, "host gemma ")) {
        if (numbers(rest, n, 2)) return arm->limits || arm->graph ? -1 : host_gemma(arm, n[0], n[1]);
    } else if (starts(&rest, "host gdn ")) {
        if (numbers(rest, n, 1)) return arm->limits || arm->graph || arm->pdl ? -1 : host_gdn(arm, n[0]);
    } else if (starts(&rest, "series ")) {
        if (numbers(rest, n, 3)) return arm->limits ? -1 : series(arm, n[0], n[1], n[2]);
    } else if (starts(&rest, "gpu gemma ")) {
        if (numbers(rest, n, 2)) return arm->limits || arm->packed ? -1 : gpu_gemma(arm, n[0], n[1]);
    } else if (starts(&rest, "gpu gdn ")) {
        if (numbers(rest, n, 2)) return arm->limits || arm->packed || arm->pdl ? -1 : gpu_gdn(arm, n[0], n[1]);
    }
    fail("`%s` is no request", request);
}

int main(int argc, char **argv) {
    const struct arm *arm = NULL;
    for (size_t i = 0; argc >= 2 && i < sizeof ARMS / sizeof ARMS[0]; i++)
        if (strcmp(ARMS[i].name, argv[argc - 1]) == 0) arm = &ARMS[i];
    if (arm == NULL) fail("the last argument is no arm: expected c, c-packed, c-pdl, c-graph or limits");
    load();
    CUDA(cuda.set_device(0));
    CUDA(cuda.stream_create(&stream, STREAM_NON_BLOCKING));
    if (arm->packed) use_stream(stream, NULL);
    if (arm->limits) host_empty();
    else if (arm->graph) series(arm, 10, 1, 4096);
    else host_gemma(arm, 1, 4096);
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

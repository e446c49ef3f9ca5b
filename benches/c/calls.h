/* Tensors, calls and copies, which `families.c` and `attention.c` have in common. */
#ifndef FLASHINFER_RS_CALLS_H
#define FLASHINFER_RS_CALLS_H

#include "arm.h"

static const struct dtype BF16 = {CODE_BFLOAT, 16, 1}, F32 = {CODE_FLOAT, 32, 1}, I32 = {CODE_INT, 32, 1},
                          U8 = {CODE_UINT, 8, 1}, E4M3 = {CODE_FLOAT8_E4M3FN, 8, 1};

/* ---- memory ---- */

static size_t bytes_of(struct dtype dtype, int32_t ndim, const int64_t *shape) {
    size_t bytes = dtype.bits / 8;
    for (int32_t i = 0; i < ndim; i++) bytes *= (size_t)shape[i];
    return bytes;
}

/* ---- calls ---- */

/* Packed once. It points into itself, so it must stay where it is. */
struct call {
    struct packed packed;
    struct tensor tensors[17];
    size_t count;
};

static void add(struct call *call, struct any argument) {
    call->packed.args[call->packed.count++] = argument;
}

static void add_tensor(struct call *call, struct tensor tensor) {
    size_t i = call->count++;
    call->tensors[i] = tensor;
    call->packed.views[i] = view(&call->tensors[i]);
    add(call, pointer_to(&call->packed.views[i]));
}

#define SHAPE(...) (int32_t)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

/* A tensor out of a pool. */
static struct tensor from(struct pool *pool, struct dtype dtype, int32_t ndim, const int64_t *shape) {
    return dense(carve(pool, bytes_of(dtype, ndim, shape)), dtype, ndim, shape);
}

/* So many bytes for each set, of tensors of these sizes. */
#define RESERVE(pool, sets, ...)                                                                       \
    do {                                                                                               \
        const size_t sizes[] = {__VA_ARGS__};                                                          \
        size_t set = 0;                                                                                \
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) set += aligned(sizes[i]);          \
        reserve((pool), (sets) * set);                                                                 \
    } while (0)

/* Memory of one size, from one pool to another or read. */
struct memory {
    size_t sets, bytes;
    char **from, **to;
    void *kernel;
};

static void launch_copy(const void *context, size_t i) {
    const struct memory *memory = context;
    size_t set = i % memory->sets;
    CUDA(cuda.memcpy_async(memory->to[set], memory->from[set], memory->bytes, COPY_ON_DEVICE, stream));
}

/* Copies so many units of 16 bytes, eight in each thread, of which all are read before the first is written. */
#define LOAD_UNIT(i)                                                                                   \
    "add.u32 %unit, %first, " #i ";\n"                                                                 \
    "setp.lt.u32 %inside" #i ", %unit, %units;\n"                                                      \
    "mul.wide.u32 %offset" #i ", %unit, 16;\n"                                                         \
    "add.u64 %address, %from, %offset" #i ";\n"                                                        \
    "@%inside" #i " ld.global.nc.v4.u32 {%a" #i ", %b" #i ", %c" #i ", %d" #i "}, [%address];\n"
#define STORE_UNIT(i)                                                                                  \
    "add.u64 %address, %to, %offset" #i ";\n"                                                          \
    "@%inside" #i " st.global.v4.u32 [%address], {%a" #i ", %b" #i ", %c" #i ", %d" #i "};\n"

/* UNITS_OF_BLOCK is a number in the kernels' text too. */
enum { THREADS = 256, UNITS_OF_BLOCK = 8 * THREADS };

static const char COPY[] =
    ".version 6.3\n.target sm_75\n.address_size 64\n"
    ".visible .entry copy(.param .u64 of, .param .u32 count, .param .u64 to) {\n"
    ".reg .pred %inside<1800>;\n.reg .u32 %thread, %block, %first, %unit, %units;\n"
    ".reg .u64 %from, %to, %address, %offset<1800>;\n.reg .u32 %a<1800>, %b<1800>, %c<1800>, %d<1800>;\n"
    "ld.param.u64 %from, [of];\nld.param.u32 %units, [count];\nld.param.u64 %to, [to];\n"
    "cvta.to.global.u64 %from, %from;\ncvta.to.global.u64 %to, %to;\n"
    "mov.u32 %thread, %tid.x;\nmov.u32 %block, %ctaid.x;\nmad.lo.u32 %first, %block, 2048, %thread;\n"
    LOAD_UNIT(0) LOAD_UNIT(256) LOAD_UNIT(512) LOAD_UNIT(768) LOAD_UNIT(1024) LOAD_UNIT(1280) LOAD_UNIT(1536) LOAD_UNIT(1792)
    STORE_UNIT(0) STORE_UNIT(256) STORE_UNIT(512) STORE_UNIT(768) STORE_UNIT(1024) STORE_UNIT(1280) STORE_UNIT(1536) STORE_UNIT(1792)
    "ret;\n}\n";

/* A kernel of those in this file: of so many units of 16 bytes, from one place to another. */
static void *unit_kernel(const char *text, const char *name) {
    void *module = NULL, *kernel = NULL;
    int code = driver.load(&module, text);
    if (code == 0) code = driver.function(&kernel, module, name);
    if (code != 0) fail("loading the kernel that is to %s: CUDA error %d", name, code);
    return kernel;
}

static void launch_units(const void *context, size_t i) {
    const struct memory *memory = context;
    size_t set = i % memory->sets;
    unsigned units = (unsigned)(memory->bytes / 16), blocks = (units + UNITS_OF_BLOCK - 1) / UNITS_OF_BLOCK;
    void *arguments[] = {&memory->from[set], &units, &memory->to[set]};
    int code = driver.launch(memory->kernel, blocks, 1, 1, THREADS, 1, 1, 0, stream, arguments, NULL);
    if (code != 0) fail("cuLaunchKernel of a kernel of units: CUDA error %d", code);
}

/* GPU time of a copy, by whichever is faster: CUDA's own, or a kernel's. On some GPUs CUDA's own is far behind, and what is shown
 * as a share of it would flatter. */
static double copy_ns(struct memory *memory, size_t count) {
    static void *kernel = NULL;
    if (memory->bytes % 16 != 0 || memory->bytes / 16 > UINT32_MAX - UNITS_OF_BLOCK)
        fail("%zu bytes are not units of 16 bytes, 2^32 at most", memory->bytes);
    if (kernel == NULL) kernel = unit_kernel(COPY, "copy");
    memory->kernel = kernel;
    double own = gpu_ns(launch_copy, memory, count), units = gpu_ns(launch_units, memory, count);
    return own < units ? own : units;
}

#endif

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

#endif

/* The part of TVM-FFI's C ABI (0.1.3, 64-bit) that the benchmarks need, and how a C program packs a call. */
#ifndef FLASHINFER_RS_TVM_FFI_H
#define FLASHINFER_RS_TVM_FFI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { TYPE_NONE = 0, TYPE_INT = 1, TYPE_BOOL = 2, TYPE_FLOAT = 3, TYPE_DLTENSOR = 7, TYPE_RAW_STR = 8 };
enum { DEVICE_CUDA = 2 };
enum { CODE_INT = 0, CODE_UINT = 1, CODE_FLOAT = 2, CODE_BFLOAT = 4, CODE_FLOAT8_E4M3FN = 10 };

struct device {
    int32_t type, id;
};

struct dtype {
    uint8_t code, bits;
    uint16_t lanes;
};

/* DLPack's DLTensor. */
struct dltensor {
    void *data;
    struct device device;
    int32_t ndim;
    struct dtype dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

/* TVMFFIAny. */
struct any {
    int32_t type_index;
    uint32_t padding;
    union {
        int64_t integer;
        double number;
        void *pointer;
        const char *text;
    } value;
};

_Static_assert(sizeof(struct dltensor) == 48 && offsetof(struct dltensor, shape) == 24, "DLTensor");
_Static_assert(sizeof(struct any) == 16 && offsetof(struct any, value) == 8, "TVMFFIAny");

typedef int function(void *self, const struct any *args, int32_t count, struct any *result);

/* A tensor as the caller of a kernel has it; strides in elements. */
struct tensor {
    void *data;
    struct device device;
    struct dtype dtype;
    int32_t ndim;
    int64_t shape[6], strides[6];
};

static inline struct dltensor view(const struct tensor *tensor) {
    return (struct dltensor){.data = tensor->data,
                             .device = tensor->device,
                             .ndim = tensor->ndim,
                             .dtype = tensor->dtype,
                             .shape = (int64_t *)tensor->shape,
                             .strides = (int64_t *)tensor->strides,
                             .byte_offset = 0};
}

static inline struct any none(void) {
    return (struct any){.type_index = TYPE_NONE, .value.integer = 0};
}

static inline struct any pointer_to(struct dltensor *tensor) {
    return (struct any){.type_index = TYPE_DLTENSOR, .value.pointer = tensor};
}

static inline struct any number(double value) {
    return (struct any){.type_index = TYPE_FLOAT, .value.number = value};
}

static inline struct any integer(int64_t value) {
    return (struct any){.type_index = TYPE_INT, .value.integer = value};
}

/* Text that ends with a zero byte and outlives the call. */
static inline struct any text(const char *value) {
    return (struct any){.type_index = TYPE_RAW_STR, .value.text = value};
}

static inline struct any boolean(bool value) {
    return (struct any){.type_index = TYPE_BOOL, .value.integer = value};
}

/* A dense tensor. */
static inline struct tensor dense(void *data, struct dtype dtype, int32_t ndim, const int64_t *shape) {
    struct tensor tensor = {.data = data, .device = {DEVICE_CUDA, 0}, .dtype = dtype, .ndim = ndim};
    int64_t stride = 1;
    for (int32_t i = ndim - 1; i >= 0; i--) {
        tensor.shape[i] = shape[i];
        tensor.strides[i] = stride;
        stride *= shape[i];
    }
    return tensor;
}

#endif

/* What benches/objects.rs compares with: the same from C, as often as it is asked for. Loaded as a module, for its function
 * of five arguments. */
#include "tvm_ffi.h"

int TVMFFIFunctionCall(void *function, struct any *args, int32_t count, struct any *result);
int TVMFFIFunctionGetGlobal(const void *name, void **out);
int TVMFFIObjectDecRef(void *object);

int __tvm_ffi_five(void *self, const struct any *args, int32_t count, struct any *result);
int call_five(int64_t times, const struct tensor *tensor);
int make_arrays(int64_t times);

int __tvm_ffi_five(void *self, const struct any *args, int32_t count, struct any *result) {
    (void)self, (void)args, (void)count;
    *result = none();
    return 0;
}

/* Not known to be that function, so that nothing of the call is left out. */
static function *volatile five = __tvm_ffi_five;

/* Calls the function of five arguments: two tensors, two numbers and a switch. */
int call_five(int64_t times, const struct tensor *tensor) {
    function *call = five;
    for (int64_t i = 0; i < times; i++) {
        struct dltensor views[2] = {view(tensor), view(tensor)};
        struct any args[5] = {pointer_to(&views[0]), pointer_to(&views[1]), number(1e-6), none(), boolean(true)};
        args[3] = (struct any){.type_index = TYPE_INT, .value.integer = i};
        struct any result = none();
        int code = call(NULL, args, 5, &result);
        if (code != 0 || result.type_index != TYPE_NONE) return -1;
    }
    return 0;
}

/* Builds arrays of eight integers and releases them. */
int make_arrays(int64_t times) {
    const struct {
        const char *data;
        size_t size;
    } name = {"ffi.Array", 9};
    void *make = NULL;
    if (TVMFFIFunctionGetGlobal(&name, &make) != 0 || make == NULL) return -1;
    for (int64_t i = 0; i < times; i++) {
        struct any args[8], array = none();
        for (int64_t j = 0; j < 8; j++) args[j] = (struct any){.type_index = TYPE_INT, .value.integer = i + j};
        if (TVMFFIFunctionCall(make, args, 8, &array) != 0) return -1;
        TVMFFIObjectDecRef(array.value.pointer);
    }
    return TVMFFIObjectDecRef(make);
}

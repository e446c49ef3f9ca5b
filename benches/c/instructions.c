/* `instructions N FOLDER`: packs and calls FOLDER/norm.so's gemma_rmsnorm N times, for counting instructions. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "tvm_ffi.h"

/* One call as a careful C program makes it: everything packed on the stack. */
__attribute__((noinline)) static int gemma_rmsnorm(function *function, const struct tensor *out,
                                                   const struct tensor *input, const struct tensor *weight,
                                                   double eps, bool enable_pdl) {
    struct dltensor views[3] = {view(out), view(input), view(weight)};
    struct any args[5] = {pointer_to(&views[0]), pointer_to(&views[1]), pointer_to(&views[2]), number(eps),
                          boolean(enable_pdl)};
    struct any result = none();
    return function(NULL, args, 5, &result);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "expected: instructions N FOLDER\n");
        return 2;
    }
    char path[4096];
    snprintf(path, sizeof path, "%s/norm.so", argv[2]);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    function *function = NULL;
    if (library != NULL) *(void **)&function = dlsym(library, "__tvm_ffi_gemma_rmsnorm");
    if (function == NULL) {
        fprintf(stderr, "instructions: %s\n", dlerror());
        return 1;
    }
    const struct dtype bf16 = {CODE_BFLOAT, 16, 1};
    static char memory[3];
    struct tensor out = dense(&memory[0], bf16, 2, (int64_t[]){1, 4096});
    struct tensor input = dense(&memory[1], bf16, 2, (int64_t[]){1, 4096});
    struct tensor weight = dense(&memory[2], bf16, 1, (int64_t[]){4096});
    for (long left = strtol(argv[1], NULL, 10); left > 0; left--) {
        int code = gemma_rmsnorm(function, &out, &input, &weight, 1e-6, false);
        if (code != 0) {
            fprintf(stderr, "instructions: gemma_rmsnorm answered %d, expected 0\n", code);
            return 1;
        }
    }
    return 0;
}

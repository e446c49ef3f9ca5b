/* Attention's modules called from C, as a measure for calling them from Rust: `cc -O2 attention.c -ldl`; arm.h says how it is
 * asked. benches/attention_arm.rs is the same from Rust, with tensors of the same sizes.
 *
 *     WHAT KIND BACKEND REQUESTS LENGTH LAYERS COUNT
 *
 * KIND is `decode` (a query for each request, over a paged cache), `paged` or `ragged` (as many queries as keys, causal); BACKEND is
 * `cores`, `fa2` or `fa3`; LAYERS are caches that take turns. WHAT is
 *
 *     plan      ns of host time of a plan, of batches of COUNT from an idle GPU
 *     tables    likewise, with the batch's tables brought to the GPU
 *     run       ns of host time of a run, likewise
 *     gpu       ns of GPU time of a run, of COUNT that were queued before the first started
 *     graph     ns of GPU time of a run, of a graph with COUNT of them, which was planned for graphs
 *     step      ns until a run is done that was queued on an idle GPU
 *
 * The arm `limits` has `gpu copy BYTES SETS ROUNDS`. */
#include "calls.h"

enum { Q_HEADS = 32, KV_HEADS = 8, HEAD = 128, PAGE_SIZE = 16, CAPABILITY_MAJOR = 75, DEVICE_CPU = 1 };
static const double SCALE = 0.088388347648318447; /* 1/√128 */
static const size_t FLOAT_BYTES = (size_t)768 << 20, INT_BYTES = (size_t)16 << 20;
/* What is copied ahead of runs, so that all of them are queued before the first starts. */
static const size_t AHEAD_BYTES = (size_t)512 << 20;
/* Caches from here on are given back after each request, since every arm has its own. */
static const size_t LARGE = (size_t)9 << 30;

static struct pool inputs = {.content = RANDOM_BF16, .low = 1.7f}, outputs = {.content = EMPTY};
static struct pool scratch = {.content = EMPTY}, copied = {.content = EMPTY};
static int (*malloc_host)(void **, size_t);
static void (*dec_ref)(void *);
static char *pinned, *pinned_tables;
static size_t pinned_tables_bytes;
static bool pdl;

/* ---- a case ---- */

enum kind { DECODE, PAGED, RAGGED };
enum backend { CORES, FA2, FA3 };

static struct {
    char key[64];
    enum kind kind;
    enum backend backend;
    bool graph;
    int64_t requests, length, layers, rows, pages;
    /* The batch's arrays: on the host, and after each other on the device. */
    int32_t *arrays;
    size_t count;
    void *tables;
    struct tensor qo, indptr, len, indices, last;
    struct call plan, *runs;
    struct any info;
} now_is;

#define NAME "with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_128_head_dim_vo_128_posenc_0_" \
             "use_swa_False_use_logits_cap_False"

static const char *const LIBRARIES[] = {
    "batch_decode_" NAME ".so",
    "batch_prefill_" NAME "_f16qk_False.so",
    "batch_prefill_" NAME "_f16qk_False_sm90.so",
};

static function *found(enum backend backend, enum kind kind, bool plan) {
    static function *all[3][3];
    int which = plan ? 0 : kind == RAGGED ? 2 : 1;
    function **place = &all[backend][which];
    const char *symbol = plan ? "__tvm_ffi_plan" : backend == CORES ? "__tvm_ffi_run"
                         : kind == RAGGED ? "__tvm_ffi_ragged_run" : "__tvm_ffi_paged_run";
    if (*place == NULL) *place = find_kernel(getenv("FLASHINFER_RS_LIB_DIR"), LIBRARIES[backend], symbol);
    return *place;
}

static struct tensor on_host(struct tensor tensor) {
    tensor.device = (struct device){DEVICE_CPU, 0};
    return tensor;
}

static void forget(void *object) {
    if (object != NULL) dec_ref(object);
}

/* Answers the planner's object, which is the caller's. */
static struct any planned(void) {
    struct any result = none();
    stream_t previous = NULL;
    use_stream(stream, &previous);
    const struct packed *it = &now_is.plan.packed;
    int code = it->function(NULL, it->args, it->count, &result);
    if (code != 0) raised(it->name, code);
    use_stream(previous, NULL);
    return result;
}

static void release(struct pool *pool) {
    CUDA(cuda.device_wait());
    CUDA(cuda.free(pool->base));
    pool->base = NULL;
    pool->size = pool->used = 0;
}

/* The arrays of a batch whose pages lie one after the other. */
static void make_tables(void) {
    int64_t requests = now_is.requests, queries = now_is.rows / requests;
    int64_t each = now_is.kind == RAGGED ? now_is.length : (now_is.length + PAGE_SIZE - 1) / PAGE_SIZE;
    size_t count = 0;
    free(now_is.arrays);
    now_is.count = (size_t)(2 * (requests + 1) + 2 * requests + now_is.pages);
    now_is.arrays = allocate(now_is.count + 64, sizeof *now_is.arrays);
    CUDA(cuda.free(now_is.tables));
    CUDA(cuda.malloc(&now_is.tables, (now_is.count + 64) * sizeof(int32_t)));
    int32_t *host = now_is.arrays;
    now_is.count = 0;
    /* Each at a place that is aligned to 16 bytes. */
#define ARRAY(field, length, value)                                                                    \
    do {                                                                                               \
        for (int64_t i = 0; i < (length); i++) host[count + (size_t)i] = (int32_t)(value);             \
        now_is.field = dense((int32_t *)now_is.tables + count, I32, SHAPE(length));                    \
        count = (count + (size_t)(length) + 3) & ~(size_t)3;                                           \
    } while (0)
    ARRAY(qo, requests + 1, i * queries);
    ARRAY(indptr, requests + 1, i * each);
    ARRAY(len, requests, now_is.length);
    ARRAY(last, requests, (now_is.length - 1) % PAGE_SIZE + 1);
    if (now_is.kind != RAGGED) ARRAY(indices, now_is.pages, i);
#undef ARRAY
    now_is.count = count;
    /* On the stream that the kernels run on: it does not wait for copies of the default one, and a kernel that reads the offsets
     * of another batch may walk over four billion keys. */
    CUDA(cuda.memcpy_async(now_is.tables, host, count * sizeof *host, COPY_TO_DEVICE, stream));
    CUDA(cuda.stream_wait(stream));
    if (pinned_tables_bytes < count * sizeof *host) {
        pinned_tables_bytes = count * sizeof *host;
        CUDA(malloc_host((void **)&pinned_tables, pinned_tables_bytes));
    }
}

static void set_up(void) {
    int64_t rows = now_is.rows, requests = now_is.requests;
    enum backend backend = now_is.backend;
    bool ragged = now_is.kind == RAGGED;
    make_tables();
    size_t q_bytes = (size_t)(rows * Q_HEADS * HEAD * 2);
    size_t tokens = (size_t)(ragged ? rows : now_is.pages * PAGE_SIZE), kv = tokens * KV_HEADS * HEAD * 2;
    size_t layers = (size_t)now_is.layers;
    reserve(&inputs, aligned(q_bytes) + layers * 2 * aligned(kv));
    reserve(&outputs, aligned(q_bytes));
    reserve(&scratch, aligned(FLOAT_BYTES) + aligned(INT_BYTES));
    struct tensor floats = from(&scratch, U8, SHAPE((int64_t)FLOAT_BYTES)), ints = from(&scratch, U8, SHAPE((int64_t)INT_BYTES));
    struct tensor q = from(&inputs, BF16, SHAPE(rows, Q_HEADS, HEAD)), o = from(&outputs, BF16, SHAPE(rows, Q_HEADS, HEAD));
    struct tensor pages = on_host(dense(pinned, U8, SHAPE((int64_t)INT_BYTES)));
    struct tensor h_qo = now_is.qo, h_indptr = now_is.indptr, h_len = now_is.len;
    struct tensor *host[] = {&h_qo, &h_indptr, &h_len};
    for (int i = 0; i < 3; i++) {
        *host[i] = on_host(*host[i]);
        host[i]->data = now_is.arrays + ((int32_t *)host[i]->data - (int32_t *)now_is.tables);
    }

    free(now_is.runs);
    now_is.runs = allocate(layers, sizeof *now_is.runs);
    struct any causal = boolean(now_is.kind != DECODE), on = boolean(pdl && !now_is.graph && backend != FA3);
    for (size_t layer = 0; layer < layers; layer++) {
        struct call *run = &now_is.runs[layer];
        run->packed = (struct packed){.function = found(backend, now_is.kind, false), .name = "run"};
        struct tensor k, v;
        if (ragged) {
            k = from(&inputs, BF16, SHAPE(rows, KV_HEADS, HEAD));
            v = from(&inputs, BF16, SHAPE(rows, KV_HEADS, HEAD));
        } else {
            k = from(&inputs, BF16, SHAPE(now_is.pages, PAGE_SIZE, KV_HEADS, HEAD));
            v = from(&inputs, BF16, SHAPE(now_is.pages, PAGE_SIZE, KV_HEADS, HEAD));
        }
        add_tensor(run, floats);
        add_tensor(run, ints);
        /* The plan's object, from when there is one. */
        add(run, none());
        add_tensor(run, q);
        add_tensor(run, k);
        add_tensor(run, v);
        if (backend != CORES) add_tensor(run, now_is.qo);
        add_tensor(run, now_is.indptr);
        if (!ragged) {
            add_tensor(run, now_is.indices);
            add_tensor(run, now_is.last);
        }
        add_tensor(run, o);
        add(run, none());
        if (backend != CORES) add(run, integer(now_is.kind != DECODE));
        add(run, integer(0));
        add(run, integer(-1));
        add(run, on);
        for (int nothing = backend == CORES ? 1 : backend == FA2 ? 6 : 4; nothing > 0; nothing--) add(run, none());
        add(run, number(0.0));
        add(run, number(SCALE));
        add(run, number(1.0));
        if (backend != FA3) add(run, number(1e-4));
        if (backend != CORES) add(run, integer(0));
    }

    struct call *plan = &now_is.plan;
    *plan = (struct call){.packed = {.function = found(backend, now_is.kind, true), .name = "plan"}};
    add_tensor(plan, floats);
    add_tensor(plan, ints);
    add_tensor(plan, pages);
    if (backend == CORES) {
        add_tensor(plan, h_indptr);
    } else {
        add_tensor(plan, h_qo);
        add_tensor(plan, h_indptr);
        add_tensor(plan, h_len);
        add(plan, integer(rows));
    }
    add(plan, integer(requests));
    add(plan, integer(Q_HEADS));
    add(plan, integer(KV_HEADS));
    add(plan, integer(ragged ? 1 : PAGE_SIZE));
    add(plan, boolean(now_is.graph));
    if (backend == CORES) {
        add(plan, integer(-1));
        add(plan, number(0.0));
    }
    add(plan, integer(HEAD));
    add(plan, integer(HEAD));
    if (backend == CORES) {
        add_tensor(plan, q);
        add_tensor(plan, now_is.runs[0].tensors[3]);
    } else {
        add(plan, causal);
        add(plan, integer(-1));
    }
    if (backend == FA2) {
        add(plan, integer(-1));
        add(plan, boolean(false));
        add(plan, integer(0));
    }

    struct any info = planned();
    forget(now_is.info.value.pointer);
    now_is.info = info;
    for (size_t layer = 0; layer < layers; layer++) now_is.runs[layer].packed.args[2] = info;
    CUDA(cuda.stream_wait(stream));
}

/* ---- what is measured ---- */

static void launch_plan(const void *context, size_t i) {
    (void)context, (void)i;
    forget(planned().value.pointer);
}

static void launch_tables(const void *context, size_t i) {
    size_t bytes = now_is.count * sizeof *now_is.arrays;
    memcpy(pinned_tables, now_is.arrays, bytes);
    CUDA(cuda.memcpy_async(now_is.tables, pinned_tables, bytes, COPY_TO_DEVICE, stream));
    launch_plan(context, i);
}

static void launch_run(const void *context, size_t i) {
    (void)context;
    stream_t previous = NULL;
    use_stream(stream, &previous);
    call(&now_is.runs[i % (size_t)now_is.layers].packed);
    use_stream(previous, NULL);
}

/* GPU time of a run, of so many that were queued before the first started. */
static double queued_ns(size_t count) {
    static event_t start = NULL, end = NULL;
    if (start == NULL) {
        CUDA(cuda.event_create(&start));
        CUDA(cuda.event_create(&end));
    }
    RESERVE(&copied, 2, AHEAD_BYTES);
    char *from = carve(&copied, AHEAD_BYTES), *to = carve(&copied, AHEAD_BYTES);
    struct memory ahead = {.sets = 1, .bytes = AHEAD_BYTES, .from = &from, .to = &to};
    double values[TIMINGS];
    for (size_t i = 0; i <= TIMINGS; i++) {
        float ms = 0;
        launch_copy(&ahead, 0);
        CUDA(cuda.event_record(start, stream));
        for (size_t j = 0; j < count; j++) launch_run(NULL, j);
        CUDA(cuda.event_record(end, stream));
        CUDA(cuda.event_wait(end));
        CUDA(cuda.event_elapsed(&ms, start, end));
        if (i > 0) values[i - 1] = 1e6 * (double)ms / (double)count;
    }
    return median(values, TIMINGS);
}

/* Until a run is done, from an idle GPU. */
static double step_ns(size_t count) {
    double *values = allocate(count, sizeof *values);
    for (size_t i = 0; i < count; i++) {
        CUDA(cuda.stream_wait(stream));
        double start = now_ns();
        launch_run(NULL, i);
        CUDA(cuda.stream_wait(stream));
        values[i] = now_ns() - start;
    }
    double found = median(values, count);
    free(values);
    return found;
}

/* ---- requests ---- */

static double copies(const char *request) {
    int64_t n[3];
    if (!numbers(request, n, 3)) fail("`%s` is no request: expected BYTES SETS ROUNDS", request);
    size_t bytes = (size_t)n[0];
    RESERVE(&copied, 2, bytes);
    char *from = carve(&copied, bytes), *to = carve(&copied, bytes);
    struct memory memory = {.sets = 1, .bytes = bytes, .from = &from, .to = &to};
    double ns = copy_ns(&memory, (size_t)n[2]);
    release(&copied);
    return ns;
}

static double answer(const void *of, const char *request) {
    const char *rest = request;
    bool is_copy = starts(&rest, "gpu copy ");
    if (of != NULL) return is_copy ? copies(rest) : -1;
    if (is_copy) return -1;
    char what[16], kind[16], backend[16];
    int64_t n[4];
    int end = 0;
    if (sscanf(request, "%15s %15s %15s %n", what, kind, backend, &end) != 3 || !numbers(request + end, n, 4))
        fail("`%s` is no request: expected WHAT KIND BACKEND REQUESTS LENGTH LAYERS COUNT", request);
    bool graph = strcmp(what, "graph") == 0;
    bool has = graph || strcmp(what, "plan") == 0 || strcmp(what, "tables") == 0 || strcmp(what, "run") == 0 ||
               strcmp(what, "gpu") == 0 || strcmp(what, "step") == 0;
    /* What Rust alone has. */
    if (!has) return -1;
    char key[64];
    snprintf(key, sizeof key, "%d %.15s %.15s %ld %ld %ld", graph, kind, backend, (long)n[0], (long)n[1], (long)n[2]);
    if (strcmp(key, now_is.key) != 0) {
        now_is.key[0] = '\0';
        now_is.kind = strcmp(kind, "decode") == 0 ? DECODE : strcmp(kind, "paged") == 0 ? PAGED : RAGGED;
        now_is.backend = strcmp(backend, "cores") == 0 ? CORES : strcmp(backend, "fa2") == 0 ? FA2 : FA3;
        now_is.graph = graph;
        now_is.requests = n[0], now_is.length = n[1], now_is.layers = n[2];
        now_is.rows = now_is.kind == DECODE ? n[0] : n[0] * n[1];
        now_is.pages = now_is.kind == RAGGED ? 0 : n[0] * ((n[1] + PAGE_SIZE - 1) / PAGE_SIZE);
        set_up();
        strcpy(now_is.key, key);
    }
    size_t count = (size_t)n[3];
    double ns = graph ? gpu_ns(launch_run, NULL, count)
                : what[0] == 'g' ? queued_ns(count)
                : what[0] == 's' ? step_ns(count)
                : host_ns(what[0] == 'p' ? launch_plan : what[0] == 't' ? launch_tables : launch_run, NULL, count);
    if (inputs.size > LARGE) {
        release(&inputs);
        now_is.key[0] = '\0';
    }
    return ns;
}

int main(int argc, char **argv) {
    const char *arm = argc >= 2 ? argv[argc - 1] : "";
    bool limits_only = strcmp(arm, "limits") == 0;
    if (!limits_only && strcmp(arm, "c") != 0) fail("the last argument is no arm: expected c or limits");
    const char *folder = load();
    FIND(open_library(folder, "libcudart.so.13", RTLD_LOCAL), SYMBOL(malloc_host, "cudaMallocHost"));
    FIND(open_library(folder, "libtvm_ffi.so", RTLD_GLOBAL), SYMBOL(dec_ref, "TVMFFIObjectDecRef"));
    CUDA(cuda.set_device(0));
    CUDA(cuda.stream_create(&stream, STREAM_NON_BLOCKING));
    int major = 0;
    CUDA(cuda.attribute(&major, CAPABILITY_MAJOR, 0));
    pdl = major >= 9;
    if (!limits_only) {
        CUDA(malloc_host((void **)&pinned, INT_BYTES));
        memset(pinned, 0, INT_BYTES);
    }
    return serve(answer, limits_only ? arm : NULL);
}

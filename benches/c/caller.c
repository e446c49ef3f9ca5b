/* The kernels called from C, as a measure for calling them from Rust: `cc -O2 caller.c -ldl`; arm.h says how it is asked. */
#include "arm.h"

enum { GEMMA_BATCH = 200, GDN_BATCH = 50 };
enum { Q_HEADS = 16, K_HEADS = 16, V_HEADS = 32, HEAD = 128, WORKSPACE = 128 << 10 };
/* Bounds on the launches of a captured graph. */
enum { MOST_SETS = 256, LEAST_NODES = 16 };
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

static struct {
    function *gemma_rmsnorm, *gdn_prefill;
} kernels;

/* ---- calling ---- */

struct gemma {
    struct tensor out, input, weight;
};

struct gdn {
    struct tensor output, state, q, k, v, cu_seqlens, alpha, beta, workspace;
};

/* One call: stream set, everything packed on the stack, stream restored. */
static void gemma_rmsnorm(const struct gemma *it, double eps, bool enable_pdl, stream_t on) {
    stream_t previous = NULL;
    use_stream(on, &previous);
    struct dltensor views[3] = {view(&it->out), view(&it->input), view(&it->weight)};
    struct any args[5] = {pointer_to(&views[0]), pointer_to(&views[1]), pointer_to(&views[2]), number(eps),
                          boolean(enable_pdl)};
    struct any result = none();
    int code = kernels.gemma_rmsnorm(NULL, args, 5, &result);
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
    int code = kernels.gdn_prefill(NULL, args, 11, &result);
    use_stream(previous, NULL);
    if (code != 0) raised("gdn_prefill", code);
}

static void pack_gemma(struct packed *to, const struct gemma *it, bool enable_pdl) {
    const struct tensor *tensors[3] = {&it->out, &it->input, &it->weight};
    *to = (struct packed){.function = kernels.gemma_rmsnorm, .name = "gemma_rmsnorm", .count = 5};
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
    *to = (struct packed){.function = kernels.gdn_prefill, .name = "gdn_prefill", .count = 11};
    for (int i = 0; i < 9; i++) {
        to->views[i] = view(tensors[i]);
        to->args[places[i]] = pointer_to(&to->views[i]);
    }
    to->args[6] = none();
    to->args[9] = number(0.0);
}

/* ---- memory ---- */

static struct pool inputs = {.content = RANDOM_BF16, .low = 0.15f};
static struct pool outputs = {.content = EMPTY};
static struct pool alphas = {.content = RANDOM_F32, .low = 0.9f, .high = 1.0f};
static struct pool betas = {.content = RANDOM_F32, .low = 0.0f, .high = 1.0f};

/* Sets of buffers that are larger than three times the L2 cache together, as far as MOST_SETS go. */
static size_t rotation(size_t set_bytes) {
    int l2 = 0;
    CUDA(cuda.attribute(&l2, ATTRIBUTE_L2, 0));
    size_t sets = 3 * (size_t)l2 / set_bytes + 1;
    return sets < MOST_SETS ? sets : MOST_SETS;
}

/* The launches of a graph over so many sets: enough, on each equally often. */
static size_t nodes(size_t sets) {
    return sets * ((LEAST_NODES + sets - 1) / sets);
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
    double ns = gpu_ns(launch_gemma, &work, nodes(sets));
    free(gemma);
    return ns;
}

static double gpu_gdn(const struct arm *arm, int64_t tokens, int64_t sequences) {
    size_t sets = 0;
    struct gdn *gdn = gdn_sets(tokens, sequences, &sets, true);
    struct work work = {.arm = arm, .gdn = gdn, .sets = sets};
    double ns = gpu_ns(launch_gdn, &work, nodes(sets));
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
    double ns = gpu_ns(launch_copy, &work, nodes(sets));
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

/* The answer, or a negative number where this arm does not have the case. */
static double answer(const void *of, const char *request) {
    const struct arm *arm = of;
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
    const char *folder = load();
    kernels.gemma_rmsnorm = find_kernel(folder, "norm.so", "__tvm_ffi_gemma_rmsnorm");
    kernels.gdn_prefill = find_kernel(folder, "gdn_prefill_sm90.so", "__tvm_ffi_gdn_prefill");
    CUDA(cuda.set_device(0));
    CUDA(cuda.stream_create(&stream, STREAM_NON_BLOCKING));
    if (arm->packed) use_stream(stream, NULL);
    if (arm->limits) host_empty();
    else if (arm->graph) series(arm, 10, 1, 4096);
    else host_gemma(arm, 1, 4096);
    return serve(answer, arm);
}

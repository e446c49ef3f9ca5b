/* Every family's kernels called from C, as a measure for calling them from Rust: `cc -O2 families.c -ldl`; arm.h says how it
 * is asked. benches/families.rs is the same from Rust, with tensors of the same sizes.
 *
 *     host CASE N… BATCH          ns of host time per call, of batches of so many
 *     gpu CASE N… SETS ROUNDS     ns of GPU time per call, of a graph that calls so many sets of tensors so often each
 *
 * The arm `limits` has copies on the device, and a kernel that reads and does nothing else. */
#include "calls.h"

enum { Q_HEADS = 32, KV_HEADS = 8, HEAD = 128, POSITIONS = 8192, PAGE_SIZE = 16, REQUESTS = 32, WORKSPACE = 1 << 20 };

/* ---- memory ---- */

static struct pool inputs = {.content = RANDOM_BF16, .low = 0.15f};
static struct pool numbers_of = {.content = NORMAL_F32};
static struct pool bits = {.content = RANDOM_BITS};
static struct pool outputs = {.content = EMPTY};

/* Host data on the device, until the next request. */
static void *uploaded(const void *data, size_t bytes) {
    static void *places[16];
    static size_t next = 0;
    void **place = &places[next++ % (sizeof places / sizeof places[0])];
    CUDA(cuda.free(*place));
    CUDA(cuda.malloc(place, bytes));
    CUDA(cuda.memcpy(*place, data, bytes, COPY_TO_DEVICE));
    return *place;
}

/* Where the tokens of a step go, on the device, as PageTable and Positions make it: a page table of REQUESTS requests that
 * have no tokens yet, whose pages lie one after the other. */
struct steering {
    struct tensor pos_ids, table, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len;
    int64_t pages;
};

static struct steering steering(int64_t tokens) {
    int64_t each = tokens / REQUESTS, pages = (each + PAGE_SIZE - 1) / PAGE_SIZE;
    if (tokens < REQUESTS || tokens % REQUESTS != 0) fail("%lld tokens are not some for each request", (long long)tokens);
    struct steering it = {.pages = REQUESTS * pages};
    int32_t *host = allocate((size_t)(tokens + it.pages + REQUESTS + 1), sizeof *host);
#define UPLOAD(field, length, value)                                                                   \
    do {                                                                                               \
        for (int64_t i = 0; i < (length); i++) host[i] = (int32_t)(value);                             \
        it.field = dense(uploaded(host, (size_t)(length) * sizeof *host), I32, SHAPE(length));         \
    } while (0)
    UPLOAD(pos_ids, tokens, i * 257 % POSITIONS);
    UPLOAD(batch_indices, tokens, i / each);
    UPLOAD(positions, tokens, i % each);
    UPLOAD(kv_indices, it.pages, i);
    UPLOAD(kv_indptr, REQUESTS + 1, i * pages);
    UPLOAD(kv_last_page_len, REQUESTS, (each - 1) % PAGE_SIZE + 1);
#undef UPLOAD
    free(host);
    /* Any angle, of which the squares of cosine and sine sum to 1, so that what is turned often stays as large as it was. */
    float *table = allocate(POSITIONS * HEAD, sizeof *table);
    for (size_t i = 0; i < POSITIONS * HEAD; i++) table[i] = i % HEAD < HEAD / 2 ? 0.6f : 0.8f;
    it.table = dense(uploaded(table, POSITIONS * HEAD * sizeof *table), F32, SHAPE(POSITIONS, HEAD));
    free(table);
    return it;
}

/* `rows` distributions over `vocab` tokens that are as steep as a language model's: some 16 tokens have three fifths of what
 * there is. The same in every arm, bit by bit, since how often a sampling kernel looks at a row depends on it. */
static float *distributions(int64_t rows, int64_t vocab) {
    float *all = allocate((size_t)(rows * vocab), sizeof *all);
    double *weights = allocate((size_t)vocab, sizeof *weights);
    uint64_t state = 0x9e3779b97f4a7c15u;
    for (int64_t row = 0; row < rows; row++) {
        double sum = 0;
        for (int64_t i = 0; i < vocab; i++) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            double weight = ((double)(state >> 41) + 0.5) / (double)(1 << 23);
            for (int squared = 0; squared < 13; squared++) weight *= weight;
            weights[i] = weight + 1e-9;
            sum += weights[i];
        }
        for (int64_t i = 0; i < vocab; i++) all[row * vocab + i] = (float)(weights[i] / sum);
    }
    free(weights);
    return all;
}

/* ---- the families ---- */

/* Fills in the calls, each of which has tensors of its own, and starts with the function already. */
typedef void maker(struct call *calls, size_t sets, const int64_t *n);

/* ROWS D */
static void silu_and_mul(struct call *calls, size_t sets, const int64_t *n) {
    RESERVE(&inputs, sets, (size_t)(n[0] * 2 * n[1] * 2));
    RESERVE(&outputs, sets, (size_t)(n[0] * n[1] * 2));
    for (struct call *call = calls; call < calls + sets; call++) {
        add_tensor(call, from(&outputs, BF16, SHAPE(n[0], n[1])));
        add_tensor(call, from(&inputs, BF16, SHAPE(n[0], 2 * n[1])));
        add(call, boolean(false));
    }
}

/* TOKENS; in place. */
static void rope(struct call *calls, size_t sets, const int64_t *n) {
    struct steering it = steering(n[0]);
    size_t head = (size_t)n[0] * HEAD * 2;
    RESERVE(&inputs, sets, Q_HEADS * head, KV_HEADS * head);
    for (struct call *call = calls; call < calls + sets; call++) {
        struct tensor q = from(&inputs, BF16, SHAPE(n[0], Q_HEADS, HEAD));
        struct tensor k = from(&inputs, BF16, SHAPE(n[0], KV_HEADS, HEAD));
        add_tensor(call, q);
        add_tensor(call, k);
        add_tensor(call, q);
        add_tensor(call, k);
        add_tensor(call, it.table);
        add_tensor(call, it.pos_ids);
        add(call, boolean(false));
    }
}

/* TOKENS */
static void append(struct call *calls, size_t sets, const int64_t *n) {
    struct steering it = steering(n[0]);
    size_t head = (size_t)n[0] * KV_HEADS * HEAD * 2, cache = (size_t)(it.pages * PAGE_SIZE) * KV_HEADS * HEAD * 2;
    RESERVE(&inputs, sets, head, head);
    RESERVE(&outputs, sets, cache, cache);
    for (struct call *call = calls; call < calls + sets; call++) {
        add_tensor(call, from(&inputs, BF16, SHAPE(n[0], KV_HEADS, HEAD)));
        add_tensor(call, from(&inputs, BF16, SHAPE(n[0], KV_HEADS, HEAD)));
        add_tensor(call, it.batch_indices);
        add_tensor(call, it.positions);
        add_tensor(call, from(&outputs, BF16, SHAPE(it.pages, PAGE_SIZE, KV_HEADS, HEAD)));
        add_tensor(call, from(&outputs, BF16, SHAPE(it.pages, PAGE_SIZE, KV_HEADS, HEAD)));
        add_tensor(call, it.kv_indices);
        add_tensor(call, it.kv_indptr);
        add_tensor(call, it.kv_last_page_len);
        add(call, integer(0));
    }
}

/* TOKENS; heads are turned whole, so the other part of each has no elements. */
static void rope_append(struct call *calls, size_t sets, const int64_t *n) {
    struct steering it = steering(n[0]);
    size_t head = (size_t)n[0] * HEAD, cache = (size_t)(it.pages * PAGE_SIZE) * KV_HEADS * HEAD;
    RESERVE(&inputs, sets, Q_HEADS * head * 2, KV_HEADS * head * 2, KV_HEADS * head * 2);
    RESERVE(&outputs, sets, Q_HEADS * head, cache, cache);
    struct tensor no_cache = dense(NULL, U8, SHAPE(0, 0, 0));
    for (struct call *call = calls; call < calls + sets; call++) {
        struct tensor q = from(&inputs, BF16, SHAPE(n[0], Q_HEADS, HEAD));
        struct tensor k = from(&inputs, BF16, SHAPE(n[0], KV_HEADS, HEAD));
        struct tensor v = from(&inputs, BF16, SHAPE(n[0], KV_HEADS, HEAD));
        struct tensor q_out = from(&outputs, E4M3, SHAPE(n[0], Q_HEADS, HEAD));
        add_tensor(call, q);
        add_tensor(call, k);
        add_tensor(call, dense(q.data, BF16, SHAPE(n[0], Q_HEADS, 0)));
        add_tensor(call, dense(k.data, BF16, SHAPE(n[0], KV_HEADS, 0)));
        add_tensor(call, v);
        add_tensor(call, q_out);
        add_tensor(call, dense(q_out.data, E4M3, SHAPE(n[0], Q_HEADS, 0)));
        add_tensor(call, it.table);
        add_tensor(call, it.pos_ids);
        add_tensor(call, from(&outputs, E4M3, SHAPE(it.pages, PAGE_SIZE, KV_HEADS, HEAD)));
        add_tensor(call, from(&outputs, E4M3, SHAPE(it.pages, PAGE_SIZE, KV_HEADS, HEAD)));
        add_tensor(call, no_cache);
        add_tensor(call, no_cache);
        add_tensor(call, it.kv_indices);
        add_tensor(call, it.kv_indptr);
        add_tensor(call, it.batch_indices);
        add_tensor(call, it.positions);
        add(call, integer(0));
        add(call, integer(PAGE_SIZE));
        add(call, number(1.0));
        add(call, number(1.0));
        add(call, boolean(false));
        add(call, boolean(false));
    }
}

/* ELEMENTS */
static void packbits(struct call *calls, size_t sets, const int64_t *n) {
    RESERVE(&bits, sets, (size_t)n[0]);
    RESERVE(&outputs, sets, (size_t)(n[0] + 7) / 8);
    for (struct call *call = calls; call < calls + sets; call++) {
        add_tensor(call, from(&bits, U8, SHAPE(n[0])));
        add(call, text("big"));
        add_tensor(call, from(&outputs, U8, SHAPE((n[0] + 7) / 8)));
    }
}

/* ROWS VOCAB */
static void softmax(struct call *calls, size_t sets, const int64_t *n) {
    size_t bytes = (size_t)(n[0] * n[1] * 4);
    RESERVE(&numbers_of, sets, bytes);
    RESERVE(&outputs, sets, bytes, WORKSPACE);
    for (struct call *call = calls; call < calls + sets; call++) {
        add_tensor(call, from(&outputs, U8, SHAPE(WORKSPACE)));
        add_tensor(call, from(&numbers_of, F32, SHAPE(n[0], n[1])));
        add_tensor(call, from(&outputs, F32, SHAPE(n[0], n[1])));
        add(call, none());
        add(call, number(1.0));
        add(call, boolean(false));
    }
}

/* ROWS VOCAB; the 50 likeliest and nine tenths at once, the same random numbers in every call. */
static void sample(struct call *calls, size_t sets, const int64_t *n) {
    static struct pool rows = {.content = EMPTY};
    static int64_t of[2];
    size_t bytes = (size_t)(n[0] * n[1] * 4);
    size_t before = rows.size;
    RESERVE(&rows, sets, bytes);
    RESERVE(&outputs, sets, (size_t)n[0] * 4);
    bool filled = rows.size == before && of[0] == n[0] && of[1] == n[1];
    float *all = filled ? NULL : distributions(n[0], n[1]);
    for (struct call *call = calls; call < calls + sets; call++) {
        struct tensor probs = from(&rows, F32, SHAPE(n[0], n[1]));
        if (!filled) CUDA(cuda.memcpy(probs.data, all, bytes, COPY_TO_DEVICE));
        add_tensor(call, probs);
        add_tensor(call, from(&outputs, I32, SHAPE(n[0])));
        add(call, none());
        add(call, none());
        add(call, integer(50));
        add(call, none());
        add(call, number(0.9f));
        add(call, boolean(true));
        add(call, integer(42));
        add(call, integer(0));
    }
    free(all);
    of[0] = n[0], of[1] = n[1];
}

/* ROWS LENGTH K */
static void topk(struct call *calls, size_t sets, const int64_t *n) {
    size_t found = (size_t)(n[0] * n[2] * 4);
    RESERVE(&numbers_of, sets, (size_t)(n[0] * n[1] * 4));
    RESERVE(&outputs, sets, found, found);
    for (struct call *call = calls; call < calls + sets; call++) {
        add_tensor(call, from(&numbers_of, F32, SHAPE(n[0], n[1])));
        add_tensor(call, from(&outputs, I32, SHAPE(n[0], n[2])));
        add_tensor(call, from(&outputs, F32, SHAPE(n[0], n[2])));
        add(call, none());
        add(call, integer(n[2]));
    }
}

struct family {
    const char *name;
    /* How many numbers the case has. */
    int numbers;
    maker *make;
    const char *library, *symbol;
    function *function;
};

#define FUNCTION(library, name) library, "__tvm_ffi_" name, NULL

static struct family FAMILIES[] = {
    {"silu_and_mul", 2, silu_and_mul, FUNCTION("silu_and_mul.so", "silu_and_mul")},
    {"rope", 1, rope, FUNCTION("rope.so", "apply_rope_pos_ids_cos_sin_cache")},
    {"append", 1, append, FUNCTION("page.so", "append_paged_kv_cache")},
    {"rope_append", 1, rope_append, FUNCTION("rope.so", "rope_quantize_append_paged_kv_cache")},
    {"packbits", 1, packbits, FUNCTION("quantization.so", "packbits")},
    {"softmax", 2, softmax, FUNCTION("sampling.so", "softmax")},
    {"sample", 2, sample, FUNCTION("sampling.so", "top_k_top_p_sampling_from_probs")},
    {"topk", 3, topk, FUNCTION("topk.so", "radix_topk")},
};

/* ---- the limits ---- */

/* Reads so many units of 16 bytes, eight in each thread, and writes nothing: its sum is never that number. */
#define READ_UNIT(i)                                                                                   \
    "add.u32 %unit, %first, " #i ";\n"                                                                 \
    "setp.lt.u32 %inside, %unit, %units;\n"                                                            \
    "mul.wide.u32 %offset, %unit, 16;\n"                                                               \
    "add.u64 %address, %from, %offset;\n"                                                              \
    "mov.f32 %a" #i ", 0f00000000; mov.f32 %b" #i ", 0f00000000;\n"                                    \
    "mov.f32 %c" #i ", 0f00000000; mov.f32 %d" #i ", 0f00000000;\n"                                    \
    "@%inside ld.global.nc.v4.f32 {%a" #i ", %b" #i ", %c" #i ", %d" #i "}, [%address];\n"
#define SUM_UNIT(i)                                                                                    \
    "add.f32 %sum, %sum, %a" #i "; add.f32 %sum, %sum, %b" #i ";\n"                                    \
    "add.f32 %sum, %sum, %c" #i "; add.f32 %sum, %sum, %d" #i ";\n"

static const char READ[] =
    ".version 6.3\n.target sm_75\n.address_size 64\n"
    ".visible .entry read(.param .u64 of, .param .u32 count, .param .u64 to) {\n"
    ".reg .pred %inside, %never;\n.reg .u32 %thread, %block, %first, %unit, %units;\n"
    ".reg .u64 %from, %to, %offset, %address;\n.reg .f32 %sum, %a<1800>, %b<1800>, %c<1800>, %d<1800>;\n"
    "ld.param.u64 %from, [of];\nld.param.u32 %units, [count];\nld.param.u64 %to, [to];\n"
    "cvta.to.global.u64 %from, %from;\ncvta.to.global.u64 %to, %to;\n"
    "mov.u32 %thread, %tid.x;\nmov.u32 %block, %ctaid.x;\nmad.lo.u32 %first, %block, 2048, %thread;\n"
    "mov.f32 %sum, 0f00000000;\n"
    READ_UNIT(0) READ_UNIT(256) READ_UNIT(512) READ_UNIT(768) READ_UNIT(1024) READ_UNIT(1280) READ_UNIT(1536) READ_UNIT(1792)
    SUM_UNIT(0) SUM_UNIT(256) SUM_UNIT(512) SUM_UNIT(768) SUM_UNIT(1024) SUM_UNIT(1280) SUM_UNIT(1536) SUM_UNIT(1792)
    "setp.eq.f32 %never, %sum, 0f7e967699;\n"
    "@%never st.global.f32 [%to], %sum;\nret;\n}\n";

static double limits(bool copy, size_t bytes, size_t sets, size_t rounds) {
    size_t written = copy ? bytes : 4;
    static void *reader = NULL;
    if (bytes % 16 != 0 || bytes / 16 > UINT32_MAX - UNITS_OF_BLOCK) fail("%zu bytes are not units of 16 bytes, 2^32 at most", bytes);
    if (!copy && reader == NULL) reader = unit_kernel(READ, "read");
    RESERVE(&numbers_of, sets, bytes);
    RESERVE(&outputs, sets, written);
    struct memory memory = {.sets = sets, .bytes = bytes, .kernel = reader};
    memory.from = allocate(sets, sizeof *memory.from);
    memory.to = allocate(sets, sizeof *memory.to);
    for (size_t i = 0; i < sets; i++) {
        memory.from[i] = carve(&numbers_of, bytes);
        memory.to[i] = carve(&outputs, written);
    }
    double ns = copy ? copy_ns(&memory, sets * rounds) : gpu_ns(launch_units, &memory, sets * rounds);
    free(memory.from);
    free(memory.to);
    return ns;
}

/* ---- requests ---- */

struct work {
    const struct call *calls;
    size_t sets;
};

/* One call as a careful program makes it: stream set, arguments packed beforehand, stream restored. */
static void launch(const void *context, size_t i) {
    const struct work *work = context;
    stream_t previous = NULL;
    use_stream(stream, &previous);
    call(&work->calls[i % work->sets].packed);
    use_stream(previous, NULL);
}

/* Measures `sets` calls of a family: its GPU time in a graph that has each `rounds` times, or else its host time. */
static double measure(const struct family *family, const int64_t *n, size_t sets, bool gpu, size_t rounds) {
    struct call *calls = allocate(sets, sizeof *calls);
    for (size_t i = 0; i < sets; i++)
        calls[i].packed = (struct packed){.function = family->function, .name = family->name};
    family->make(calls, sets, n);
    struct work work = {.calls = calls, .sets = sets};
    double ns = gpu ? gpu_ns(launch, &work, sets * rounds) : host_ns(launch, &work, rounds);
    free(calls);
    return ns;
}

static double answer(const void *of, const char *request) {
    bool limits_only = of != NULL;
    const char *rest = request;
    int64_t n[8];
    bool host = starts(&rest, "host ");
    if (!host && !starts(&rest, "gpu ")) fail("`%s` is no request", request);
    size_t length = strcspn(rest, " ");
    const char *of_case = rest + length;
    if (!host && (strncmp(rest, "copy ", 5) == 0 || strncmp(rest, "read ", 5) == 0)) {
        if (!numbers(of_case, n, 3)) fail("`%s` is no request: expected BYTES SETS ROUNDS", request);
        return limits_only ? limits(rest[0] == 'c', (size_t)n[0], (size_t)n[1], (size_t)n[2]) : -1;
    }
    for (struct family *family = FAMILIES; family < FAMILIES + sizeof FAMILIES / sizeof FAMILIES[0]; family++) {
        if (strlen(family->name) != length || strncmp(family->name, rest, length) != 0) continue;
        if (!numbers(of_case, n, family->numbers + (host ? 1 : 2)))
            fail("`%s` is no request: expected %d numbers, and BATCH or SETS ROUNDS", request, family->numbers);
        if (limits_only) return -1;
        /* No library is asked for before it is needed: one that is missing fails its own cases. */
        if (family->function == NULL)
            family->function = find_kernel(getenv("FLASHINFER_RS_LIB_DIR"), family->library, family->symbol);
        const int64_t *last = n + family->numbers;
        return host ? measure(family, n, 1, false, (size_t)last[0])
                    : measure(family, n, (size_t)last[0], true, (size_t)last[1]);
    }
    /* What Rust or Python alone have. */
    return -1;
}

int main(int argc, char **argv) {
    const char *arm = argc >= 2 ? argv[argc - 1] : "";
    bool limits_only = strcmp(arm, "limits") == 0;
    if (!limits_only && strcmp(arm, "c") != 0) fail("the last argument is no arm: expected c or limits");
    load();
    CUDA(cuda.set_device(0));
    CUDA(cuda.stream_create(&stream, STREAM_NON_BLOCKING));
    return serve(answer, limits_only ? arm : NULL);
}

// What stands in front of sampling, and behind it: FlashInfer's kernels take rows for distributions and do not look.
//
// `cargo xtask glue` compiles this to rows.ptx, which the crate carries and CUDA's driver translates for its GPU. Sums and
// differences flush what is subnormal to 0, as FlashInfer's kernels do.

typedef unsigned int u32;
typedef unsigned long long u64;

// The bits of a status: as `RowStatus` in src/kernels/sampling/guard.rs has them.
enum : int { NOT_A_NUMBER = 1, TOO_LARGE = 2, NEGATIVE = 4, NOTHING = 8, NO_TOKEN = 16 };

// What else is seen of numbers: one that is above 0.
constexpr int SOMETHING = 8;

// Threads of a block, and loads of 16 bytes that each has under way at once.
constexpr u32 THREADS = 256;
constexpr u32 LOADS = 4;

// Numbers from 0 on are ordered as their bits are. The smallest that is not subnormal, and 1e28: of larger ones a row's sum
// may be infinite.
constexpr u32 LEAST = 0x00800000u;
constexpr u32 MOST = 0x6e013f39u;
constexpr u32 INFINITE = 0x7f800000u;
constexpr u32 MINUS_ZERO = 0x80000000u;
constexpr u32 ONE = 0x3f800000u;

__device__ __forceinline__ int seen_in(u32 bits) {
    if (bits <= MOST) return bits >= LEAST ? SOMETHING : 0;
    if ((bits & ~MINUS_ZERO) > INFINITE) return NOT_A_NUMBER;
    if (bits > MINUS_ZERO) return NEGATIVE;
    return bits == MINUS_ZERO ? 0 : TOO_LARGE;
}

// A row as units of 16 bytes that are aligned as such, the first and last of which may lie partly outside of it.
struct Row {
    u32* start;
    u32 length;
    u32 before;  // How many numbers of the first unit lie ahead of the row.

    __device__ __forceinline__ Row(float* rows, u32 row, u32 length)
        : start(reinterpret_cast<u32*>(rows) + static_cast<size_t>(row) * length), length(length) {
        before = static_cast<u32>(reinterpret_cast<u64>(start) >> 2) & 3;
    }

    __device__ __forceinline__ u32 units() const { return static_cast<u32>((static_cast<u64>(length) + before + 3) >> 2); }

    // Those that lie inside as a whole: from the first one on, and where they end.
    __device__ __forceinline__ u32 whole_from() const { return before != 0; }
    __device__ __forceinline__ u32 whole_to() const { return units() - ((before + length & 3) != 0); }

    // A unit that lies inside as a whole.
    __device__ __forceinline__ uint4& whole(u32 unit) const { return reinterpret_cast<uint4*>(start - before)[unit]; }

    // Calls `each` with the numbers of a unit that lies partly inside.
    template <typename Each>
    __device__ __forceinline__ void part(u32 unit, Each each) const {
        const long long first = static_cast<long long>(unit) * 4 - before;
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
            if (first + i >= 0 && first + i < length) each(start[first + i]);
        }
    }
};

// How many blocks of a row came so far, and how many of them saw what: four counts of 12 bits above one of 16. One addition
// tells a block that it is the last and what the others saw.
__device__ __forceinline__ u64 counted(int flags) {
    u64 count = 1;
#pragma unroll
    for (int i = 0; i < 4; ++i) count |= static_cast<u64>(flags >> i & 1) << (16 + 12 * i);
    return count;
}

__device__ __forceinline__ int flags_of(u64 count) {
    int flags = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) flags |= (count >> (16 + 12 * i) & 0xfff) != 0 ? 1 << i : 0;
    return flags;
}

// Looks at rows of probabilities, says in `status` what is wrong with each, and makes those that are no distribution such
// that have the first token alone.
//
// `chunks` blocks for each row, at most 4,095, of `chunk` units each, which together cover it wherever it starts. `seen` has
// a 0 for each row, before and after.
extern "C" __global__ void __launch_bounds__(THREADS)
    guard_rows(float* rows, u32 length, u32 chunk, u32 chunks, u64* seen, int* status) {
    __shared__ int details;
    const u32 index = blockIdx.x / chunks, part = blockIdx.x % chunks, thread = threadIdx.x;
    const Row row(rows, index, length);
    const u32 units = row.units();
    const u32 first = min(part * chunk, units), last = min(first + chunk, units);
    if (thread == 0) details = 0;

    int flags = 0;
    const u32 to = min(last, row.whole_to());
    for (u32 base = max(first, row.whole_from()) + thread; base < to; base += THREADS * LOADS) {
        // All at once.
        uint4 loaded[LOADS];
        u32 most = 0;
#pragma unroll
        for (u32 i = 0; i < LOADS; ++i) {
            const u32 unit = base + i * THREADS;
            loaded[i] = unit < to ? row.whole(unit) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (u32 i = 0; i < LOADS; ++i) {
            most = max(most, max(max(loaded[i].x, loaded[i].y), max(loaded[i].z, loaded[i].w)));
        }
        if (most <= MOST) {
            // None is larger: all are numbers from 0 on.
            flags |= most >= LEAST ? SOMETHING : 0;
        } else {
#pragma unroll
            for (u32 i = 0; i < LOADS; ++i) {
                flags |= seen_in(loaded[i].x) | seen_in(loaded[i].y) | seen_in(loaded[i].z) | seen_in(loaded[i].w);
            }
        }
    }
    // What lies beside them, each by a thread of whose block it is.
    const auto look = [&](u32 bits) { flags |= seen_in(bits); };
    if (thread == 0 && first < last && first < row.whole_from()) row.part(first, look);
    if (thread == 32 && first < last && last > row.whole_to()) row.part(last - 1, look);

    int all = __syncthreads_or(flags & SOMETHING) ? SOMETHING : 0;
    if (__syncthreads_or(flags & ~SOMETHING)) {
        if (flags & ~SOMETHING) atomicOr(&details, flags & ~SOMETHING);
        __syncthreads();
        all |= details;
    }
    // One warp sees to the rest.
    if (thread >= 32) return;
    u64 count = 0;
    if (thread == 0) count = atomicAdd(&seen[index], counted(all)) + counted(all);
    count = __shfl_sync(0xffffffff, count, 0);
    if ((count & 0xffff) != chunks) return;
    const int found = flags_of(count);
    const int wrong = (found & ~SOMETHING) | (found & SOMETHING ? 0 : NOTHING);
    if (thread == 0) {
        status[index] = wrong;
        seen[index] = 0;
    }
    if (wrong == 0) return;
    const auto clear = [](u32& bits) { bits = 0; };
    for (u32 unit = row.whole_from() + thread; unit < row.whole_to(); unit += 32) row.whole(unit) = make_uint4(0, 0, 0, 0);
    if (thread == 0 && row.whole_from() > 0) row.part(0, clear);
    if (thread == 0 && row.whole_to() < units) row.part(units - 1, clear);
    __syncwarp();
    if (thread == 0) row.start[0] = ONE;
}

// Ahead of speculative sampling: draft tokens that are tokens, 0 for those that are none, and counters of 0. A thread for each
// sequence.
extern "C" __global__ void __launch_bounds__(THREADS) chain_begin(const int* drafts, int* checked, int* accepted,
                                                                  int* emitted, int* status, u32 batch, u32 count, u32 length) {
    const u32 sequence = blockIdx.x * THREADS + threadIdx.x;
    if (sequence >= batch) return;
    int wrong = 0;
    for (u32 i = 0; i < count; ++i) {
        const size_t place = static_cast<size_t>(sequence) * count + i;
        const int token = drafts[place];
        const bool is_token = static_cast<u32>(token) < length;
        checked[place] = is_token ? token : 0;
        if (!is_token) wrong = NO_TOKEN;
    }
    accepted[sequence] = 0;
    emitted[sequence] = 0;
    status[sequence] = wrong;
}

// What the token behind the accepted drafts is drawn from: the target's probabilities, less the draft's where it was rejected.
struct Rest {
    const float* target;
    const float* draft;  // None behind the last draft.

    __device__ __forceinline__ float operator[](size_t token) const {
        return draft == nullptr ? target[token] : target[token] - draft[token];
    }
};

// Behind speculative sampling, a block for each sequence. Where the draft's probabilities are nowhere below the target's, which
// is so by rounding alone, nothing is left to draw from and FlashInfer's kernel answers what its memory held: the target's
// likeliest token stands in. Adds the counters to the caller's, and brings together what is wrong with a sequence.
extern "C" __global__ void __launch_bounds__(THREADS)
    chain_end(const float* drafts, const float* targets, int* tokens, const int* accepted, const int* emitted,
              int* all_accepted, int* all_emitted, const int* draft_status, const int* target_status, int* status, u32 count,
              u32 length) {
    __shared__ u64 likeliest;
    const u32 sequence = blockIdx.x, thread = threadIdx.x;
    const u32 place = min(static_cast<u32>(emitted[sequence]), count);
    const size_t row = static_cast<size_t>(sequence) * (count + 1) + place;
    Rest rest{targets + row * length, nullptr};
    if (place < count) rest.draft = drafts + (static_cast<size_t>(sequence) * count + place) * length;
    const int token = tokens[row];
    const bool drawn = static_cast<u32>(token) < length && rest[static_cast<u32>(token)] > 0;
    if (thread == 0) {
        likeliest = 0;
        int wrong = status[sequence];
        for (u32 i = 0; i < count; ++i) wrong |= draft_status[static_cast<size_t>(sequence) * count + i];
        for (u32 i = 0; i <= count; ++i) wrong |= target_status[static_cast<size_t>(sequence) * (count + 1) + i];
        status[sequence] = wrong;
        all_accepted[sequence] += accepted[sequence];
        all_emitted[sequence] += emitted[sequence];
    }
    if (drawn) return;
    __syncthreads();
    u64 best = 0;
    for (u32 i = thread; i < length; i += THREADS) {
        // Of equal probabilities the first.
        const u64 key = static_cast<u64>(__float_as_uint(rest.target[i])) << 32 | (0xffffffffu - i);
        best = max(best, key);
    }
    atomicMax(&likeliest, best);
    __syncthreads();
    if (thread == 0) tokens[row] = static_cast<int>(0xffffffffu - static_cast<u32>(likeliest));
}

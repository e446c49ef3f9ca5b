// What a decode step needs beside FlashInfer's kernels and its matrix products.
//
// `cargo xtask glue` compiles this to decode.ptx, which the crate carries and CUDA's driver translates for its GPU: Hopper
// and newer, which alone know programmatic dependent launch and clusters.
//
// Each kernel waits before it touches any memory, and lets the kernel behind it start right then: one that is launched so
// waits itself until this one has ended, its writes included. Nothing is read through a cache that is not coherent, since
// the kernel ahead may write while this one is started already. Indices come from device memory and are looked at here: one
// that is out of range is never followed.

#include "hopper.cuh"

typedef double f64;

// Threads of a block of those that do the same for every element.
constexpr u32 THREADS = 128;
// Threads of a block of those that look at rows as long as a vocabulary, and the blocks of a row, which are one cluster.
constexpr u32 LONG_THREADS = 1024;
constexpr u32 BLOCKS = 8;
// Warps of a block that have a head each.
constexpr u32 HEADS = 4;
constexpr u32 ALL = 0xffffffffu;

// All threads of all blocks of the cluster come here, those of a warp not at once, and see what any of them wrote before.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// The same place of shared memory in another block of the cluster.
template <typename T>
__device__ __forceinline__ T* of_block(T* place, u32 rank) {
    u64 there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<u64>(place)), "r"(rank));
    return reinterpret_cast<T*>(there);
}

__device__ __forceinline__ f32 to_f32(f32 x) { return x; }

__device__ __forceinline__ void put(f32* to, f32 x) { *to = x; }

// The elements of 16 bytes: as many numbers as they are.
template <typename T>
constexpr u32 UNIT = 16 / sizeof(T);

template <typename T>
union Unit {
    uint4 bits;
    T at[UNIT<T>];
    __device__ Unit() {}
};

template <typename T>
__device__ __forceinline__ Unit<T> unit_at(const T* from) {
    Unit<T> unit;
    unit.bits = *reinterpret_cast<const uint4*>(from);
    return unit;
}

// Eight numbers, of 16 or of 32 bytes that are aligned to 16.
template <typename T>
__device__ __forceinline__ void get_eight(const T* from, f32 (&x)[8]) {
#pragma unroll
    for (u32 i = 0; i < 8; i += UNIT<T>) {
        const Unit<T> unit = unit_at(from + i);
#pragma unroll
        for (u32 j = 0; j < UNIT<T>; ++j) x[i + j] = to_f32(unit.at[j]);
    }
}

template <typename T>
__device__ __forceinline__ void put_eight(T* to, const f32 (&x)[8]) {
#pragma unroll
    for (u32 i = 0; i < 8; i += UNIT<T>) {
        Unit<T> unit;
#pragma unroll
        for (u32 j = 0; j < UNIT<T>; ++j) put(&unit.at[j], x[i + j]);
        *reinterpret_cast<uint4*>(to + i) = unit.bits;
    }
}

// Where a block of the rows' kernels has its part: a row for each block of the first dimension, of which the second has parts.
// `wide` says that all rows are of eights that are aligned.
template <typename Eights, typename Ones>
__device__ __forceinline__ void each_of_row(u32 columns, u32 wide, Eights eights, Ones ones) {
    const u32 first = blockIdx.y * THREADS + threadIdx.x, step = gridDim.y * THREADS;
    if (wide) {
        for (u32 i = first * 8; i < columns; i += step * 8) eights(i);
    } else {
        for (u32 i = first; i < columns; i += step) ones(i);
    }
}

// out[b] = scale · table[ids[b]]; NaN for an id that is no row of the table.
template <typename T>
__device__ __forceinline__ void embedding(T* out, i64 out_stride, const int* ids, const T* table, i64 table_stride,
                                          u32 tokens, u32 columns, f32 scale, u32 wide) {
    wait_for_those_ahead();
    let_those_behind_start();
    const u32 id = static_cast<u32>(ids[blockIdx.x]);
    const bool is_token = id < tokens;
    const T* from = table + static_cast<i64>(is_token ? id : 0) * table_stride;
    T* to = out + static_cast<i64>(blockIdx.x) * out_stride;
    const f32 none = __int_as_float(0x7fffffff);
    each_of_row(
        columns, wide,
        [&](u32 i) {
            f32 x[8];
            get_eight(from + i, x);
#pragma unroll
            for (u32 j = 0; j < 8; ++j) x[j] = is_token ? x[j] * scale : none;
            put_eight(to + i, x);
        },
        [&](u32 i) { put(to + i, is_token ? to_f32(from[i]) * scale : none); });
}

__device__ __forceinline__ f32 sigmoid(f32 x) { return 1.0f / (1.0f + __expf(-x)); }

struct Add {
    __device__ __forceinline__ f32 operator()(f32 a, f32 b) const { return a + b; }
};
struct Mul {
    __device__ __forceinline__ f32 operator()(f32 a, f32 b) const { return a * b; }
};
struct SigmoidGate {
    __device__ __forceinline__ f32 operator()(f32 a, f32 gate) const { return a * sigmoid(gate); }
};

// a ← f(a, b), element by element.
template <typename F, typename T>
__device__ __forceinline__ void with(T* a, i64 a_stride, const T* b, i64 b_stride, u32 columns, u32 wide) {
    wait_for_those_ahead();
    let_those_behind_start();
    const F f;
    a += static_cast<i64>(blockIdx.x) * a_stride;
    b += static_cast<i64>(blockIdx.x) * b_stride;
    each_of_row(
        columns, wide,
        [&](u32 i) {
            f32 x[8], y[8];
            get_eight(a + i, x);
            get_eight(b + i, y);
#pragma unroll
            for (u32 j = 0; j < 8; ++j) x[j] = f(x[j], y[j]);
            put_eight(a + i, x);
        },
        [&](u32 i) { put(a + i, f(to_f32(a[i]), to_f32(b[i]))); });
}

// a ← a · σ(a).
template <typename T>
__device__ __forceinline__ void silu(T* a, i64 stride, u32 columns, u32 wide) {
    wait_for_those_ahead();
    let_those_behind_start();
    a += static_cast<i64>(blockIdx.x) * stride;
    each_of_row(
        columns, wide,
        [&](u32 i) {
            f32 x[8];
            get_eight(a + i, x);
#pragma unroll
            for (u32 j = 0; j < 8; ++j) x[j] *= sigmoid(x[j]);
            put_eight(a + i, x);
        },
        [&](u32 i) {
            const f32 x = to_f32(a[i]);
            put(a + i, x * sigmoid(x));
        });
}

template <typename A, typename B>
constexpr bool SAME = false;
template <typename A>
constexpr bool SAME<A, A> = true;

// A copy of another type, rounded once; of the same type, bit for bit.
template <typename T, typename U>
__device__ __forceinline__ void copy(U* out, i64 out_stride, const T* input, i64 stride, u32 columns, u32 wide) {
    wait_for_those_ahead();
    let_those_behind_start();
    out += static_cast<i64>(blockIdx.x) * out_stride;
    input += static_cast<i64>(blockIdx.x) * stride;
    each_of_row(
        columns, wide,
        [&](u32 i) {
            if constexpr (SAME<T, U>) {
#pragma unroll
                for (u32 j = 0; j < 8; j += UNIT<T>) {
                    *reinterpret_cast<uint4*>(out + i + j) = *reinterpret_cast<const uint4*>(input + i + j);
                }
            } else {
                f32 x[8];
                get_eight(input + i, x);
                put_eight(out + i, x);
            }
        },
        [&](u32 i) {
            if constexpr (SAME<T, U>) {
                out[i] = input[i];
            } else {
                put(out + i, to_f32(input[i]));
            }
        });
}

// Calls `each` with the place and the number of the row's elements that are this thread's, in order. The whole cluster has the
// row; `wide` says that it starts at a multiple of 16 bytes.
template <typename T, typename Each>
__device__ __forceinline__ void each_of_long_row(const T* row, u32 columns, u32 wide, Each each) {
    constexpr u32 LOADS = 3;
    const u32 first = cluster_rank() * LONG_THREADS + threadIdx.x, step = BLOCKS * LONG_THREADS;
    const u32 units = wide ? columns / UNIT<T> : 0;
    for (u32 base = first; base < units; base += LOADS * step) {
        // All at once.
        Unit<T> loaded[LOADS];
#pragma unroll
        for (u32 i = 0; i < LOADS; ++i) {
            if (base + i * step < units) loaded[i] = unit_at(row + static_cast<size_t>(base + i * step) * UNIT<T>);
        }
#pragma unroll
        for (u32 i = 0; i < LOADS; ++i) {
            const u32 unit = base + i * step;
            if (unit < units) {
#pragma unroll
                for (u32 j = 0; j < UNIT<T>; ++j) each(unit * UNIT<T> + j, to_f32(loaded[i].at[j]));
            }
        }
    }
    for (u32 i = units * UNIT<T> + first; i < columns; i += step) each(i, to_f32(row[i]));
}

// Numbers in their order, as whole numbers: both zeros are 0, and what is no number counts as −∞.
constexpr int INFINITE = 0x7f800000;

__device__ __forceinline__ int ordered(f32 x) {
    const int bits = __float_as_int(x), magnitude = bits & 0x7fffffff;
    if (magnitude > INFINITE) return -INFINITE;
    return bits < 0 ? -magnitude : magnitude;
}

template <typename T>
__device__ __forceinline__ T larger(T a, T b) {
    return a > b ? a : b;
}

// token[b] = the first place of the largest of logits[b]; 0 where all are −∞ or no number.
template <typename T>
__device__ __forceinline__ void argmax(int* token, const T* logits, i64 stride, u32 columns, u32 wide) {
    __shared__ u64 of_warps[LONG_THREADS / LANES];
    __shared__ u64 of_blocks[BLOCKS];
    wait_for_those_ahead();
    let_those_behind_start();
    const u32 row = blockIdx.x / BLOCKS, rank = cluster_rank(), thread = threadIdx.x;
    int most = -INFINITE;
    u32 at = 0;
    each_of_long_row(logits + static_cast<i64>(row) * stride, columns, wide, [&](u32 i, f32 x) {
        const int number = ordered(x);
        if (number > most) {
            most = number;
            at = i;
        }
    });
    // The larger one first, of equals that which comes earlier.
    u64 best = static_cast<u64>(static_cast<u32>(most) ^ 0x80000000u) << 32 | (ALL - at);
#pragma unroll
    for (u32 apart = LANES / 2; apart > 0; apart /= 2) best = larger(best, __shfl_xor_sync(ALL, best, apart));
    if (thread % LANES == 0) of_warps[thread / LANES] = best;
    // Whoever's memory is written to is there then.
    cluster_sync();
    if (thread < LANES) {
        best = of_warps[thread];
#pragma unroll
        for (u32 apart = LANES / 2; apart > 0; apart /= 2) best = larger(best, __shfl_xor_sync(ALL, best, apart));
        if (thread == 0) of_block(of_blocks, 0)[rank] = best;
    }
    cluster_sync();
    if (rank == 0 && thread == 0) {
        for (u32 i = 0; i < BLOCKS; ++i) best = larger(best, of_blocks[i]);
        token[row] = static_cast<int>(ALL - static_cast<u32>(best));
    }
}

// The largest number of some, and the sum of the powers of two of how much the others are below it, times a factor.
struct Powers {
    f32 most, sum;

    // By how much a power is less than that of the largest; nothing of −∞, beside −∞ too.
    static __device__ __forceinline__ f32 power(f32 x, f32 most, f32 factor) {
        return x == -INFINITY ? 0.0f : exp2f((x - most) * factor);
    }

    static __device__ __forceinline__ f32 shrunk(f32 from, f32 to, f32 factor) {
        return from == to ? 1.0f : exp2f((from - to) * factor);
    }

    __device__ __forceinline__ void add(f32 x, f32 factor) {
        const f32 larger = fmaxf(most, x);
        sum = sum * shrunk(most, larger, factor) + power(x, larger, factor);
        most = larger;
    }

    __device__ __forceinline__ void add(Powers other, f32 factor) {
        const f32 larger = fmaxf(most, other.most);
        sum = sum * shrunk(most, larger, factor) + other.sum * shrunk(other.most, larger, factor);
        most = larger;
    }
};

// a ← softmax(a / temperature), of each row; `factor` is log₂(e) / temperature.
template <typename T>
__device__ __forceinline__ void softmax(T* a, i64 stride, u32 columns, f32 factor, u32 wide) {
    __shared__ Powers of_warps[LONG_THREADS / LANES];
    __shared__ Powers of_blocks[BLOCKS];
    wait_for_those_ahead();
    let_those_behind_start();
    const u32 rank = cluster_rank(), thread = threadIdx.x;
    T* row = a + static_cast<i64>(blockIdx.x / BLOCKS) * stride;
    Powers all{-INFINITY, 0.0f};
    each_of_long_row(row, columns, wide, [&](u32, f32 x) { all.add(x, factor); });
#pragma unroll
    for (u32 apart = LANES / 2; apart > 0; apart /= 2) {
        const Powers other{__shfl_xor_sync(ALL, all.most, apart), __shfl_xor_sync(ALL, all.sum, apart)};
        all.add(other, factor);
    }
    if (thread % LANES == 0) of_warps[thread / LANES] = all;
    cluster_sync();
    if (thread < BLOCKS) {
        all = of_warps[0];
#pragma unroll 1
        for (u32 i = 1; i < LONG_THREADS / LANES; ++i) all.add(of_warps[i], factor);
        of_block(of_blocks, thread)[rank] = all;
    }
    cluster_sync();
    all = of_blocks[0];
#pragma unroll 1
    for (u32 i = 1; i < BLOCKS; ++i) all.add(of_blocks[i], factor);
    const f32 share = 1.0f / all.sum;
    // Each thread writes what it alone read.
    const u32 first = rank * LONG_THREADS + thread, step = BLOCKS * LONG_THREADS;
    const u32 units = wide ? columns / UNIT<T> : 0;
    for (u32 i = first; i < units; i += step) {
        T* place = row + static_cast<size_t>(i) * UNIT<T>;
        Unit<T> unit = unit_at(place);
#pragma unroll
        for (u32 j = 0; j < UNIT<T>; ++j) {
            put(&unit.at[j], Powers::power(to_f32(unit.at[j]), all.most, factor) * share);
        }
        *reinterpret_cast<uint4*>(place) = unit.bits;
    }
    for (u32 i = units * UNIT<T> + first; i < columns; i += step) {
        put(row + i, Powers::power(to_f32(row[i]), all.most, factor) * share);
    }
}

// Probabilities as whole numbers of 2⁻⁴⁴, whose sums are the same in whichever order they are made; up to 2¹⁹ of them fit.
constexpr f32 SCALE = 17592186044416.0f;

__device__ __forceinline__ f32 probability(f32 x) { return x > 0.0f ? fminf(x, 1.0f) : 0.0f; }

__device__ __forceinline__ u64 weight(f32 x) { return __float2ull_rz(probability(x) * SCALE); }

// The order in which tokens are kept: the likelier first, of equals that which comes earlier.
__device__ __forceinline__ u64 key(f32 x, u32 token, u32 columns) {
    return static_cast<u64>(__float_as_uint(probability(x))) << 32 | (columns - 1 - token);
}

// How many tokens there are, and their weights' sum.
struct Some {
    u64 count, sum;

    __device__ __forceinline__ Some operator+(Some other) const { return {count + other.count, sum + other.sum}; }
};

__device__ __forceinline__ Some of_warp(Some some) {
#pragma unroll
    for (u32 apart = LANES / 2; apart > 0; apart /= 2) {
        some = some + Some{__shfl_xor_sync(ALL, some.count, apart), __shfl_xor_sync(ALL, some.sum, apart)};
    }
    return some;
}

// Three bits of the key that the last token has are found at a time.
constexpr u32 BITS = 3;
constexpr u32 STEPS = 1 << BITS;

// token[b] is drawn by number[b] out of probs[b]: of the tokens of which each has fewer than `top_k` ahead of it and less than
// `top_p` in sum, in the order of their keys; a number that is 0 does not count. Of those, in the order of their places, the
// first one up to which the sum is more than the number's share of all.
extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(LONG_THREADS)
    sample(int* token, const f32* probs, i64 stride, const f32* number, u32 columns, u32 top_k, u64 top_p) {
    __shared__ Some of_warps[LONG_THREADS / LANES][STEPS];
    // Two, so that a block may write the next while another reads.
    __shared__ Some of_blocks[2][BLOCKS][STEPS];
    __shared__ u32 drawn;
    wait_for_those_ahead();
    let_those_behind_start();
    const u32 row = blockIdx.x / BLOCKS, rank = cluster_rank(), thread = threadIdx.x;
    const u32 lane = thread % LANES, warp = thread / LANES;
    probs += static_cast<i64>(row) * stride;
    const f32 by = number[row];
    u32 turn = 0;
    // Adds up what the threads of all blocks have in `own`, `count` of them.
    const auto of_all = [&](Some(&own)[STEPS], u32 count) {
#pragma unroll
        for (u32 i = 0; i < STEPS; ++i) {
            if (i < count) {
                const Some sum = of_warp(own[i]);
                if (lane == 0) of_warps[warp][i] = sum;
            }
        }
        // The first time, that the others are there; each time, that what was read of `of_warps` and `of_blocks` was.
        cluster_sync();
        if (thread < count * BLOCKS) {
            const u32 i = thread / BLOCKS, to = thread % BLOCKS;
            Some sum{0, 0};
            for (u32 j = 0; j < LONG_THREADS / LANES; ++j) sum = sum + of_warps[j][i];
            of_block(&of_blocks[turn][rank][i], to)[0] = sum;
        }
        cluster_sync();
    };
    // The key of the last token that is kept.
    u64 least = 0;
    if (top_k > 0 || top_p > 0) {
        // What lies above all that is still in question, as wide as `width` from `least` on.
        Some above{0, 0};
        u32 shift = 63 - BITS;
        while (true) {
            Some own[STEPS];
#pragma unroll
            for (u32 i = 0; i < STEPS; ++i) own[i] = {0, 0};
            for (u32 i = rank * LONG_THREADS + thread; i < columns; i += BLOCKS * LONG_THREADS) {
                const f32 x = probs[i];
                const u64 beyond = key(x, i, columns) - least;
                // Keys below wrap around to what is larger than any.
                if (beyond >> shift < STEPS) {
                    const u32 step = static_cast<u32>(beyond >> shift);
                    const u64 weighs = weight(x);
#pragma unroll
                    for (u32 j = 0; j < STEPS; ++j) {
                        if (step >= j) own[j] = own[j] + Some{1, weighs};
                    }
                }
            }
            of_all(own, STEPS);
            // The same in every thread.
            Some from[STEPS + 1];
            from[STEPS] = {0, 0};
            u32 chosen = 0;
#pragma unroll
            for (u32 j = 0; j < STEPS; ++j) {
                Some sum{0, 0};
                for (u32 i = 0; i < BLOCKS; ++i) sum = sum + of_blocks[turn][i][j];
                from[j] = sum;
                const Some all = above + sum;
                const bool enough = (top_k > 0 && all.count >= top_k) || (top_p > 0 && all.sum >= top_p);
                if (enough) chosen = j;
            }
            u64 left = 0;
            Some next = above;
#pragma unroll
            for (u32 j = 0; j < STEPS; ++j) {
                if (j == chosen) {
                    left = from[j].count - from[j + 1].count;
                    next = above + from[j + 1];
                }
            }
            turn ^= 1;
            least += static_cast<u64>(chosen) << shift;
            above = next;
            if (left <= 1 || shift == 0) break;
            shift -= BITS;
        }
    }
    // Where the drawn token is: each block has a part of the row.
    const u32 part = ((columns + BLOCKS - 1) / BLOCKS + 3) / 4 * 4;
    const u32 start = min(rank * part, columns), end = min(start + part, columns);
    const auto kept = [&](u32 i) {
        const f32 x = probs[i];
        return key(x, i, columns) >= least ? weight(x) : 0;
    };
    Some own[STEPS];
    own[0] = {0, 0};
    for (u32 i = start + thread; i < end; i += LONG_THREADS) own[0].sum += kept(i);
    of_all(own, 1);
    u64 ahead = 0, all = 0;
    for (u32 i = 0; i < BLOCKS; ++i) {
        const u64 sum = of_blocks[turn][i][0].sum;
        if (i < rank) ahead += sum;
        all += sum;
    }
    const u64 own_sum = of_blocks[turn][rank][0].sum;
    if (all == 0) {
        if (rank == 0 && thread == 0) token[row] = 0;
        return;
    }
    const f64 share = by > 0.0f ? static_cast<f64>(by) * static_cast<f64>(all) : 0.0;
    const u64 wanted = min(__double2ull_rz(share), all - 1);
    if (wanted < ahead || wanted - ahead >= own_sum) return;
    // It is in this block's part.
    if (thread == 0) drawn = ALL;
    u64 sum = ahead;
    for (u32 base = start; base < end; base += LONG_THREADS) {
        const u32 i = base + thread;
        const u64 weighs = i < end ? kept(i) : 0;
        u64 upto = weighs;
#pragma unroll
        for (u32 apart = 1; apart < LANES; apart *= 2) {
            const u64 other = __shfl_up_sync(ALL, upto, apart);
            if (lane >= apart) upto += other;
        }
        __syncthreads();
        if (lane == LANES - 1) of_warps[warp][0].sum = upto;
        __syncthreads();
        u64 before = sum;
        for (u32 j = 0; j < LONG_THREADS / LANES; ++j) {
            if (j < warp) before += of_warps[j][0].sum;
            sum += of_warps[j][0].sum;
        }
        upto += before;
        if (upto > wanted && upto - weighs <= wanted) drawn = i;
        __syncthreads();
        if (drawn != ALL) break;
    }
    if (thread == 0) token[row] = static_cast<int>(drawn);
}

// The next step's inputs. Whatever they were, positions are within the capacity then, and lengths from 1 up to it: at the end of
// what a sequence's pages hold it stays there.
extern "C" __global__ void __launch_bounds__(THREADS)
    advance(const int* token, int* ids, int* positions, int* lengths, u32 rows, int capacity) {
    wait_for_those_ahead();
    let_those_behind_start();
    const u32 row = blockIdx.x * THREADS + threadIdx.x;
    if (row >= rows) return;
    ids[row] = token[row];
    positions[row] = min(max(positions[row], -1), capacity - 2) + 1;
    lengths[row] = min(max(lengths[row], 0), capacity - 1) + 1;
}

// What turns queries and keys, and writes keys and values to their pages: in src/glue/decode.rs the same.
struct Turned {
    void* q;
    const void* k;
    const void* v;
    const void* q_weight;
    const void* k_weight;
    const f32* cos_sin;
    const int* positions;
    const int* page_table;
    void* k_cache;
    void* v_cache;
    i64 q_row, q_head, k_row, k_head, v_row, v_head;
    i64 cos_sin_row, table_row;
    u32 q_heads, kv_heads, size, rotary;
    u32 angles, pages, page_size, width;
    f32 eps;
    u32 interleave;
};
static_assert(sizeof(Turned) == 184, "as the other side asserts");

// A warp for each head of queries, of keys and of values of each row. `PAIRS` pairs of elements for each lane. A row whose
// position has no angles or no page, or whose page is none, stays as it is, and nothing is written for it.
template <typename T, u32 PAIRS, bool NORMED>
__device__ __forceinline__ void turned_append(const Turned& call) {
    wait_for_those_ahead();
    let_those_behind_start();
    const u32 row = blockIdx.x, lane = threadIdx.x % LANES;
    const u32 task = blockIdx.y * HEADS + threadIdx.x / LANES;
    if (task >= call.q_heads + 2 * call.kv_heads) return;
    const u32 position = static_cast<u32>(call.positions[row]);
    const bool is_query = task < call.q_heads, is_value = task >= call.q_heads + call.kv_heads;
    const u32 head = is_query ? task : (is_value ? task - call.q_heads - call.kv_heads : task - call.q_heads);
    const T* from;
    if (is_query) {
        from = static_cast<const T*>(call.q) + row * call.q_row + head * call.q_head;
    } else if (is_value) {
        from = static_cast<const T*>(call.v) + row * call.v_row + head * call.v_head;
    } else {
        from = static_cast<const T*>(call.k) + row * call.k_row + head * call.k_head;
    }
    // Pairs that are turned, and behind them those that are not; of values none is.
    const u32 pairs = call.size / 2, turned = is_value ? 0 : call.rotary / 2;
    f32 x[PAIRS], y[PAIRS];
    u32 first[PAIRS], second[PAIRS];
#pragma unroll
    for (u32 i = 0; i < PAIRS; ++i) {
        const u32 pair = lane + i * LANES;
        const bool apart = pair < turned && !call.interleave;
        first[i] = apart ? pair : 2 * pair;
        second[i] = apart ? pair + turned : 2 * pair + 1;
        x[i] = pair < pairs ? to_f32(from[first[i]]) : 0.0f;
        y[i] = pair < pairs ? to_f32(from[second[i]]) : 0.0f;
    }
    // Negative ones are larger than any.
    if (position >= call.angles || position / call.page_size >= call.width) return;
    const u32 page = static_cast<u32>(call.page_table[row * call.table_row + position / call.page_size]);
    const f32* angles = call.cos_sin + position * call.cos_sin_row;
    f32 cos[PAIRS], sin[PAIRS];
#pragma unroll
    for (u32 i = 0; i < PAIRS; ++i) {
        const u32 pair = lane + i * LANES;
        cos[i] = pair < turned ? angles[pair] : 1.0f;
        sin[i] = pair < turned ? angles[turned + pair] : 0.0f;
    }
    if constexpr (NORMED) {
        if (!is_value) {
            const T* weight = static_cast<const T*>(is_query ? call.q_weight : call.k_weight);
            f32 squares = 0.0f;
#pragma unroll
            for (u32 i = 0; i < PAIRS; ++i) squares += x[i] * x[i] + y[i] * y[i];
#pragma unroll
            for (u32 apart = LANES / 2; apart > 0; apart /= 2) squares += __shfl_xor_sync(ALL, squares, apart);
            const f32 factor = rsqrtf(squares / static_cast<f32>(call.size) + call.eps);
#pragma unroll
            for (u32 i = 0; i < PAIRS; ++i) {
                if (lane + i * LANES < pairs) {
                    x[i] *= factor * to_f32(weight[first[i]]);
                    y[i] *= factor * to_f32(weight[second[i]]);
                }
            }
        }
    }
    if (page >= call.pages) return;
    T* to;
    if (is_query) {
        to = static_cast<T*>(call.q) + row * call.q_row + head * call.q_head;
    } else {
        const i64 entry = static_cast<i64>(page) * call.page_size + position % call.page_size;
        to = static_cast<T*>(is_value ? call.v_cache : call.k_cache) + (entry * call.kv_heads + head) * call.size;
    }
#pragma unroll
    for (u32 i = 0; i < PAIRS; ++i) {
        const u32 pair = lane + i * LANES;
        if (pair >= pairs) continue;
        if (pair < turned) {
            put(to + first[i], x[i] * cos[i] - y[i] * sin[i]);
            put(to + second[i], y[i] * cos[i] + x[i] * sin[i]);
        } else {
            put(to + first[i], x[i]);
            put(to + second[i], y[i]);
        }
    }
}

#define ENTRY extern "C" __global__ void __launch_bounds__(THREADS)
#define CLUSTER extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(LONG_THREADS)

#define OF_HALVES(T)                                                                                                    \
    ENTRY embedding_##T(T* out, i64 out_stride, const int* ids, const T* table, i64 table_stride, u32 tokens,            \
                        u32 columns, f32 scale, u32 wide) {                                                             \
        embedding(out, out_stride, ids, table, table_stride, tokens, columns, scale, wide);                              \
    }                                                                                                                   \
    ENTRY rope_append_##T(Turned call) { turned_append<T, 2, false>(call); }                                            \
    ENTRY rope_append_large_##T(Turned call) { turned_append<T, 4, false>(call); }                                      \
    ENTRY qk_norm_rope_append_##T(Turned call) { turned_append<T, 2, true>(call); }                                     \
    ENTRY qk_norm_rope_append_large_##T(Turned call) { turned_append<T, 4, true>(call); }

OF_HALVES(bf16)
OF_HALVES(f16)

#define OF_FLOATS(T)                                                                                                    \
    ENTRY add_##T(T* a, i64 a_stride, const T* b, i64 b_stride, u32 columns, u32 wide) {                                \
        with<Add>(a, a_stride, b, b_stride, columns, wide);                                                             \
    }                                                                                                                   \
    ENTRY mul_##T(T* a, i64 a_stride, const T* b, i64 b_stride, u32 columns, u32 wide) {                                \
        with<Mul>(a, a_stride, b, b_stride, columns, wide);                                                             \
    }                                                                                                                   \
    ENTRY sigmoid_gate_##T(T* a, i64 a_stride, const T* b, i64 b_stride, u32 columns, u32 wide) {                       \
        with<SigmoidGate>(a, a_stride, b, b_stride, columns, wide);                                                     \
    }                                                                                                                   \
    ENTRY silu_##T(T* a, i64 stride, u32 columns, u32 wide) { silu(a, stride, columns, wide); }                         \
    ENTRY copy_##T##_bf16(bf16* out, i64 out_stride, const T* input, i64 stride, u32 columns, u32 wide) {               \
        copy(out, out_stride, input, stride, columns, wide);                                                            \
    }                                                                                                                   \
    ENTRY copy_##T##_f16(f16* out, i64 out_stride, const T* input, i64 stride, u32 columns, u32 wide) {                 \
        copy(out, out_stride, input, stride, columns, wide);                                                            \
    }                                                                                                                   \
    ENTRY copy_##T##_f32(f32* out, i64 out_stride, const T* input, i64 stride, u32 columns, u32 wide) {                 \
        copy(out, out_stride, input, stride, columns, wide);                                                            \
    }                                                                                                                   \
    CLUSTER argmax_##T(int* token, const T* logits, i64 stride, u32 columns, u32 wide) {                                \
        argmax(token, logits, stride, columns, wide);                                                                   \
    }                                                                                                                   \
    CLUSTER softmax_rows_##T(T* a, i64 stride, u32 columns, f32 factor, u32 wide) {                                     \
        softmax(a, stride, columns, factor, wide);                                                                      \
    }

OF_FLOATS(bf16)
OF_FLOATS(f16)
OF_FLOATS(f32)

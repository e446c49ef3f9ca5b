// Attention of one query of each row over a paged cache; with the norms of queries and keys, rotary embeddings and the append.
//
// `cargo xtask glue` compiles this to attend.ptx, which the crate carries and CUDA's driver translates for its GPU: Hopper and
// newer, which alone know programmatic dependent launch and clusters.
//
// A row's tokens are divided into eight ranges, and those among the warps of a block by sixteens. A cluster of one, two, four or eight
// blocks has a row and one head of keys and values, with all heads of queries that share it, at most eight; each block has as many
// ranges. Which token is in which range and whose warp's depends on the row's length alone. Results are summed up over a warp's tokens of
// a range, then over ranges, then over warps, whichever block has them: no row's result depends on how many others there are, nor on
// what they hold.
//
// Keys and values are copied into shared memory, the next while these are used, and go from there into tensor cores. Scores are those of
// 16 rows, of which the heads of queries are the first, by 8 tokens; values are multiplied the other way round, of 16 elements by 8
// heads, so that a thread's scores are what it has to multiply by.
//
// What is appended is the row's own business: a row sees its new key and value, and in the places where others append what was there
// before or what they write, so that no row may read what another appends.
//
// Nothing is read through a cache that is not coherent. Indices come from device memory and are looked at here: one that is out
// of range is never followed, and counts as no token.

#include "hopper.cuh"

constexpr u32 ALL = 0xffffffffu;
// The warps of a block, each of which has a tile of keys and one of values on their way or at hand.
constexpr u32 WARPS = 8;
// What a row's tokens are divided into.
constexpr u32 RANGES = 8;
// The most heads of queries that share one of keys.
constexpr u32 HEADS = 8;
// The tokens that a warp has at once.
constexpr u32 TILE = 16;
// What is no place of a cache.
constexpr u32 NONE = 0xffffffffu;

// In src/glue/attend.rs the same.
struct Attend {
    const void* q;
    const void* k;
    const void* v;
    // Null: without norms.
    const void* q_weight;
    const void* k_weight;
    const f32* cos_sin;
    const int* positions;
    const int* lengths;
    const int* page_table;
    void* k_cache;
    void* v_cache;
    void* out;
    i64 q_row, q_head, k_row, k_head, v_row, v_head;
    i64 cos_sin_row, table_row;
    u32 q_heads, kv_heads, rotary, angles;
    u32 pages, page_size, width;
    f32 eps;
    // log₂(e) times the scale of scores.
    f32 factor;
    u32 interleave;
    // Whether all but q, k and v is read before this waits.
    u32 early;
    // The ranges that a block has.
    u32 ranges;
    // log₂ of the tokens of a page, where that is a whole number, else 32.
    u32 page_log2;
    // The heads of queries that share one of keys; the results of these heads that a block has; 2²² divided by that, rounded up.
    u32 heads, share, by_share;
};
static_assert(sizeof(Attend) == 224, "as the other side asserts");

// Two numbers, rounded, the first in the lower half.
template <typename T>
__device__ __forceinline__ u32 pair(f32 a, f32 b);
template <>
__device__ __forceinline__ u32 pair<bf16>(f32 a, f32 b) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
    return both;
}
template <>
__device__ __forceinline__ u32 pair<f16>(f32 a, f32 b) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
    return both;
}

// 16 bytes into shared memory, zeros where there are none, not past the cache that is coherent.
__device__ __forceinline__ void copy_later(uint4* to, const void* from, bool is) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;"
                 :
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(to))), "l"(from), "r"(is ? 16 : 0)
                 : "memory");
}
// Ends a group of copies, and waits until at most so many groups are on their way.
__device__ __forceinline__ void end_of_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <u32 GROUPS>
__device__ __forceinline__ void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Four tiles of 8 rows of 16 bytes, a row from each lane's address: a thread gets two numbers of its row of each tile.
__device__ __forceinline__ uint4 rows_of(const uint4* from) {
    uint4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(from)))
                 : "memory");
    return x;
}

// The same, of columns.
__device__ __forceinline__ uint4 columns_of(const uint4* from) {
    uint4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(from)))
                 : "memory");
    return x;
}

// Two to the power of a difference; nothing of −∞, beside −∞ too.
__device__ __forceinline__ f32 power(f32 x, f32 most) { return x == -INFINITY ? 0.0f : exp2f(x - most); }

// What attention to some tokens comes to: the largest score, in powers of two; the sum of the others' powers, measured by it; and
// an element of the sum of values, weighted likewise. Sums are made by the same steps wherever they are made.
struct Partial {
    f32 most, sum, value;
};

// By how much what is measured by one is less when it is measured by another, which is not smaller.
__device__ __forceinline__ f32 shrunk(f32 from, f32 to) { return from == to ? 1.0f : exp2f(from - to); }

// `a` and `b` times their factors.
__device__ __forceinline__ f32 both(f32 a, f32 of_a, f32 b, f32 of_b) { return __fmaf_rn(b, of_b, __fmul_rn(a, of_a)); }

// `SIZE` is a head's: 64 or 128.
template <typename T, u32 SIZE>
__device__ __forceinline__ void attend(const Attend& call) {
    // 16 bytes of a token's key or value, and of a tile's; parts of a result that tensor cores make at once.
    constexpr u32 UNITS = SIZE / 8, TILE_UNITS = TILE * UNITS, PARTS = SIZE / 16;
    // Pairs of elements of a head for each lane.
    constexpr u32 PAIRS = SIZE / 64;
    extern __shared__ uint4 pool[];
    __shared__ f32 most_of[WARPS][HEADS], sum_of[WARPS][HEADS];
    __shared__ f32 most_in[RANGES][WARPS][HEADS], sum_in[RANGES][WARPS][HEADS];
    const u32 thread = threadIdx.x, lane = thread % LANES, warp = thread / LANES;
    const u32 group = lane / 4, quarter = lane % 4;
    // Each block of a cluster has as many ranges, and its share of the results.
    const u32 blocks = cluster_blocks(), rank = cluster_rank(), head = cluster_id(), row = blockIdx.y;
    const u32 first_range = call.ranges * rank, end_range = first_range + call.ranges;
    const u32 heads = call.heads, share = call.share;
    uint4* const keys = pool + warp * 2 * TILE_UNITS;
    uint4* const values = keys + TILE_UNITS;
    // Of each range and warp, or of each warp, the block's share of the results.
    f32* const gathered = reinterpret_cast<f32*>(pool + WARPS * 2 * TILE_UNITS);
    // The heads of queries, the new key and the new value.
    T* const made = reinterpret_cast<T*>(gathered + (blocks == 1 ? 1 : RANGES) * WARPS * share);
    if (blocks > 1) cluster_arrive();
    if (!call.early) {
        wait_for_those_ahead();
        let_those_behind_start();
    }

    const int* table = call.page_table + row * call.table_row;
    const u32 length = min(static_cast<u32>(max(call.lengths[row], 0)), call.width * call.page_size);
    const u32 tiles = (length + TILE - 1) / TILE, per_range = (tiles + RANGES - 1) / RANGES;

    const auto page_index = [&](u32 token) { return call.page_log2 < 32 ? token >> call.page_log2 : token / call.page_size; };
    // The token that is appended, and where.
    u32 fresh = NONE, fresh_place = NONE;
    // Negative ones are larger than any.
    const u32 position = static_cast<u32>(call.positions[row]);
    if (position < call.angles && page_index(position) < call.width) {
        const u32 page = static_cast<u32>(table[page_index(position)]);
        if (page < call.pages) {
            fresh = position;
            fresh_place = page * call.page_size + position - page_index(position) * call.page_size;
        }
    }

    // A warp's tiles of a range, of which each is so many further on. Where a range begins it is another warp's turn, so that none has
    // a tile more of each.
    const auto start_of = [&](u32 range) { return range * per_range + (warp + range) % WARPS; };
    const auto end_of = [&](u32 range) { return min((range + 1) * per_range, tiles); };
    // A tile's tokens are looked after by the first lanes, one by each. Pages are asked for a tile ahead of keys and values.
    u32 ahead_range = first_range, ahead_tile = start_of(first_range), ahead_page = NONE;
    const auto look_ahead = [&] {
        while (ahead_range < end_range && ahead_tile >= end_of(ahead_range)) {
            ahead_range += 1;
            ahead_tile = start_of(ahead_range);
        }
        const u32 token = ahead_tile * TILE + lane % TILE;
        ahead_page = ahead_range < end_range && token < length ? static_cast<u32>(table[page_index(token)]) : NONE;
    };
    // Where the tokens of the tile that is asked for are, and which of them count.
    u32 place = NONE, counts = 0;
    const auto find = [&] {
        const u32 token = ahead_tile * TILE + lane % TILE;
        const bool is = ahead_page < call.pages;
        // The new one is nowhere yet.
        place = is && token != fresh ? ahead_page * call.page_size + token - page_index(token) * call.page_size : NONE;
        counts = __ballot_sync(ALL, is);
        ahead_tile += WARPS;
        look_ahead();
    };
    const u32 token_units = call.kv_heads * UNITS;
    const auto fetch = [&](uint4* to, const void* cache) {
        const u32 unit = lane % UNITS;
        const uint4* const from = static_cast<const uint4*>(cache) + head * UNITS + unit;
#pragma unroll
        for (u32 i = 0; i < TILE_UNITS; i += LANES) {
            const u32 r = (i + lane) / UNITS, at = __shfl_sync(ALL, place, r);
            const bool is = at != NONE;
            copy_later(to + r * UNITS + (unit ^ r % 8), from + static_cast<u64>(is ? at : 0) * token_units, is);
        }
        end_of_group();
    };
    look_ahead();
    if (ahead_range < end_range) {
        find();
        fetch(keys, call.k_cache);
        fetch(values, call.v_cache);
    }

    if (call.early) {
        wait_for_those_ahead();
        let_those_behind_start();
    }
    // A warp has a head of queries, the key or the value at a time. Pairs that are turned, and behind them those that are not.
#pragma unroll 1
    for (u32 task = warp; task < heads + 2; task += WARPS) {
        const bool is_query = task < heads, is_value = task > heads;
        const T* from;
        if (is_query) {
            from = static_cast<const T*>(call.q) + row * call.q_row + (head * heads + task) * call.q_head;
        } else if (is_value) {
            from = static_cast<const T*>(call.v) + row * call.v_row + head * call.v_head;
        } else {
            from = static_cast<const T*>(call.k) + row * call.k_row + head * call.k_head;
        }
        const u32 turned = fresh != NONE && !is_value ? call.rotary / 2 : 0;
        const f32* angles = call.cos_sin + fresh * call.cos_sin_row;
        const T* weight = static_cast<const T*>(is_query ? call.q_weight : call.k_weight);
        const bool normed = weight != nullptr && fresh != NONE && !is_value;
        f32 x[PAIRS], y[PAIRS], cos[PAIRS], sin[PAIRS], weights[2][PAIRS];
        u32 of[2][PAIRS];
#pragma unroll
        for (u32 i = 0; i < PAIRS; ++i) {
            const u32 pair = lane + i * LANES;
            const bool apart = pair < turned && !call.interleave;
            of[0][i] = apart ? pair : 2 * pair;
            of[1][i] = apart ? pair + turned : 2 * pair + 1;
            x[i] = to_f32(from[of[0][i]]);
            y[i] = to_f32(from[of[1][i]]);
            cos[i] = pair < turned ? angles[pair] : 1.0f;
            sin[i] = pair < turned ? angles[turned + pair] : 0.0f;
#pragma unroll
            for (u32 n = 0; n < 2; ++n) weights[n][i] = normed ? to_f32(weight[of[n][i]]) : 1.0f;
        }
        if (normed) {
            f32 squares = 0.0f;
#pragma unroll
            for (u32 i = 0; i < PAIRS; ++i) squares += x[i] * x[i] + y[i] * y[i];
#pragma unroll
            for (u32 apart = LANES / 2; apart > 0; apart /= 2) squares += __shfl_xor_sync(ALL, squares, apart);
            const f32 factor = rsqrtf(squares / static_cast<f32>(SIZE) + call.eps);
#pragma unroll
            for (u32 i = 0; i < PAIRS; ++i) {
                x[i] *= factor * weights[0][i];
                y[i] *= factor * weights[1][i];
            }
        }
        T* to = made + task * SIZE;
        T* entry = nullptr;
        if (!is_query && rank == 0 && fresh != NONE) {
            entry = static_cast<T*>(is_value ? call.v_cache : call.k_cache) + (static_cast<u64>(fresh_place) * token_units + head * UNITS) * 8;
        }
#pragma unroll
        for (u32 i = 0; i < PAIRS; ++i) {
            const bool turns = lane + i * LANES < turned;
            const f32 a = turns ? x[i] * cos[i] - y[i] * sin[i] : x[i];
            const f32 b = turns ? y[i] * cos[i] + x[i] * sin[i] : y[i];
            put(to + of[0][i], a);
            put(to + of[1][i], b);
            if (entry != nullptr) {
                put(entry + of[0][i], a);
                put(entry + of[1][i], b);
            }
        }
    }
    __syncthreads();

    // Two numbers of each eight of the query `group`.
    u32 query[UNITS];
#pragma unroll
    for (u32 u = 0; u < UNITS; ++u) {
        query[u] = group < heads ? *reinterpret_cast<const u32*>(made + group * SIZE + u * 8 + quarter * 2) : 0;
    }
    // Of the head `group` and all ranges so far: the largest score, and the sum of powers. Of the heads 2 quarter and
    // 2 quarter + 1: results.
    f32 all_most = -INFINITY, all_sum = 0.0f;
    f32 all_result[PARTS][4] = {};
#pragma unroll 1
    for (u32 range = first_range; range < end_range; ++range) {
        // The same of this range, the sum by each thread of its own.
        f32 most = -INFINITY, sum = 0.0f;
        f32 result[PARTS][4] = {};
#pragma unroll 1
        for (u32 tile = start_of(range); tile < end_of(range); tile += WARPS) {
            // The keys are there; the values may be on their way.
            wait_for_groups<1>();
            __syncwarp();
            const u32 counted = counts;
            // The new token's place in the tile, where it counts: a row may have a length that ends ahead of its position.
            const u32 ahead = fresh - tile * TILE, at = ahead < TILE && (counted >> ahead & 1) != 0 ? ahead : NONE;
            if (at < TILE) {
                if (lane < UNITS) keys[at * UNITS + (lane ^ at % 8)] = reinterpret_cast<const uint4*>(made + heads * SIZE)[lane];
                __syncwarp();
            }
            // Two sums of each, since each step waits for the one before.
            f32 scores[2][2][4] = {};
#pragma unroll
            for (u32 u = 0; u < UNITS; u += 4) {
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    const u32 r = i * 8 + lane % 8;
                    const uint4 four = rows_of(keys + r * UNITS + ((u + lane / 8) ^ lane % 8));
                    multiply<T>(scores[0][i], query[u], 0, query[u + 1], 0, four.x, four.y);
                    multiply<T>(scores[1][i], query[u + 2], 0, query[u + 3], 0, four.z, four.w);
                }
            }
            // All of the warp have read what the next keys take the place of.
            __syncwarp();
            // All of a warp agree.
            const bool goes_on = ahead_range < end_range;
            if (goes_on) {
                find();
                fetch(keys, call.k_cache);
            }
            // The tokens of a thread's scores: two that follow one another, and two that are eight further on.
            f32 score[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const bool is = (counted >> (quarter * 2 + i % 2 + i / 2 * 8) & 1) != 0;
                score[i] = is ? (scores[0][i / 2][i % 2] + scores[1][i / 2][i % 2]) * call.factor : -INFINITY;
            }
            f32 largest = fmaxf(fmaxf(score[0], score[1]), fmaxf(score[2], score[3]));
            largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 2));
            largest = fmaxf(largest, most);
            const f32 less = shrunk(most, largest);
            most = largest;
            sum *= less;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                score[i] = power(score[i], most);
                sum += score[i];
            }
            const u32 b0 = pair<T>(score[0], score[1]), b1 = pair<T>(score[2], score[3]);
            if (goes_on) {
                wait_for_groups<1>();
            } else {
                wait_for_groups<0>();
            }
            __syncwarp();
            if (at < TILE) {
                if (lane < UNITS) values[at * UNITS + (lane ^ at % 8)] = reinterpret_cast<const uint4*>(made + (heads + 1) * SIZE)[lane];
                __syncwarp();
            }
            const f32 even = __shfl_sync(ALL, less, quarter * 8), odd = __shfl_sync(ALL, less, quarter * 8 + 4);
#pragma unroll
            for (u32 j = 0; j < PARTS; ++j) {
#pragma unroll
                for (u32 k = 0; k < 4; ++k) result[j][k] *= k % 2 == 0 ? even : odd;
                // Sixteen elements of values, of sixteen tokens.
                const u32 r = lane % 8 + lane / 16 * 8, unit = j * 2 + lane / 8 % 2;
                const uint4 four = columns_of(values + r * UNITS + (unit ^ lane % 8));
                multiply<T>(result[j], four.x, four.y, four.z, four.w, b0, b1);
            }
            __syncwarp();
            if (goes_on) fetch(values, call.v_cache);
        }
        sum += __shfl_xor_sync(ALL, sum, 1);
        sum += __shfl_xor_sync(ALL, sum, 2);
        if (blocks > 1) {
            // To each block its share. The first time, that the others are there.
            if (range == first_range) cluster_wait();
#pragma unroll
            for (u32 k = 0; k < 4; ++k) {
                const u32 of = quarter * 2 + k % 2;
                if (of >= heads) continue;
#pragma unroll
                for (u32 j = 0; j < PARTS; ++j) {
                    const u32 item = of * SIZE + j * 16 + group + k / 2 * 8, to = item * call.by_share >> 22;
                    put_in_block(&gathered[(range * WARPS + warp) * share + item - to * share], to, result[j][k]);
                }
            }
            if (quarter < blocks && group < heads) {
#pragma unroll 1
                for (u32 to = quarter; to < blocks; to += 4) {
                    put_in_block(&most_in[range][warp][group], to, most);
                    put_in_block(&sum_in[range][warp][group], to, sum);
                }
            }
            continue;
        }
        const f32 larger = fmaxf(all_most, most), before = shrunk(all_most, larger), now = shrunk(most, larger);
        all_sum = both(all_sum, before, sum, now);
        all_most = larger;
        f32 of_before[2], of_now[2];
#pragma unroll
        for (u32 k = 0; k < 2; ++k) {
            of_before[k] = __shfl_sync(ALL, before, quarter * 8 + k * 4);
            of_now[k] = __shfl_sync(ALL, now, quarter * 8 + k * 4);
        }
#pragma unroll
        for (u32 j = 0; j < PARTS; ++j) {
#pragma unroll
            for (u32 k = 0; k < 4; ++k) all_result[j][k] = both(all_result[j][k], of_before[k % 2], result[j][k], of_now[k % 2]);
        }
    }
    if (blocks == 1) {
        if (quarter == 0 && group < heads) {
            most_of[warp][group] = all_most;
            sum_of[warp][group] = all_sum;
        }
#pragma unroll
        for (u32 k = 0; k < 4; ++k) {
            const u32 of = quarter * 2 + k % 2;
            if (of >= heads) continue;
#pragma unroll
            for (u32 j = 0; j < PARTS; ++j) gathered[warp * share + of * SIZE + j * 16 + group + k / 2 * 8] = all_result[j][k];
        }
    } else {
        cluster_arrive();
        cluster_wait();
        // The ranges one after the other, as a block that has all of them does it.
#pragma unroll 1
        for (u32 i = lane; i < share; i += LANES) {
            const u32 h = (rank * share + i) / SIZE;
            Partial all{-INFINITY, 0.0f, 0.0f};
#pragma unroll
            for (u32 j = 0; j < RANGES; ++j) {
                const f32 most = most_in[j][warp][h];
                const f32 larger = fmaxf(all.most, most), before = shrunk(all.most, larger), now = shrunk(most, larger);
                all = {larger, both(all.sum, before, sum_in[j][warp][h], now),
                       both(all.value, before, gathered[(j * WARPS + warp) * share + i], now)};
            }
            gathered[warp * share + i] = all.value;
            if (i == 0 || (rank * share + i) % SIZE == 0) {
                most_of[warp][h] = all.most;
                sum_of[warp][h] = all.sum;
            }
        }
    }
    __syncthreads();
    // The warps' parts of each element.
#pragma unroll 1
    for (u32 i = thread; i < share; i += WARPS * LANES) {
        const u32 item = rank * share + i, h = item / SIZE;
        f32 most = -INFINITY, sum = 0.0f, value = 0.0f;
#pragma unroll
        for (u32 j = 0; j < WARPS; ++j) most = fmaxf(most, most_of[j][h]);
#pragma unroll
        for (u32 j = 0; j < WARPS; ++j) {
            const f32 less = shrunk(most_of[j][h], most);
            value = __fmaf_rn(gathered[j * share + i], less, value);
            sum = __fmaf_rn(sum_of[j][h], less, sum);
        }
        T* to = static_cast<T*>(call.out) + (static_cast<u64>(row) * call.q_heads + head * heads) * SIZE + item;
        // Of no token there is nothing.
        put(to, sum == 0.0f ? 0.0f : value / sum);
    }
}

#define ATTEND(T, SIZE)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(WARPS* LANES) attend_##T##_##SIZE(const __grid_constant__ Attend call) {          \
        attend<T, SIZE>(call);                                                                                                    \
    }

ATTEND(bf16, 64)
ATTEND(bf16, 128)
ATTEND(f16, 64)
ATTEND(f16, 128)

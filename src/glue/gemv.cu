// Products of few rows with a weight, which is read once and is all that takes time: `out = x · weightᵀ`.
//
// `cargo xtask glue` compiles this to gemv.ptx, which the crate carries and CUDA's driver translates for its GPU: Hopper and
// newer, which alone know programmatic dependent launch and clusters.
//
// A block has one or two tiles of 16 rows of the weight, whose columns its warps divide into slices of 128. Each thread asks for all of
// its part of a slice at once, so that as much is on its way as the memory can deliver. Where there are few rows and long ones, the
// blocks of a cluster divide the columns, and each sums up its share of the results. Tensor cores multiply, a tile of the weight with 8
// rows of `x`: rows of `x` that are not there are zeros, which cost nothing, since the tensor cores wait for the memory anyway.
//
// So no row's result depends on how many others there are, nor on what they hold: which column is in which slice depends on the
// weight's shape alone, and every sum is made in one order, whichever of these kernels makes it.
//
// A tile's columns may come in any order that is the same for both sides. Here a thread has 8 that follow one another in memory,
// 16 bytes, of each of its rows: two tiles' parts.
//
// With a norm the product is that of `rmsnorm(x)`: a row's factor, which is known when all of the row was read, is applied to the sums.
// Gated, the weight has two halves of rows, and a result is the first half's, times its sigmoid, times the other's.
//
// The weight and the norm's are read before this waits for the kernel ahead, which must not write them; all else behind it. The kernel
// behind may start before that.

#include "hopper.cuh"

// The most warps of a block.
constexpr u32 WARPS = 8;
// Rows of the weight that tensor cores take at once.
constexpr u32 TILE = 16;
// Columns that a warp reads at once, 8 of each of 4 threads, and how often for a slice.
constexpr u32 STEP = 32;
constexpr u32 STEPS = 4;
constexpr u32 SLICE = STEP * STEPS;
// From one row of `x` to the next among the sums in shared memory, so that a warp's lie in different banks.
constexpr u32 PITCH = 20;
// The most blocks of a cluster.
constexpr u32 CLUSTER = 8;

// What `flags` are made of.
constexpr u32 ADD = 1;
constexpr u32 F32_OUT = 2;
constexpr u32 GATED = 4;

__device__ __forceinline__ float2 to_f32s(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ float2 to_f32s(__half2 x) { return __half22float2(x); }

template <typename T>
struct Pair;
template <>
struct Pair<bf16> {
    typedef __nv_bfloat162 Type;
};
template <>
struct Pair<f16> {
    typedef __half2 Type;
};

// Eight numbers of 16 bytes.
template <typename T>
union Eight {
    uint4 bits;
    typename Pair<T>::Type pairs[4];
    __device__ Eight() {}
};

// What a GPU alone can do, in whose place a test on the host puts the same by other means.

// 16 bytes of the weight, which are used once and written by nobody.
__device__ __forceinline__ uint4 once(const void* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}

// Until here.

__device__ __forceinline__ f32 sigmoid(f32 x) { return 1.0f / (1.0f + __expf(-x)); }

// `inner` is a multiple of 8, and all rows start at multiples of 16 bytes. `rows` are at most ROWS, which is a multiple of 8. `norm` and
// `bias` may be null. `columns` are the result's. With ADD the product is added to what `out` holds, with F32_OUT that is of F32, without
// ADD and bias. With a norm, and gated, which is without ADD, bias and F32_OUT, a cluster is one block.
template <typename T, u32 ROWS, u32 TILES>
__device__ __forceinline__ void few_rows(const T* x, i64 stride, const T* weight, const T* norm, const T* bias, void* out, u32 rows,
                                         u32 columns, u32 inner, f32 eps, u32 flags) {
    constexpr u32 GROUPS = ROWS / 8;
    // How many of a slice's steps ask for `x` at once.
    constexpr u32 AHEAD = 4 / GROUPS;
    __shared__ f32 parts[WARPS][TILES][ROWS * PITCH];
    __shared__ f32 squares[WARPS][ROWS];
    __shared__ f32 gathered[TILES * TILE * ROWS + CLUSTER];
    const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    const u32 group = lane / 4, quarter = lane % 4;
    const u32 blocks = cluster_blocks(), rank = cluster_rank();
    const bool gated = (flags & GATED) != 0, adds = (flags & ADD) != 0;
    // Columns of the result that a tile has and that the block has, which are powers of two, and the block's first.
    const u32 wide_log2 = gated ? 3 : 4, own_log2 = wide_log2 + (TILES - 1);
    const u32 wide = 1 << wide_log2, own = 1 << own_log2, first = cluster_id() << own_log2;
    if (blocks > 1) cluster_arrive();

    // Rows of the weight behind the last are zeros.
    const T* at[TILES][2];
#pragma unroll
    for (u32 t = 0; t < TILES; ++t) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 column = first + t * wide + (gated ? 0 : half * 8) + group;
            const u64 row = column + (gated ? half * columns : 0);
            at[t][half] = column < columns ? weight + row * inner : nullptr;
        }
    }
    u32 slice = rank * warps + warp;
    uint4 held[STEPS][TILES][2], factors[STEPS];
    const auto fetch = [&] {
#pragma unroll
        for (u32 i = 0; i < STEPS; ++i) {
            const u32 k = slice * SLICE + i * STEP + quarter * 8;
#pragma unroll
            for (u32 t = 0; t < TILES; ++t) {
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    const bool is = at[t][half] != nullptr && k < inner;
                    held[i][t][half] = is ? once(at[t][half] + k) : make_uint4(0, 0, 0, 0);
                }
            }
        }
        if (norm != nullptr) {
#pragma unroll
            for (u32 i = 0; i < STEPS; ++i) {
                const u32 k = slice * SLICE + i * STEP + quarter * 8;
                factors[i] = k < inner ? once(norm + k) : make_uint4(0, 0, 0, 0);
            }
        }
    };
    f32 sums[TILES][GROUPS][4] = {};
    f32 square[GROUPS] = {};
    bool waited = false;
#pragma unroll 1
    do {
        fetch();
        if (!waited) {
            let_those_behind_start();
            wait_for_those_ahead();
            waited = true;
        }
#pragma unroll
        for (u32 begin = 0; begin < STEPS; begin += AHEAD) {
            Eight<T> b[AHEAD][GROUPS];
#pragma unroll
            for (u32 i = 0; i < AHEAD; ++i) {
#pragma unroll
                for (u32 j = 0; j < GROUPS; ++j) {
                    const u32 r = j * 8 + group, k = slice * SLICE + (begin + i) * STEP + quarter * 8;
                    const bool is = r < rows && k < inner;
                    b[i][j].bits = is ? *reinterpret_cast<const uint4*>(x + r * stride + k) : make_uint4(0, 0, 0, 0);
                }
            }
            // So that all of these are asked for before the first is used: the assembler would rather save registers.
            __syncwarp();
#pragma unroll
            for (u32 i = 0; i < AHEAD; ++i) {
                if (norm != nullptr) {
                    Eight<T> factor;
                    factor.bits = factors[begin + i];
#pragma unroll
                    for (u32 j = 0; j < GROUPS; ++j) {
#pragma unroll
                        for (u32 n = 0; n < 4; ++n) {
                            const float2 numbers = to_f32s(b[i][j].pairs[n]);
                            square[j] = fmaf(numbers.x, numbers.x, square[j]);
                            square[j] = fmaf(numbers.y, numbers.y, square[j]);
                            b[i][j].pairs[n] = __hmul2(b[i][j].pairs[n], factor.pairs[n]);
                        }
                    }
                }
#pragma unroll
                for (u32 t = 0; t < TILES; ++t) {
                    const uint4 upper = held[begin + i][t][0], lower = held[begin + i][t][1];
#pragma unroll
                    for (u32 j = 0; j < GROUPS; ++j) {
                        const uint4 of = b[i][j].bits;
                        multiply<T>(sums[t][j], upper.x, lower.x, upper.y, lower.y, of.x, of.y);
                        multiply<T>(sums[t][j], upper.z, lower.z, upper.w, lower.w, of.z, of.w);
                    }
                }
            }
        }
        slice += blocks * warps;
    } while (slice * SLICE < inner);

#pragma unroll
    for (u32 t = 0; t < TILES; ++t) {
#pragma unroll
        for (u32 j = 0; j < GROUPS; ++j) {
#pragma unroll
            for (u32 n = 0; n < 4; ++n) {
                parts[warp][t][(j * 8 + quarter * 2 + n % 2) * PITCH + group + n / 2 * 8] = sums[t][j][n];
            }
        }
    }
    if (norm != nullptr) {
#pragma unroll
        for (u32 j = 0; j < GROUPS; ++j) {
            f32 sum = square[j];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            if (quarter == 0) squares[warp][j * 8 + group] = sum;
        }
    }
    __syncthreads();

    // A result for each row of `x` and column of the block's.
    const u32 items = rows * own;
    const auto part = [&](u32 tile, u32 row, u32 column) {
        f32 sum = 0;
#pragma unroll
        for (u32 i = 0; i < WARPS; ++i) {
            if (i < warps) sum += parts[i][tile][row * PITCH + column];
        }
        return sum;
    };
    const auto finish = [&](u32 row, u32 column, f32 sum) {
        if (first + column >= columns) return;
        if (bias != nullptr) sum += to_f32(bias[first + column]);
        const u64 place = static_cast<u64>(row) * columns + first + column;
        if (adds) sum += to_f32(static_cast<const T*>(out)[place]);
        if ((flags & F32_OUT) != 0) {
            static_cast<f32*>(out)[place] = sum;
        } else {
            put(static_cast<T*>(out) + place, sum);
        }
    };
    if (blocks == 1) {
#pragma unroll 1
        for (u32 item = threadIdx.x; item < items; item += blockDim.x) {
            const u32 row = item >> own_log2, column = item & (own - 1);
            f32 factor = 1.0f;
            if (norm != nullptr) {
                f32 sum = 0;
#pragma unroll
                for (u32 i = 0; i < WARPS; ++i) {
                    if (i < warps) sum += squares[i][row];
                }
                factor = rsqrtf(sum / static_cast<f32>(inner) + eps);
            }
            f32 sum = part(column >> wide_log2, row, column & (wide - 1)) * factor;
            if (gated) sum *= sigmoid(sum) * (part(column >> wide_log2, row, (column & (wide - 1)) + wide) * factor);
            finish(row, column, sum);
        }
        return;
    }
    // Each block of the cluster gets all blocks' parts of its share of the results.
    const u32 share = (items + blocks - 1) / blocks;
    cluster_wait();
#pragma unroll 1
    for (u32 item = threadIdx.x; item < items; item += blockDim.x) {
        const u32 row = item >> own_log2, column = item & (own - 1);
        const u32 to = item / share;
        put_in_block(&gathered[rank * share + item - to * share], to, part(column / TILE, row, column % TILE));
    }
    cluster_arrive();
    cluster_wait();
#pragma unroll 1
    for (u32 i = threadIdx.x; i < share && rank * share + i < items; i += blockDim.x) {
        const u32 item = rank * share + i;
        f32 sum = 0;
        for (u32 j = 0; j < blocks; ++j) sum += gathered[j * share + i];
        finish(item >> own_log2, item & (own - 1), sum);
    }
}

// Of 32 rows a thread has more registers, so that one block alone is on a multiprocessor.
#define FEW_ROWS(T, ROWS, TILES)                                                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS* LANES, ROWS == 32 ? 1 : 2) few_rows_##T##_##ROWS##_##TILES(            \
        const T* x, i64 stride, const T* weight, const T* norm, const T* bias, void* out, u32 rows, u32 columns, u32 inner,    \
        f32 eps, u32 flags) {                                                                                                 \
        few_rows<T, ROWS, TILES>(x, stride, weight, norm, bias, out, rows, columns, inner, eps, flags);                       \
    }

FEW_ROWS(bf16, 8, 1)
FEW_ROWS(bf16, 8, 2)
FEW_ROWS(bf16, 16, 1)
FEW_ROWS(bf16, 32, 1)
FEW_ROWS(bf16, 32, 2)
FEW_ROWS(f16, 8, 1)
FEW_ROWS(f16, 8, 2)
FEW_ROWS(f16, 16, 1)
FEW_ROWS(f16, 32, 1)
FEW_ROWS(f16, 32, 2)

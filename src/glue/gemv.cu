// Products of few rows with a weight, which is read once and is all that takes time: `out = x · weightᵀ`.
//
// `cargo xtask glue` compiles this to gemv.ptx, which the crate carries and CUDA's driver translates for its GPU: Hopper and
// newer, which alone know programmatic dependent launch.
//
// A block has 8 rows of the weight, whose columns its warps divide. Each thread asks for all of its part at once, so that as
// much is on its way as the memory can deliver. Tensor cores multiply, of which a tile is 16 rows of `x`, 8 rows of the weight and 16
// columns: rows of `x` that are not there are zeros, which cost nothing, since the tensor cores wait for the memory anyway. So
// no row's result depends on how many others there are, nor on what they hold, and every sum is made in one order.
//
// A tile's columns may come in any order that is the same for both sides. Here a thread has 8 that follow one another in memory,
// 16 bytes, of each of its rows: two tiles' parts.
//
// The weight and the bias are read before this waits for the kernel ahead, which must not write them; all else behind it. The
// kernel behind may start right then.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef __nv_bfloat16 bf16;
typedef __half f16;
typedef float f32;

constexpr u32 LANES = 32;
// The most warps of a block.
constexpr u32 WARPS = 16;
// Rows of the weight that a block has.
constexpr u32 COLUMNS = 8;
// Columns that a warp reads at once: 8 of each of 4 threads.
constexpr u32 STEP = 32;

// What `flags` are made of.
constexpr u32 ADD = 1;
constexpr u32 F32_OUT = 2;

__device__ __forceinline__ f32 to_f32(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ f32 to_f32(f16 x) { return __half2float(x); }
__device__ __forceinline__ void put(bf16* to, f32 x) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void put(f16* to, f32 x) { *to = __float2half_rn(x); }

template <typename T>
__device__ __forceinline__ T nothing();
template <>
__device__ __forceinline__ bf16 nothing<bf16>() {
    return __ushort_as_bfloat16(0);
}
template <>
__device__ __forceinline__ f16 nothing<f16>() {
    return __ushort_as_half(0);
}

// What a GPU alone can do, in whose place a test on the host puts the same by other means.

__device__ __forceinline__ void wait_for_those_ahead() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_those_behind_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// 16 bytes of the weight, which are used once and written by nobody.
__device__ __forceinline__ uint4 once(const void* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}

// sums += rows · columnsᵀ, of 16 by 16 and 8 by 16.
template <typename T>
__device__ __forceinline__ void multiply(f32 (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);

template <>
__device__ __forceinline__ void multiply<bf16>(f32 (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply<f16>(f32 (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Until here.

// `inner` is a multiple of 8, and all rows start at multiples of 16 bytes. `rows` are at most ROWS, which is a multiple of 8. `bias` may be
// null. With ADD the product is added to what `out` holds, with F32_OUT that is of F32, without ADD and bias.
template <typename T, u32 ROWS, u32 LOADS>
__device__ __forceinline__ void few_rows(
    const T* x, i64 stride, const T* weight, const T* bias, void* out, u32 rows, u32 columns, u32 inner, u32 flags) {
    // A tile has two groups of 8 rows.
    constexpr u32 GROUPS = ROWS / 8, TILES = (GROUPS + 1) / 2, ITEMS = ROWS * COLUMNS;
    constexpr u32 CHAINS = 4 / TILES;
    constexpr u32 AHEAD = 8 / GROUPS < LOADS ? 8 / GROUPS : LOADS;
    static_assert(LOADS % AHEAD == 0, "the last of them would be behind the end");
    __shared__ f32 parts[WARPS][ITEMS];
    const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    const u32 group = lane / 4, quarter = lane % 4, first = blockIdx.x * COLUMNS;

    // Rows of the weight behind the last are zeros.
    const bool there = first + group < columns;
    const T* row = weight + static_cast<u64>(there ? first + group : 0) * inner;
    u32 at = warp * (LOADS * STEP) + quarter * 8;
    uint4 held[LOADS];
    auto fetch = [&] {
#pragma unroll
        for (u32 i = 0; i < LOADS; i++) {
            const u32 k = at + i * STEP;
            held[i] = there && k < inner ? once(row + k) : make_uint4(0, 0, 0, 0);
        }
    };
    fetch();

    // The items of the result: a row of `x` and a row of the weight. A thread has one, or several in turn.
    auto is_there = [&](u32 item) { return item < ITEMS && item / COLUMNS < rows && first + item % COLUMNS < columns; };
    auto place = [&](u32 item) { return static_cast<u64>(item / COLUMNS) * columns + first + item % COLUMNS; };
    const bool adds = (flags & ADD) != 0;
    // The first one's, so that nobody waits for them in the end.
    T biased = nothing<T>(), kept = nothing<T>();
    if (bias != nullptr && is_there(threadIdx.x)) biased = bias[first + threadIdx.x % COLUMNS];

    wait_for_those_ahead();
    let_those_behind_start();

    f32 sums[CHAINS][TILES][4] = {};
    bool begun = false;
    while (true) {
#pragma unroll
        for (u32 begin = 0; begin < LOADS; begin += AHEAD) {
            uint4 a[AHEAD][GROUPS];
#pragma unroll
            for (u32 i = 0; i < AHEAD; i++) {
#pragma unroll
                for (u32 j = 0; j < GROUPS; j++) {
                    const u32 r = j * 8 + group, k = at + (begin + i) * STEP;
                    const bool is = r < rows && k < inner;
                    a[i][j] = is ? *reinterpret_cast<const uint4*>(x + r * stride + k) : make_uint4(0, 0, 0, 0);
                }
            }
            if (!begun && adds && is_there(threadIdx.x)) kept = static_cast<const T*>(out)[place(threadIdx.x)];
            begun = true;
            // So that all of these are asked for before the first is used: the assembler would rather save registers.
            __syncwarp();
#pragma unroll
            for (u32 i = 0; i < AHEAD; i++) {
                const uint4 b = held[begin + i];
#pragma unroll
                for (u32 j = 0; j < TILES; j++) {
                    const uint4 upper = a[i][2 * j];
                    const uint4 lower = 2 * j + 1 < GROUPS ? a[i][(2 * j + 1) % GROUPS] : make_uint4(0, 0, 0, 0);
                    // Sums of their own, since each waits for the one before.
                    multiply<T>(sums[2 * i % CHAINS][j], upper.x, lower.x, upper.y, lower.y, b.x, b.y);
                    multiply<T>(sums[(2 * i + 1) % CHAINS][j], upper.z, lower.z, upper.w, lower.w, b.z, b.w);
                }
            }
        }
        at += warps * (LOADS * STEP);
        // The same for all threads of a warp.
        if (at - quarter * 8 >= inner) break;
        fetch();
    }

#pragma unroll
    for (u32 j = 0; j < TILES; j++) {
#pragma unroll
        for (u32 i = 1; i < CHAINS; i++) {
#pragma unroll
            for (u32 n = 0; n < 4; n++) sums[0][j][n] += sums[i][j][n];
        }
        f32* to = parts[warp] + (j * 16 + group) * COLUMNS + quarter * 2;
        to[0] = sums[0][j][0];
        to[1] = sums[0][j][1];
        if (j * 2 + 1 < GROUPS) {
            to[8 * COLUMNS] = sums[0][j][2];
            to[8 * COLUMNS + 1] = sums[0][j][3];
        }
    }
    __syncthreads();
    for (u32 item = threadIdx.x; is_there(item); item += blockDim.x) {
        if (item != threadIdx.x) {
            if (bias != nullptr) biased = bias[first + item % COLUMNS];
            if (adds) kept = static_cast<const T*>(out)[place(item)];
        }
        f32 sum = 0;
        for (u32 i = 0; i < warps; i++) sum += parts[i][item];
        sum += to_f32(biased);
        sum += to_f32(kept);
        if ((flags & F32_OUT) != 0) {
            static_cast<f32*>(out)[place(item)] = sum;
        } else {
            put(static_cast<T*>(out) + place(item), sum);
        }
    }
}

#define FEW_ROWS(T, ROWS, LOADS)                                                                                          \
    extern "C" __global__ void __launch_bounds__(WARPS* LANES) few_rows_##T##_##ROWS##_##LOADS(                            \
        const T* x, i64 stride, const T* weight, const T* bias, void* out, u32 rows, u32 columns, u32 inner, u32 flags) {  \
        few_rows<T, ROWS, LOADS>(x, stride, weight, bias, out, rows, columns, inner, flags);                               \
    }

FEW_ROWS(bf16, 8, 4)
FEW_ROWS(bf16, 8, 8)
FEW_ROWS(bf16, 8, 16)
FEW_ROWS(bf16, 16, 8)
FEW_ROWS(bf16, 32, 8)
FEW_ROWS(f16, 8, 4)
FEW_ROWS(f16, 8, 8)
FEW_ROWS(f16, 8, 16)
FEW_ROWS(f16, 16, 8)
FEW_ROWS(f16, 32, 8)

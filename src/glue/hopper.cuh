// What the sources here for Hopper and newer GPUs have in common: types, numbers of 16 bits, waits for other kernels, clusters and tensor
// cores.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef __nv_bfloat16 bf16;
typedef __half f16;
typedef float f32;

constexpr u32 LANES = 32;

__device__ __forceinline__ f32 to_f32(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ f32 to_f32(f16 x) { return __half2float(x); }
__device__ __forceinline__ void put(bf16* to, f32 x) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void put(f16* to, f32 x) { *to = __float2half_rn(x); }

// What a GPU alone can do, in whose place a test on the host puts the same by other means.

__device__ __forceinline__ void wait_for_those_ahead() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_those_behind_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ u32 cluster_id() {
    u32 id;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(id));
    return id;
}
__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ u32 cluster_blocks() {
    u32 blocks;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return blocks;
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Writes to a place of shared memory in a block of the cluster: the same place as this block's.
__device__ __forceinline__ void put_in_block(f32* place, u32 rank, f32 x) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(there)
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(place))), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(x) : "memory");
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

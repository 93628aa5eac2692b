#pragma once

#include <cuda_runtime.h>

#include <cstdint>

/// Instructions that CUDA C++ has no function for. Device code only.
namespace moq::kernels::cuda {

/// Keeps the compiler from computing a value only where it is used: behind the wait for the kernels
/// ahead every instruction takes time.
__device__ inline void compute_now(int& value) {
  asm volatile("" : "+r"(value));
}
__device__ inline void compute_now(std::uint32_t& value) {
  asm volatile("" : "+r"(value));
}
__device__ inline void compute_now(float& value) {
  asm volatile("" : "+f"(value));
}
template <typename Element>
__device__ void compute_now(const Element*& pointer) {
  asm volatile("" : "+l"(pointer));
}

/// The same for four registers that the compiler would make behind such a wait, since nothing
/// before it needs them. As far as it knows something does: a multiprocessor of no such number
/// would store them.
__device__ inline void need_now(const std::uint32_t (&registers)[4]) {
  std::uint32_t multiprocessor;
  asm("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
  asm volatile(
      "{ .reg .pred p; setp.eq.u32 p, %0, 0xffffffff; @p st.shared.v4.u32 [%0], {%1,%2,%3,%4}; }" ::
          "r"(multiprocessor),
      "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
      : "memory");
}

/// Brings a kernel's parameters into the cache that they are read through, which holds none of them
/// when a kernel begins.
template <typename Parameters>
__device__ void touch(const Parameters& parameters) {
  constexpr std::size_t kLine = 64 / sizeof(int);
#pragma unroll
  for (std::size_t i = 0; i < sizeof(Parameters) / sizeof(int); i += kLine) {
    asm volatile("" ::"r"(reinterpret_cast<const int*>(&parameters)[i]));
  }
}

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

/// To and from an address in shared memory.
__device__ inline void store_shared(std::uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
__device__ inline float load_shared(std::uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ inline uint4 load_shared_quad(std::uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

/// From global memory; what other kernels wrote while this one ran may be read.
__device__ inline uint4 load_global_quad(const void* source) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(source)
               : "memory");
  return value;
}

__device__ inline void store_shared_quad(std::uint32_t address, const uint4& value) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

/// max(x, 0), but a NaN stays one.
__device__ inline float positive_part(float x) {
  float result;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(x));
  return result;
}

/// d += a * b, a [16, 16] row-major, b [16, 8] column-major, float32 sums.
template <bool kBFloat16>
__device__ inline void multiply_accumulate(float (&d)[4], const std::uint32_t (&a)[4],
                                           std::uint32_t b0, std::uint32_t b1) {
  if constexpr (kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// Two or four matrices of 8 rows of 16 bytes in shared memory: lane 8 i + r has the address of row
/// r of matrix i (those of two matrices come from the first 16 lanes). Lane 4 r + t receives bytes
/// 4t to 4t + 3 of row r of each. With the rows of tokens, two matrices of neighbouring columns are
/// a B fragment.
__device__ inline void load_matrices(std::uint32_t address, std::uint32_t (&words)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(address)
               : "memory");
}
__device__ inline void load_matrices(std::uint32_t address, std::uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

/// The same of four matrices whose rows are columns: lane 4 r + t receives column r of rows 2t and
/// 2t + 1.
__device__ inline void load_transposed_matrices(std::uint32_t address, std::uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

/// Two numbers rounded to 16 bits, the first in the low half.
template <bool kBFloat16>
__device__ inline std::uint32_t round_pair(float low, float high) {
  std::uint32_t result;
  if constexpr (kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  }
  return result;
}

/// 2^x with a relative error of 2^-22; results below 2^-126 are 0.
__device__ inline float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ inline std::uint32_t subtract_f16x2(std::uint32_t a, std::uint32_t b) {
  std::uint32_t result;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

/// a - b; sub.bf16x2 needs compute capability 9.0, a fused multiply-add by -1 does not.
__device__ inline std::uint32_t subtract_bf16x2(std::uint32_t a, std::uint32_t b) {
  std::uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(b), "r"(0xbf80bf80U), "r"(a));
  return result;
}

/// Copies 16 bytes to shared memory in the background: the first `bytes` of the source, then zeros.
__device__ inline void copy_bytes_async(std::uint32_t target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes)
               : "memory");
}
/// Copies 16 bytes to shared memory in the background, or writes zeros there.
__device__ inline void copy_async(std::uint32_t target, const void* source, bool exists) {
  copy_bytes_async(target, source, exists ? 16 : 0);
}
/// The same of four bytes.
__device__ inline void copy_word_async(std::uint32_t target, const void* source, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(source),
               "r"(exists ? 4 : 0)
               : "memory");
}
__device__ inline void close_async_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most kPending of the groups that this thread has closed are under way.
template <int kPending>
__device__ inline void wait_async_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Lets the next kernel of the stream start, if it was launched to overlap with this one.
__device__ inline void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
/// Waits until the kernels ahead in the stream have ended and their results are visible.
__device__ inline void wait_for_previous_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// A barrier whose phase ends with so many arrivals.
__device__ inline void init_barrier(std::uint32_t barrier, std::uint32_t arrivals = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
/// Makes initialised barriers known to the copy engine.
__device__ inline void publish_own_barriers() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/// And to the other blocks of the cluster.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  publish_own_barriers();
}
/// Lets the barrier's phase end when that many bytes have come.
__device__ inline void expect_bytes(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
/// Copies bytes (a multiple of 16) that are read once, and tells the barrier.
__device__ inline void bulk_copy(std::uint32_t target, const void* source, std::uint32_t bytes,
                                 std::uint32_t barrier) {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
/// Brings bytes (a multiple of 16) to the L2 cache.
__device__ inline void prefetch_bytes(const void* data, std::uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(data), "r"(bytes) : "memory");
}
__device__ inline void wait_barrier(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

/// True for one lane of a whole warp. The compiler knows that it is alone, and issues a copy whose
/// operands are the warp's at once; behind `lane == 0` it makes a loop over the lanes that may be
/// there.
__device__ __forceinline__ bool elect_lane() {
  std::uint32_t chosen;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }"
               : "=r"(chosen));
  return chosen != 0;
}

/// This thread block's place in its cluster.
__device__ inline std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// The cluster's place in the grid.
__device__ inline std::uint32_t cluster_index() {
  std::uint32_t index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}
/// The two halves of waiting until all threads of a cluster are here; they order no writes but
/// those of publish_barriers.
__device__ inline void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline void meet_cluster() {
  arrive_at_cluster();
  wait_for_cluster();
}
/// A barrier of all threads of a cluster. What they wrote before is visible to them behind.
__device__ inline void synchronize_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// An address in the shared memory of block `rank` of the cluster, where this block has `own`.
__device__ inline std::uint32_t address_in_cluster(std::uint32_t own, std::uint32_t rank) {
  std::uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
  return address;
}
/// Writes to the shared memory of block `rank` of the cluster and tells its barrier of four bytes.
__device__ inline void send_to_cluster(std::uint32_t own, float value, std::uint32_t barrier,
                                       std::uint32_t rank) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
          address_in_cluster(own, rank)),
      "r"(__float_as_uint(value)), "r"(address_in_cluster(barrier, rank))
      : "memory");
}
/// The same of 8 bytes, to an address that is a multiple of 8.
__device__ inline void send_to_cluster(std::uint32_t own, const float2& value,
                                       std::uint32_t barrier, std::uint32_t rank) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];" ::
          "r"(address_in_cluster(own, rank)),
      "f"(value.x), "f"(value.y), "r"(address_in_cluster(barrier, rank))
      : "memory");
}
/// The same of 16 bytes, to an address that is a multiple of 16.
__device__ inline void send_to_cluster(std::uint32_t own, const float4& value,
                                       std::uint32_t barrier, std::uint32_t rank) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, "
      "[%5];" ::"r"(address_in_cluster(own, rank)),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(address_in_cluster(barrier, rank))
      : "memory");
}
/// Tells that barrier that this thread's reads are done. It orders no writes.
__device__ inline void arrive_in_cluster(std::uint32_t barrier, std::uint32_t rank) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   address_in_cluster(barrier, rank))
               : "memory");
}
/// Two numbers of block `rank`, where this block has `own`.
__device__ inline float2 load_from_cluster(const float2* own, std::uint32_t rank) {
  float2 value;
  asm volatile("ld.shared::cluster.v2.f32 {%0,%1}, [%2];"
               : "=f"(value.x), "=f"(value.y)
               : "r"(address_in_cluster(shared_address(own), rank))
               : "memory");
  return value;
}

#endif

}  // namespace moq::kernels::cuda

#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/ptx.h"

/// Instructions of compute capability 9.0 alone (sm_90a): products of a warpgroup (four warps from
/// a multiple of four on) that run in the background, and copies of tiles by tensor maps. Device
/// code only.
namespace moq::kernels::cuda {

constexpr int kWarpgroup = 128;  // threads
constexpr int kGroupRows = 64;   // of a warpgroup's product

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Orders the registers that this warpgroup has written before the products that read them.
__device__ inline void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
/// Closes the group of products begun since the last.
__device__ inline void close_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most kPending of the closed groups are under way.
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define MOQ_F8(d, i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MOQ_F32(d, i) MOQ_F8(d, i), MOQ_F8(d, i + 8), MOQ_F8(d, i + 16), MOQ_F8(d, i + 24)
#define MOQ_P0_7 "%0,%1,%2,%3,%4,%5,%6,%7"
#define MOQ_P0_15 MOQ_P0_7 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define MOQ_P0_31 MOQ_P0_15 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MOQ_P32_39 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define MOQ_P32_47 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define MOQ_P48_63 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define MOQ_P64_79 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define MOQ_P80_95 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define MOQ_P96_127                                                                   \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112" \
  ",%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define MOQ_WGMMA_OF(n, type, sums, a, b, keep, transposes)                            \
  "{ .reg .pred p; setp.ne.b32 p, %" #keep ", 0; wgmma.mma_async.sync.aligned.m64n" #n \
  "k16.f32." type "." type " {" sums "}, " a ", %" #b ", p, 1, 1, " transposes "; }"
#define MOQ_WGMMA(name, n, transposes, sums, a0, a1, a2, a3, b_at, keep, ...)                   \
  template <bool kBFloat16>                                                                     \
  __device__ __forceinline__ void name(float(&d)[n / 2], const std::uint32_t(&a)[4],            \
                                       std::uint64_t b, int keeps) {                            \
    if constexpr (kBFloat16) {                                                                  \
      asm volatile(MOQ_WGMMA_OF(n, "bf16", sums, "{%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}", b_at, \
                                keep, transposes)                                               \
                   : __VA_ARGS__                                                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keeps));           \
    } else {                                                                                    \
      asm volatile(MOQ_WGMMA_OF(n, "f16", sums, "{%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}", b_at,  \
                                keep, transposes)                                               \
                   : __VA_ARGS__                                                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keeps));           \
    }                                                                                           \
  }
#define MOQ_WGMMA_SHARED(n, sums, a_at, b_at, keep, ...)                             \
  template <bool kBFloat16>                                                          \
  __device__ __forceinline__ void multiply_shared(float(&d)[n / 2], std::uint64_t a, \
                                                  std::uint64_t b, int keeps) {      \
    if constexpr (kBFloat16) {                                                       \
      asm volatile(MOQ_WGMMA_OF(n, "bf16", sums, "%" #a_at, b_at, keep, "0, 0")      \
                   : __VA_ARGS__                                                     \
                   : "l"(a), "l"(b), "r"(keeps));                                    \
    } else {                                                                         \
      asm volatile(MOQ_WGMMA_OF(n, "f16", sums, "%" #a_at, b_at, keep, "0, 0")       \
                   : __VA_ARGS__                                                     \
                   : "l"(a), "l"(b), "r"(keeps));                                    \
    }                                                                                \
  }

/// d = (keeps ? d : 0) + a * b: the four warps' rows, 16 each, times 16, 32, 64, 96, 128, 160,
/// 192 or 256 tokens of 16 columns. Lanes hold a as of mma.m16n8k16, and d as of as many of them,
/// eight tokens each.
MOQ_WGMMA(multiply_tokens, 16, "0", MOQ_P0_7, 8, 9, 10, 11, 12, 13, MOQ_F8(d, 0))
MOQ_WGMMA(multiply_tokens, 32, "0", MOQ_P0_15, 16, 17, 18, 19, 20, 21, MOQ_F8(d, 0), MOQ_F8(d, 8))
MOQ_WGMMA(multiply_tokens, 64, "0", MOQ_P0_31, 32, 33, 34, 35, 36, 37, MOQ_F32(d, 0))
MOQ_WGMMA(multiply_tokens, 96, "0", MOQ_P0_31 MOQ_P32_47, 48, 49, 50, 51, 52, 53, MOQ_F32(d, 0),
          MOQ_F8(d, 32), MOQ_F8(d, 40))
MOQ_WGMMA(multiply_tokens, 128, "0", MOQ_P0_31 MOQ_P32_47 MOQ_P48_63, 64, 65, 66, 67, 68, 69,
          MOQ_F32(d, 0), MOQ_F32(d, 32))
MOQ_WGMMA(multiply_tokens, 160, "0", MOQ_P0_31 MOQ_P32_47 MOQ_P48_63 MOQ_P64_79, 80, 81, 82, 83, 84,
          85, MOQ_F32(d, 0), MOQ_F32(d, 32), MOQ_F8(d, 64), MOQ_F8(d, 72))
MOQ_WGMMA(multiply_tokens, 192, "0", MOQ_P0_31 MOQ_P32_47 MOQ_P48_63 MOQ_P64_79 MOQ_P80_95, 96, 97,
          98, 99, 100, 101, MOQ_F32(d, 0), MOQ_F32(d, 32), MOQ_F32(d, 64))
MOQ_WGMMA(multiply_tokens, 256, "0",
          MOQ_P0_31 MOQ_P32_47 MOQ_P48_63 MOQ_P64_79 MOQ_P80_95 MOQ_P96_127, 128, 129, 130, 131,
          132, 133, MOQ_F32(d, 0), MOQ_F32(d, 32), MOQ_F32(d, 64), MOQ_F32(d, 96))

/// The same with 64, 80, 96, 128, 160, 192 or 256 columns of b that lie side by side in shared
/// memory: 16 rows of b, as columns_descriptor tells.
MOQ_WGMMA(multiply_columns, 64, "1", MOQ_P0_31, 32, 33, 34, 35, 36, 37, MOQ_F32(d, 0))
MOQ_WGMMA(multiply_columns, 80, "1", MOQ_P0_31 MOQ_P32_39, 40, 41, 42, 43, 44, 45, MOQ_F32(d, 0),
          MOQ_F8(d, 32))
MOQ_WGMMA(multiply_columns, 96, "1", MOQ_P0_31 MOQ_P32_47, 48, 49, 50, 51, 52, 53, MOQ_F32(d, 0),
          MOQ_F8(d, 32), MOQ_F8(d, 40))
MOQ_WGMMA(multiply_columns, 128, "1", MOQ_P0_31 MOQ_P32_47 MOQ_P48_63, 64, 65, 66, 67, 68, 69,
          MOQ_F32(d, 0), MOQ_F32(d, 32))
MOQ_WGMMA(multiply_columns, 160, "1", MOQ_P0_31 MOQ_P32_47 MOQ_P48_63 MOQ_P64_79, 80, 81, 82, 83,
          84, 85, MOQ_F32(d, 0), MOQ_F32(d, 32), MOQ_F8(d, 64), MOQ_F8(d, 72))
MOQ_WGMMA(multiply_columns, 192, "1", MOQ_P0_31 MOQ_P32_47 MOQ_P48_63 MOQ_P64_79 MOQ_P80_95, 96, 97,
          98, 99, 100, 101, MOQ_F32(d, 0), MOQ_F32(d, 32), MOQ_F32(d, 64))
MOQ_WGMMA(multiply_columns, 256, "1",
          MOQ_P0_31 MOQ_P32_47 MOQ_P48_63 MOQ_P64_79 MOQ_P80_95 MOQ_P96_127, 128, 129, 130, 131,
          132, 133, MOQ_F32(d, 0), MOQ_F32(d, 32), MOQ_F32(d, 64), MOQ_F32(d, 96))

/// The same with a in shared memory too, 64 rows of 16 columns, times 64 or 128 rows of b.
MOQ_WGMMA_SHARED(64, MOQ_P0_31, 32, 33, 34, MOQ_F32(d, 0))
MOQ_WGMMA_SHARED(128, MOQ_P0_31 MOQ_P32_47 MOQ_P48_63, 64, 65, 66, MOQ_F32(d, 0), MOQ_F32(d, 32))

#undef MOQ_WGMMA_SHARED
#undef MOQ_WGMMA
#undef MOQ_WGMMA_OF
#undef MOQ_P96_127
#undef MOQ_P80_95
#undef MOQ_P64_79
#undef MOQ_P48_63
#undef MOQ_P32_47
#undef MOQ_P32_39
#undef MOQ_P0_31
#undef MOQ_P0_15
#undef MOQ_P0_7
#undef MOQ_F32
#undef MOQ_F8

/// What multiply_tokens reads as b: rows of 128 bytes in shared memory, one a token, as a tensor
/// map with 128-byte swizzle lays them out from an address that is a multiple of 1024. Adding 2
/// moves on by 16 columns.
__device__ inline std::uint64_t token_descriptor(std::uint32_t address) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  constexpr std::uint64_t kEightRows = std::uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | std::uint64_t{1} << 16 | (address & 0x3ffffU) >> 4;
}

/// What multiply_shared reads as a or b: rows of 64 bytes (32 columns), their 16 bytes exchanged by
/// swizzle64, from an address that is a multiple of 512. Adding 2 moves on by 16 columns.
__device__ inline std::uint64_t rows_descriptor(std::uint32_t address) {
  constexpr std::uint64_t kSwizzle64 = std::uint64_t{2} << 62;
  constexpr std::uint64_t kEightRows = std::uint64_t{512 >> 4} << 32;
  return kSwizzle64 | kEightRows | std::uint64_t{1} << 16 | (address & 0x3ffffU) >> 4;
}
/// What multiply_columns reads as b: rows as of rows_descriptor, the next 32 columns `block_bytes`
/// behind. Adding 64 moves on by 16 rows.
__device__ inline std::uint64_t columns_descriptor(std::uint32_t address, int block_bytes) {
  constexpr std::uint64_t kLeading = std::uint64_t{0x3fff} << 16;
  return (rows_descriptor(address) & ~kLeading) | static_cast<std::uint64_t>(block_bytes >> 4)
                                                      << 16;
}
/// The place of 16 bytes in a row of 64.
__device__ inline int swizzle64(int row, int chunk) {
  return chunk ^ (row / 2 & 3);
}

/// Lets nothing be made of registers before this, and keeps them from being given to something
/// else: products under way read or write them, of which the compiler does not know.
template <int kSize>
__device__ __forceinline__ void hold(float (&registers)[kSize]) {
#pragma unroll
  for (float& one : registers) {
    asm volatile("" : "+f"(one));
  }
}
template <int kSize>
__device__ __forceinline__ void hold(std::uint32_t (&registers)[kSize]) {
#pragma unroll
  for (std::uint32_t& one : registers) {
    asm volatile("" : "+r"(one));
  }
}

/// Copies the box of a map whose first element is at (x, y), zeros where nothing is, and tells the
/// barrier.
__device__ inline void copy_box(std::uint32_t target, const CUtensorMap& map, int x, int y,
                                std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2, %3}], [%4];" ::"r"(target),
      "l"(&map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}
__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/// Counts for a barrier of this block: what this thread has read may be overwritten.
__device__ inline void arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Four matrices of 8 rows of 8 two-byte elements in shared memory, transposed: lane 8 i + r has
/// the address of row r of matrix i; lane 4 c + t holds elements 2t and 2t + 1 of column c of each.
__device__ inline void store_transposed(std::uint32_t address, const std::uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}
__device__ inline void load_transposed(std::uint32_t address, std::uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

/// A barrier of kThreads threads by its number, 1 to 15.
template <int kThreads>
__device__ inline void meet(int number) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(kThreads) : "memory");
}

/// Gives registers of this warpgroup back, or takes some until each thread has so many. They come
/// from the four parts of a multiprocessor, so every warpgroup of a block has to call one of them.
template <int kRegisters>
__device__ inline void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif

}  // namespace moq::kernels::cuda

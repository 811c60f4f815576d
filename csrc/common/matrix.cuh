// Matrix products of a warp, of operands in shared memory: by matrix instructions where the GPU has them for a type, by
// fused multiply-adds elsewhere, as on the CPU of a test.
#pragma once

#include "common/cuda_vec.cuh"

namespace effk {

#ifdef __CUDA_ARCH__
// float16 has them since sm_75, in half the depth; bfloat16 and TF32 since sm_80.
template <class T>
constexpr bool kMatrixInstructions = std::is_same_v<T, __half> || __CUDA_ARCH__ >= 800;

// Four matrices of 8 rows of 16 bytes: lane i gives the address of row i % 8 of matrix i / 8, and gets four bytes of
// each, those at 4 (i % 4) in row i / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], of 16 bits an element; of float32, half as deep
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
      " {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
#pragma unroll
  for (int half = 0; half < 2; ++half)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(half ? b1 : b0));
#endif
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                             __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
      " {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// In TF32, to which the operands are rounded.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
      " {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T>
__device__ __forceinline__ void round_operands(uint32_t (&bits)[4]) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (uint32_t& value : bits) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(value) : "f"(__uint_as_float(value)));
  }
}
#endif

// A product of a warp, [kRows, kColumns] in registers: in tiles of 16 rows and 8 columns, of which lane i holds columns
// 2 (i % 4) and the next of rows i / 4 and i / 4 + 8.
template <class T, int kTilesDown, int kTilesAcross>
struct WarpProduct {
  static constexpr int kRows = 16 * kTilesDown, kColumns = 8 * kTilesAcross;
  static_assert(kTilesAcross % 2 == 0, "columns are loaded 16 at a time");

  float at[kTilesDown][kTilesAcross][4] = {};

  // Adds a [kRows, depth] times the transpose of b [kColumns, depth]: rows in shared memory, `pitch` elements apart, of
  // which an odd multiple of 16 bytes is without bank conflicts. The depth is a multiple of 32 bytes. float32 is
  // multiplied as it is, or where there are instructions for it and `tf32` allows, in TF32.
  __device__ __forceinline__ void add(const T* a, int a_pitch, const T* b, int b_pitch, int depth,
                                      [[maybe_unused]] bool tf32 = false) {
    const int lane = threadIdx.x % 32;
#ifdef __CUDA_ARCH__
    if constexpr (kMatrixInstructions<T>) {
      if (!std::is_same_v<T, float> || tf32) return multiply(a, a_pitch, b, b_pitch, depth);
    }
#endif
    constexpr int V = 4;
    a += lane / 4 * a_pitch;
    b += lane % 4 * 2 * b_pitch;
    for (int k = 0; k < depth; k += V) {
      float rows[2 * kTilesDown][V], columns[2 * kTilesAcross][V];
#pragma unroll
      for (int i = 0; i < 2 * kTilesDown; ++i) widen(rows[i], a + 8 * i * a_pitch + k);
#pragma unroll
      for (int j = 0; j < 2 * kTilesAcross; ++j) widen(columns[j], b + (j / 2 * 8 + j % 2) * b_pitch + k);
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int i = 0; i < 2 * kTilesDown; ++i)
#pragma unroll
          for (int j = 0; j < 2 * kTilesAcross; ++j) {
            float& sum = at[i / 2][j / 2][i % 2 * 2 + j % 2];
            sum = fmaf(rows[i][v], columns[j][v], sum);
          }
    }
  }

  // Of what this lane holds: row i, column j, and its values there and in the next column.
  static constexpr int kLaneRows = 2 * kTilesDown, kLaneColumns = kTilesAcross;
  static __device__ __forceinline__ int row(int i) { return 8 * i + threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int column(int j) { return 8 * j + threadIdx.x % 4 * 2; }
  __device__ __forceinline__ Vec<float, 2> pair(int i, int j) const {
    return {{at[i / 2][j][i % 2 * 2], at[i / 2][j][i % 2 * 2 + 1]}};
  }

 private:
#ifdef __CUDA_ARCH__
  __device__ __forceinline__ void multiply(const T* a, int a_pitch, const T* b, int b_pitch, int depth) {
    constexpr int V = kVector<T>;
    const int lane = threadIdx.x % 32;
    a += lane % 16 * a_pitch + lane / 16 * V;
    b += (lane / 16 * 8 + lane % 8) * b_pitch + lane / 8 % 2 * V;
    for (int k = 0; k < depth; k += 2 * V) {
      uint32_t rows[kTilesDown][4], columns[kTilesAcross / 2][4];
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i) {
        load_matrices(rows[i], a + 16 * i * a_pitch + k);
        round_operands<T>(rows[i]);
      }
#pragma unroll
      for (int j = 0; j < kTilesAcross / 2; ++j) {
        load_matrices(columns[j], b + 16 * j * b_pitch + k);
        round_operands<T>(columns[j]);
      }
#pragma unroll
      for (int i = 0; i < kTilesDown; ++i)
#pragma unroll
        for (int j = 0; j < kTilesAcross; ++j)
          multiply_add(at[i][j], rows[i], columns[j / 2][j % 2 * 2], columns[j / 2][j % 2 * 2 + 1], T{});
    }
  }
#endif

  template <int V>
  static __device__ __forceinline__ void widen(float (&to)[V], const T* from) {
    const auto vec = Vec<T, V>::load(from);
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = to_float(vec.at[v]);
  }
};

}  // namespace effk

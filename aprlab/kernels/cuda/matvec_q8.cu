// y = W x + bias with quantised W and x rounded to 8 bits by blocks of 32: contract q8. Walks like matvec.cu, four values at
// a time by dp4a. Integer sums are exact, so y is W times the *rounded* x but for the rounding of a few operations a block.
#include "blocks.cuh"

#define PIECES 12  // uint4 a lane and step: eight of quants, one of scales, three of sums

// x: float32 (T, cols), cols a multiple of 32. Makes, for each token, uint4 [step][piece][lane]: chunk 16 step + lane is
// values 128 chunk .. 128 chunk + 127 (zeros stand for those behind the last), and of these
//   pieces 0..7   are 16 signed bytes each: q = x / d, rounded to the nearest, ties away from zero as C's roundf
//   8             the four d = max|x| / 127 (float32; ggml's q8_1 rounds d to float16, this does not)
//   9, 10         d times the sums of 16 q each
//   11            d times the sums of 32 q each
// One warp a block of 32 values, so four warps a chunk.
KERNEL(128) quantise(const float *__restrict__ x, uint4 *__restrict__ out, u32 cols) {
  const u32 steps = (cols + STEP_VALUES - 1) / STEP_VALUES, lane = threadIdx.x & 31, block = threadIdx.x >> 5;
  const u32 chunk = blockIdx.x, i = chunk * 128 + threadIdx.x;
  const float v = i < cols ? x[(u64)blockIdx.y * cols + i] : 0.0f;
  out += ((u64)blockIdx.y * steps + chunk / LANES) * (PIECES * LANES) + chunk % LANES;

  // Magnitudes are compared as whole numbers, which order alike and put NaN on top: one NaN makes d and all sums NaN.
  u32 most = __float_as_uint(v) & 0x7fffffffu;
  most = max(most, shuffle_xor<16>(most));
  most = max(most, shuffle_xor<8>(most));
  most = max(most, shuffle_xor<4>(most));
  most = max(most, shuffle_xor<2>(most));
  most = max(most, shuffle_xor<1>(most));
  const float d = __fdiv_rn(__uint_as_float(most), 127.0f), inverse = d != 0.0f ? __fdiv_rn(1.0f, d) : 0.0f;
  const float scaled = __fmul_rn(v, inverse);
  const int q = __float2int_rz(__fadd_rn(scaled, scaled < 0.0f ? -0.49999997f : 0.49999997f));
  ((i8 *)(out + (threadIdx.x >> 4) * LANES))[threadIdx.x & 15] = (i8)q;

  float sum = (float)q;  // of small whole numbers: exact in any order
  sum = __fadd_rn(sum, shuffle_xor<8>(sum));
  sum = __fadd_rn(sum, shuffle_xor<4>(sum));
  sum = __fadd_rn(sum, shuffle_xor<2>(sum));
  sum = __fadd_rn(sum, shuffle_xor<1>(sum));
  const float both = __fadd_rn(sum, shuffle_xor<16>(sum));
  const u32 half = threadIdx.x >> 4;
  if ((lane & 15) == 0) ((float *)(out + (9 + (half >> 2)) * LANES))[half & 3] = __fmul_rn(sum, d);
  if (lane == 0) {
    ((float *)(out + 8 * LANES))[block] = d;
    ((float *)(out + 11 * LANES))[block] = __fmul_rn(both, d);
  }
}

DEVICE float4 floats(uint4 v) {
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

struct Bytes8 {
  static constexpr float FACTOR = 1.0f;
  const uint4 *prepared;

  DEVICE Bytes8 of_token(const uint4 *prepared, u32 cols) {
    return {prepared + (u64)(blockIdx.y * ((cols + STEP_VALUES - 1) / STEP_VALUES)) * (PIECES * LANES) +
            threadIdx.x % LANES};
  }

  template <class Type>
  __device__ __forceinline__ void add(const Type (&t)[ROWS], u32 lane, u32 step, float (&acc)[ROWS]) const {
    const uint4 *x = prepared + step * (PIECES * LANES);
    int dots[ROWS][Type::GROUPS] = {};
#pragma unroll
    for (int k = 0; k < 32; k += 4) {
      const uint4 v = x[k / 4 * LANES];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        int &sum = dots[r][k * Type::GROUPS / 32];
        sum = dot_bytes(Type::bytes(t[r], k), v.x, sum);
        sum = dot_bytes(Type::bytes(t[r], k + 1), v.y, sum);
        sum = dot_bytes(Type::bytes(t[r], k + 2), v.z, sum);
        sum = dot_bytes(Type::bytes(t[r], k + 3), v.w, sum);
      }
    }
    const float4 scales = floats(x[8 * LANES]);
    const float d[4] = {scales.x, scales.y, scales.z, scales.w};
    float s[Type::GROUPS];
    if constexpr (Type::GROUPS == 4) {
      const float4 v = floats(x[11 * LANES]);
      s[0] = v.x, s[1] = v.y, s[2] = v.z, s[3] = v.w;
    } else {
      const float4 v = floats(x[9 * LANES]), w = floats(x[10 * LANES]);
      s[0] = v.x, s[1] = v.y, s[2] = v.z, s[3] = v.w, s[4] = w.x, s[5] = w.y, s[6] = w.z, s[7] = w.w;
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float a[Type::GROUPS];
#pragma unroll
      for (int g = 0; g < Type::GROUPS; ++g) {
        a[g] = __fmul_rn(d[g * 4 / Type::GROUPS], (float)dots[r][g]);
        if constexpr (Type::CENTRE != 0 && !Type::SIGNED) a[g] = __fmaf_rn(-(float)Type::CENTRE, s[g], a[g]);
      }
      acc[r] = Type::finish(t[r], acc[r], a, s);
    }
  }
};

#define OF_TYPE(Type, name)                                                                                        \
  MATVEC_KERNEL matvec_##name##_q8(const u8 *__restrict__ w, const uint4 *__restrict__ prepared,             \
                                        const float *__restrict__ bias, float *__restrict__ y, u32 rows, u32 cols) { \
    matvec<Type>(w, Bytes8::of_token(prepared, cols), bias, y, rows, cols);                                        \
  }

OF_TYPE(Q4_0, q4_0)
OF_TYPE(Q4_1, q4_1)
OF_TYPE(Q5_0, q5_0)
OF_TYPE(Q5_1, q5_1)
OF_TYPE(Q8_0, q8_0)
OF_TYPE(Q4_K, q4_k)
OF_TYPE(Q5_K, q5_k)
OF_TYPE(Q6_K, q6_k)

// y = W x + bias with quantised W and float32 x: contract f32. Half a warp makes two rows, a block eight; block row y of
// the grid is one token. W stays in the bytes of its file.
//
// Small whole numbers need no conversion. The bits of an integer q < 2^24, read as float32, are the subnormal q 2^-149,
// and a fused multiply-add takes subnormals at full speed. So a value is cut out of its word by one AND, where it
// stands, and multiplied by an activation that `prepare` has scaled by 2^90 and by the place: x 2^(90 - 8 place), for the
// bytes at places 0, 1, 2; the top byte is shifted down. Sums are in units of 2^-59 until the end. All scalings are
// powers of two, hence exact, for |x| < 2^37; only a sum below 2^-66 loses bits.
#include "blocks.cuh"

#define SCALE_0 1.2379400392853803e27f  // 2^90
#define SCALE_1 4.835703278458517e24f   // 2^82
#define SCALE_2 1.888946593147858e22f   // 2^74
#define PER_UNIT 5.764607523034235e17f  // 2^59
#define PIECES 36                       // float4 a lane and step: 32 of activations, four of sums

// x: float32 (T, cols), cols a multiple of 32. Makes, for each token, float4 [step][piece][lane]: chunk 16 step + lane is
// values 128 chunk .. 128 chunk + 127 (zeros stand for those behind the last), and of these
//   pieces 0..31   are four values each, scaled by place
//   32, 33         -2^90 times the sums of 16 values each
//   34             -2^90 times the sums of 32 values each
//   35             the same, scaled by place
// Eight threads a chunk.
KERNEL(128) prepare(const float4 *__restrict__ x, float4 *__restrict__ out, u32 cols) {
  const u32 steps = (cols + STEP_VALUES - 1) / STEP_VALUES, group = blockIdx.x * 128 + threadIdx.x, eighth = group & 7;
  const bool inside = group * 16 < cols;
  x += (u64)blockIdx.y * (cols / 4) + group * 4;
  out += ((u64)blockIdx.y * steps + blockIdx.x) * (PIECES * LANES) + (threadIdx.x >> 3);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (inside) v = x[i];
    sum = __fadd_rn(sum, __fadd_rn(__fadd_rn(v.x, v.y), __fadd_rn(v.z, v.w)));
    v = make_float4(__fmul_rn(v.x, SCALE_0), __fmul_rn(v.y, SCALE_1), __fmul_rn(v.z, SCALE_2), __fmul_rn(v.w, SCALE_0));
    out[(eighth * 4 + i) * LANES] = v;
  }
  const float both = __fadd_rn(sum, shuffle_xor<1>(sum));
  ((float *)(out + (32 + (eighth >> 2)) * LANES))[eighth & 3] = __fmul_rn(sum, -SCALE_0);
  if (eighth & 1) return;
  const u32 place = eighth >> 1;
  ((float *)(out + 34 * LANES))[place] = __fmul_rn(both, -SCALE_0);
  ((float *)(out + 35 * LANES))[place] = __fmul_rn(both, place == 1 ? -SCALE_1 : place == 2 ? -SCALE_2 : -SCALE_0);
}

// sum + four bytes of q times four activations; `first` starts a sum.
DEVICE float dot4(u32 q, float4 x, float sum, bool first) {
  sum = first ? mul_bits(q & 0xff, x.x) : fma_bits(q & 0xff, x.x, sum);
  sum = fma_bits(q & 0xff00, x.y, sum);
  sum = fma_bits(q & 0xff0000, x.z, sum);
  return fma_bits(q >> 24, x.w, sum);
}

struct Floats {
  static constexpr float FACTOR = PER_UNIT;
  const float4 *prepared;

  DEVICE Floats of_token(const float4 *prepared, u32 cols) {
    return {prepared + (u64)(blockIdx.y * ((cols + STEP_VALUES - 1) / STEP_VALUES)) * (PIECES * LANES) +
            threadIdx.x % LANES};
  }

  template <class Type>
  __device__ __forceinline__ void add(const Type (&t)[ROWS], u32 lane, u32 step, float (&acc)[ROWS]) const {
    const float4 *x = prepared + step * (PIECES * LANES);
    float a[ROWS][Type::GROUPS];
    if constexpr (Type::NIBBLES) {
      // Low nibbles count once. High ones stay where they are and count sixteen times, but for the top one.
      float sixteen[ROWS][4];
#pragma unroll
      for (int k = 0; k < 32; ++k) {
        const float4 v = x[k * LANES];
        const bool first = k % 8 == 0;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const u32 q = Type::word(t[r], k);
          float &one = a[r][k >> 3], &high = sixteen[r][k >> 3];
          if (Type::high(k)) {
            high = first || !Type::high(k - 1) ? mul_bits(q & 0xf0, v.x) : fma_bits(q & 0xf0, v.x, high);
            high = fma_bits(q & 0xf000, v.y, high);
            high = fma_bits(q & 0xf00000, v.z, high);
            one = first ? mul_bits(q >> 28, v.w) : fma_bits(q >> 28, v.w, one);
          } else {
            one = first ? mul_bits(q & 0xf, v.x) : fma_bits(q & 0xf, v.x, one);
            one = fma_bits(q & 0xf00, v.y, one);
            one = fma_bits(q & 0xf0000, v.z, one);
            one = fma_bits(nibble_6(q), v.w, one);
          }
        }
      }
#pragma unroll
      for (int g = 0; g < 4; ++g)
        if (Type::high(g * 8 + 7))
#pragma unroll
          for (int r = 0; r < ROWS; ++r) a[r][g] = __fmaf_rn(sixteen[r][g], 0.0625f, a[r][g]);
    } else {
#pragma unroll
      for (int k = 0; k < 32; ++k) {
        const float4 v = x[k * LANES];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          float &sum = a[r][k * Type::GROUPS / 32];
          sum = dot4(Type::bytes(t[r], k) ^ (Type::SIGNED ? 0x80808080u : 0u), v, sum, k % (32 / Type::GROUPS) == 0);
        }
      }
    }
    if constexpr (Type::K_SCALES) {
      const float4 s = x[35 * LANES];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const u32 scales = t[r].scales, mins = t[r].mins;
        float sum = __fmul_rn(byte_0(scales), a[r][0]);
        sum = __fmaf_rn(byte_0(scales >> 8), a[r][1], sum);
        sum = __fmaf_rn(byte_0(scales >> 16), a[r][2], sum);
        sum = __fmaf_rn(byte_0(scales >> 24), a[r][3], sum);
        const float less = dot4(mins, s, 0.0f, true);  // mins are whole numbers too; s is below zero
        const float2 d = halves(t[r].d);
        acc[r] = __fmaf_rn(d.y, less, __fmaf_rn(d.x, sum, acc[r]));
      }
    } else {
      float s[Type::GROUPS];
      if constexpr (Type::GROUPS == 4) {
        const float4 v = x[34 * LANES];
        s[0] = v.x, s[1] = v.y, s[2] = v.z, s[3] = v.w;
      } else {
        const float4 v = x[32 * LANES], w = x[33 * LANES];
        s[0] = v.x, s[1] = v.y, s[2] = v.z, s[3] = v.w, s[4] = w.x, s[5] = w.y, s[6] = w.z, s[7] = w.w;
      }
#pragma unroll
      for (int g = 0; g < Type::GROUPS; ++g) {
        if constexpr (Type::CENTRE != 0)
#pragma unroll
          for (int r = 0; r < ROWS; ++r) a[r][g] = fma_bits(Type::CENTRE, s[g], a[r][g]);
        else s[g] = mul_bits(0x80000001u, s[g]);  // -2^-149: the sum itself, in units
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) acc[r] = Type::finish(t[r], acc[r], a[r], s);
    }
  }
};

#define OF_TYPE(Type, name)                                                                                     \
  MATVEC_KERNEL matvec_##name(const u8 *__restrict__ w, const float4 *__restrict__ prepared,              \
                                   const float *__restrict__ bias, float *__restrict__ y, u32 rows, u32 cols) { \
    matvec<Type>(w, Floats::of_token(prepared, cols), bias, y, rows, cols);                                     \
  }

OF_TYPE(Q4_0, q4_0)
OF_TYPE(Q4_1, q4_1)
OF_TYPE(Q5_0, q5_0)
OF_TYPE(Q5_1, q5_1)
OF_TYPE(Q8_0, q8_0)
OF_TYPE(Q4_K, q4_k)
OF_TYPE(Q5_K, q5_k)
OF_TYPE(Q6_K, q6_k)

// ---- plain floats: nothing to unpack, activations in their own order ---------------------------------------------

struct F16 {
  enum { BYTES = 2 };
  DEVICE float value(u32 bits) { return scale_at(bits); }
};

struct BF16 {
  enum { BYTES = 2 };
  DEVICE float value(u32 bits) { return bf16_to_f32(bits); }
};

// Eight values a lane and step; where rows are not multiples of 16 bytes, one.
template <class Type>
DEVICE void matvec_plain(const u8 *w, const float *x, const float *bias, float *y, u32 rows, u32 cols) {
  const u32 lane = threadIdx.x % LANES;
  const Pair pair = Pair::of_thread(rows);
  const u8 *from[ROWS] = {w + (u64)pair.first * cols * Type::BYTES, w + (u64)pair.second * cols * Type::BYTES};
  x += (u64)blockIdx.y * cols;

  float acc[ROWS] = {0.0f, 0.0f};
  if (cols % 8 == 0) {
    for (u32 i = lane; i < cols / 8; i += LANES) {
      const float4 a = ((const float4 *)x)[2 * i], b = ((const float4 *)x)[2 * i + 1];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const uint4 q = ((const uint4 *)from[r])[i];
        acc[r] = __fmaf_rn(Type::value(q.x), a.x, acc[r]);
        acc[r] = __fmaf_rn(Type::value(q.x >> 16), a.y, acc[r]);
        acc[r] = __fmaf_rn(Type::value(q.y), a.z, acc[r]);
        acc[r] = __fmaf_rn(Type::value(q.y >> 16), a.w, acc[r]);
        acc[r] = __fmaf_rn(Type::value(q.z), b.x, acc[r]);
        acc[r] = __fmaf_rn(Type::value(q.z >> 16), b.y, acc[r]);
        acc[r] = __fmaf_rn(Type::value(q.w), b.z, acc[r]);
        acc[r] = __fmaf_rn(Type::value(q.w >> 16), b.w, acc[r]);
      }
    }
  } else {
    for (u32 i = lane; i < cols; i += LANES)
#pragma unroll
      for (int r = 0; r < ROWS; ++r) acc[r] = __fmaf_rn(Type::value(load2(from[r] + 2 * i)), x[i], acc[r]);
  }
  __syncwarp();
  store_rows(acc, 1.0f, bias, y + (u64)blockIdx.y * rows, pair.row, rows);
}

MATVEC_KERNEL matvec_f16(const u8 *__restrict__ w, const float *__restrict__ x, const float *__restrict__ bias,
                              float *__restrict__ y, u32 rows, u32 cols) {
  matvec_plain<F16>(w, x, bias, y, rows, cols);
}

MATVEC_KERNEL matvec_bf16(const u8 *__restrict__ w, const float *__restrict__ x, const float *__restrict__ bias,
                               float *__restrict__ y, u32 rows, u32 cols) {
  matvec_plain<BF16>(w, x, bias, y, rows, cols);
}

MATVEC_KERNEL matvec_f32(const float *__restrict__ w, const float *__restrict__ x, const float *__restrict__ bias,
                              float *__restrict__ y, u32 rows, u32 cols) {
  const Pair pair = Pair::of_thread(rows);
  float acc[ROWS] = {0.0f, 0.0f};
  for (u32 i = threadIdx.x % LANES; i < cols; i += LANES) {
    const float a = x[(u64)blockIdx.y * cols + i];
    acc[0] = __fmaf_rn(w[(u64)pair.first * cols + i], a, acc[0]);
    acc[1] = __fmaf_rn(w[(u64)pair.second * cols + i], a, acc[1]);
  }
  __syncwarp();
  store_rows(acc, 1.0f, bias, y + (u64)blockIdx.y * rows, pair.row, rows);
}

// What every kernel file begins with. No header is included: NVRTC needs nothing but this text.
//
// Floats are added and multiplied only through the __f*_rn intrinsics. A plain `a * b + c` would leave unsuffixed
// mul.f32 and add.f32 in the PTX, which the assembler may fuse; so written, PTX says exactly what a GPU computes.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)

#ifndef APRLAB_ON_HOST  // the tests build this text for the CPU too and bring their own versions of these
DEVICE float f16_to_f32_rn(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

DEVICE u16 f32_to_f16_rn(float value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// Eight-bit dot product: acc + the four signed bytes of a times those of b.
DEVICE int dot_bytes(u32 a, u32 b, int acc) { return __dp4a((int)a, (int)b, acc); }

// The float whose bits are q, times x (plus acc, rounded once). Said in PTX, since the bits then need no move into a
// float register first.
DEVICE float fma_bits(u32 q, float x, float acc) {
  asm("fma.rn.f32 %0, %1, %2, %0;" : "+f"(acc) : "r"(q), "f"(x));
  return acc;
}

DEVICE float mul_bits(u32 q, float x) {
  float product;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "r"(q), "f"(x));
  return product;
}

// Bits 24 to 27.
DEVICE u32 nibble_6(u32 q) {
  u32 bits;
  asm("bfe.u32 %0, %1, 24, 4;" : "=r"(bits) : "r"(q));
  return bits;
}

// The lowest byte as a number.
DEVICE float byte_0(u32 q) {
  float value;
  asm("cvt.rn.f32.u8 %0, %1;" : "=f"(value) : "r"(q));
  return value;
}

// The value of lane (own ^ LANES); all lanes take part.
template <int LANES> DEVICE float shuffle_xor(float value) {
  float other;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=f"(other) : "f"(value), "n"(LANES));
  return other;
}

template <int LANES> DEVICE u32 shuffle_xor(u32 value) {
  u32 other;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=r"(other) : "r"(value), "n"(LANES));
  return other;
}

// Two float16 in one word.
DEVICE float2 halves(u32 q) {
  float2 v;
  asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\tcvt.f32.f16 %0, low;\n\tcvt.f32.f16 %1, high;\n\t}"
      : "=f"(v.x), "=f"(v.y) : "r"(q));
  return v;
}

// a | (b & c)
DEVICE u32 or_and(u32 a, u32 b, u32 c) {
  u32 bits;
  asm("lop3.b32 %0, %1, %2, %3, 0xf8;" : "=r"(bits) : "r"(a), "r"(b), "r"(c));
  return bits;
}
#endif

// ---- bytes -------------------------------------------------------------------------------------------------------

// Blocks of 18, 20, 22, 24, 34 and 210 bytes start at even addresses and no better: two bytes at a time.
DEVICE u32 load2(const u8 *at) { return __ldg((const u16 *)at); }
DEVICE u32 load4(const u8 *at) { return load2(at) | load2(at + 2) << 16; }

DEVICE float scale_at(u32 bits) { return f16_to_f32_rn((u16)bits); }
DEVICE float bf16_to_f32(u32 bits) { return __uint_as_float(bits << 16); }

// Four values: `low` has their low four bits, one value a byte; bits 0..3 of `bits` become bit 4 of bytes 0..3. The four
// products do not overlap, and what they leave elsewhere is masked.
DEVICE u32 with_fifth_bits(u32 low, u32 bits) { return or_and(low, (bits & 0xf) * 0x02040810u, 0x10101010u); }

// Q4_K and Q5_K: six-bit scales (or mins) of four neighbouring sub-blocks, one a byte. `head` is the first 16 bytes of a
// block: d, dmin and twelve bytes 0..11. Scales 0..3 are the low six bits of bytes 0..3 (mins: 4..7); scales 4..7 have
// their low four bits in the low nibbles of bytes 8..11 (mins: the high ones), their top two above scales (mins) 0..3.
DEVICE u32 six_bits(u32 first, u32 last, bool upper) {
  const u32 keep = upper ? 0x30303030u : 0x3f3f3f3fu, nibbles = upper ? 0x0f0f0f0fu : 0u;
  return or_and(first >> (upper ? 2 : 0) & keep, last, nibbles);
}

DEVICE u32 k_scales(uint4 head, bool upper) { return six_bits(head.y, head.w, upper); }
DEVICE u32 k_mins(uint4 head, bool upper) { return six_bits(head.z, head.w >> 4, upper); }

// ---- warps and blocks --------------------------------------------------------------------------------------------

DEVICE float warp_sum(float value) {
  value = __fadd_rn(value, shuffle_xor<16>(value));
  value = __fadd_rn(value, shuffle_xor<8>(value));
  value = __fadd_rn(value, shuffle_xor<4>(value));
  value = __fadd_rn(value, shuffle_xor<2>(value));
  return __fadd_rn(value, shuffle_xor<1>(value));
}

// Sums over half a warp, two at once: of each 16 lanes the first eight get that of a, the others that of b.
DEVICE float half_warp_sums(float a, float b) {
  const bool upper = threadIdx.x & 8;
  float value = __fadd_rn(upper ? b : a, shuffle_xor<8>(upper ? a : b));
  value = __fadd_rn(value, shuffle_xor<4>(value));
  value = __fadd_rn(value, shuffle_xor<2>(value));
  return __fadd_rn(value, shuffle_xor<1>(value));
}

// ---- functions ---------------------------------------------------------------------------------------------------

// e^x within 2 ulp, by explicitly rounded steps only: unlike ex2.approx, every machine gets the same bits.
// x = n ln 2 + r, |r| < 0.35; the Taylor series to r^7 leaves 6e-9. NaN stays NaN.
DEVICE float exp_f32(float x) {
  x = x < -110.0f ? -110.0f : x;
  x = x > 90.0f ? 90.0f : x;
  const int n = __float2int_rn(__fmul_rn(x, 1.44269504f));
  float r = __fmaf_rn((float)n, -0.693145752f, x);  // ln 2 in two parts: the first has few bits, n times it is exact
  r = __fmaf_rn((float)n, -1.42860677e-6f, r);
  float p = __fmaf_rn(1.98412698e-4f, r, 1.38888889e-3f);
  p = __fmaf_rn(p, r, 8.33333333e-3f);
  p = __fmaf_rn(p, r, 4.16666667e-2f);
  p = __fmaf_rn(p, r, 1.66666667e-1f);
  p = __fmaf_rn(p, r, 0.5f);
  p = __fmaf_rn(p, r, 1.0f);
  p = __fmaf_rn(p, r, 1.0f);
  const int half = n >> 1;  // 2^n in two factors, so that the ends of the range neither wrap nor round twice
  p = __fmul_rn(p, __int_as_float((half + 127) << 23));
  return __fmul_rn(p, __int_as_float((n - half + 127) << 23));
}

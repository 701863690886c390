// Blocks to values: float32 (bit for bit what gguf computes, at most one rounding a value) and float16 (that, rounded).
// One thread makes four neighbouring values: they share a scale in every type, and four floats are one 16-byte store.
#include "prelude.cuh"

// A type says how many values and bytes a block has, and makes values i..i+3 of one block, i a multiple of 4.

struct Q4_0 {  // d f16 | 16 bytes: low nibbles are values 0..15, high nibbles 16..31 | d (q - 8)
  enum { VALUES = 32, BYTES = 18 };
  DEVICE float4 values(const u8 *block, u32 i) {
    const float d = scale_at(load2(block));
    const u32 q = load4(block + 2 + (i & 15)) >> (i < 16 ? 0 : 4);
    return make_float4(__fmul_rn(d, (float)((int)(q & 15) - 8)), __fmul_rn(d, (float)((int)(q >> 8 & 15) - 8)),
                       __fmul_rn(d, (float)((int)(q >> 16 & 15) - 8)), __fmul_rn(d, (float)((int)(q >> 24 & 15) - 8)));
  }
};

struct Q4_1 {  // d, m f16 | 16 bytes as Q4_0 | d q + m
  enum { VALUES = 32, BYTES = 20 };
  DEVICE float4 values(const u8 *block, u32 i) {
    const float d = scale_at(load2(block)), m = scale_at(load2(block + 2));
    const u32 q = load4(block + 4 + (i & 15)) >> (i < 16 ? 0 : 4);
    return make_float4(__fmaf_rn(d, (float)(q & 15), m), __fmaf_rn(d, (float)(q >> 8 & 15), m),
                       __fmaf_rn(d, (float)(q >> 16 & 15), m), __fmaf_rn(d, (float)(q >> 24 & 15), m));
  }
};

// Q5_0 and Q5_1: the fifth bit of value i is bit i of the 32-bit word qh.
DEVICE u32 five_bits(const u8 *qh, const u8 *qs, u32 i) {
  const u32 low = load4(qs + (i & 15)) >> (i < 16 ? 0 : 4) & 0x0f0f0f0fu;
  return with_fifth_bits(low, load4(qh) >> i);
}

struct Q5_0 {  // d f16 | qh 4 bytes | 16 bytes as Q4_0 | d (q - 16)
  enum { VALUES = 32, BYTES = 22 };
  DEVICE float4 values(const u8 *block, u32 i) {
    const float d = scale_at(load2(block));
    const u32 q = five_bits(block + 2, block + 6, i);
    return make_float4(__fmul_rn(d, (float)((int)(q & 31) - 16)), __fmul_rn(d, (float)((int)(q >> 8 & 31) - 16)),
                       __fmul_rn(d, (float)((int)(q >> 16 & 31) - 16)), __fmul_rn(d, (float)((int)(q >> 24) - 16)));
  }
};

struct Q5_1 {  // d, m f16 | qh 4 bytes | 16 bytes as Q4_0 | d q + m
  enum { VALUES = 32, BYTES = 24 };
  DEVICE float4 values(const u8 *block, u32 i) {
    const float d = scale_at(load2(block)), m = scale_at(load2(block + 2));
    const u32 q = five_bits(block + 4, block + 8, i);
    return make_float4(__fmaf_rn(d, (float)(q & 31), m), __fmaf_rn(d, (float)(q >> 8 & 31), m),
                       __fmaf_rn(d, (float)(q >> 16 & 31), m), __fmaf_rn(d, (float)(q >> 24), m));
  }
};

struct Q8_0 {  // d f16 | 32 signed bytes | d q
  enum { VALUES = 32, BYTES = 34 };
  DEVICE float4 values(const u8 *block, u32 i) {
    const float d = scale_at(load2(block));
    const int q = (int)load4(block + 2 + i);
    return make_float4(__fmul_rn(d, (float)(i8)q), __fmul_rn(d, (float)(i8)(q >> 8)),
                       __fmul_rn(d, (float)(i8)(q >> 16)), __fmul_rn(d, (float)(q >> 24)));
  }
};

// Q4_K and Q5_K: d scale q - dmin min. Both products are exact in float32, so the subtraction is the one rounding.
DEVICE float4 k_values(const u8 *block, u32 i, u32 q) {
  const uint4 head = __ldg((const uint4 *)block);  // both block sizes are multiples of 16
  const u32 s = i >> 5, at = 8 * (s & 3);          // sub-block, and where its six bits stand
  const float d = __fmul_rn(scale_at(head.x), (float)(k_scales(head, s >= 4) >> at & 63));
  const float m = __fmul_rn(scale_at(head.x >> 16), (float)(k_mins(head, s >= 4) >> at & 63));
  return make_float4(__fsub_rn(__fmul_rn(d, (float)(q & 255)), m), __fsub_rn(__fmul_rn(d, (float)(q >> 8 & 255)), m),
                     __fsub_rn(__fmul_rn(d, (float)(q >> 16 & 255)), m), __fsub_rn(__fmul_rn(d, (float)(q >> 24)), m));
}

struct Q4_K {  // d, dmin f16 | 12 bytes of scales | 128 bytes: four chunks of 32 bytes = 64 values
  enum { VALUES = 256, BYTES = 144 };
  DEVICE float4 values(const u8 *block, u32 i) {
    const u32 q = __ldg((const u32 *)(block + 16 + (i >> 6) * 32 + (i & 31)));
    return k_values(block, i, q >> (i & 32 ? 4 : 0) & 0x0f0f0f0fu);
  }
};

struct Q5_K {  // d, dmin f16 | 12 bytes of scales | qh 32 bytes: bit s of byte l is value l of sub-block s | 128 as Q4_K
  enum { VALUES = 256, BYTES = 176 };
  DEVICE float4 values(const u8 *block, u32 i) {
    const u32 q = __ldg((const u32 *)(block + 48 + (i >> 6) * 32 + (i & 31)));
    const u32 fifth = __ldg((const u32 *)(block + 16 + (i & 31))) >> (i >> 5) & 0x01010101u;
    return k_values(block, i, (q >> (i & 32 ? 4 : 0) & 0x0f0f0f0fu) | fifth << 4);
  }
};

struct Q6_K {  // ql 128 bytes | qh 64 | 16 signed scales | d f16; each half is 128 values in four runs of 32 | d s (q - 32)
  enum { VALUES = 256, BYTES = 210 };
  DEVICE float4 values(const u8 *block, u32 i) {
    const u32 half = i >> 7, run = i >> 5 & 3, l = i & 31;
    const u32 low = load4(block + half * 64 + (run & 1) * 32 + l) >> (run < 2 ? 0 : 4) & 0x0f0f0f0fu;
    const u32 top = load4(block + 128 + half * 32 + l) >> (2 * run) & 0x03030303u;
    const u32 q = low | top << 4;
    const float d = __fmul_rn(scale_at(load2(block + 208)), (float)(i8)__ldg(block + 192 + (i >> 4)));
    return make_float4(__fmul_rn(d, (float)((int)(q & 63) - 32)), __fmul_rn(d, (float)((int)(q >> 8 & 63) - 32)),
                       __fmul_rn(d, (float)((int)(q >> 16 & 63) - 32)), __fmul_rn(d, (float)((int)(q >> 24) - 32)));
  }
};

struct F16 {
  enum { VALUES = 4, BYTES = 8 };
  DEVICE float4 values(const u8 *block, u32) {
    const uint2 q = __ldg((const uint2 *)block);
    return make_float4(scale_at(q.x), scale_at(q.x >> 16), scale_at(q.y), scale_at(q.y >> 16));
  }
};

struct BF16 {
  enum { VALUES = 4, BYTES = 8 };
  DEVICE float4 values(const u8 *block, u32) {
    const uint2 q = __ldg((const uint2 *)block);
    return make_float4(bf16_to_f32(q.x), bf16_to_f32(q.x >> 16), bf16_to_f32(q.y), bf16_to_f32(q.y >> 16));
  }
};

struct F32 {
  enum { VALUES = 4, BYTES = 16 };
  DEVICE float4 values(const u8 *block, u32) { return __ldg((const float4 *)block); }
};

// Values 4 quad .. 4 quad + 3 of a run of whole blocks.
template <class Type> DEVICE float4 quad_values(const u8 *w, u32 quad) {
  const u32 quads = Type::VALUES / 4;
  return Type::values(w + (u64)(quad / quads) * Type::BYTES, quad % quads * 4);
}

// w: blocks; y: float32 or float16 (quads * 4,). One thread a quad.
template <class Type> DEVICE void to_f32(const u8 *w, float4 *y, u32 quads) {
  const u32 quad = blockIdx.x * 256 + threadIdx.x;
  if (quad < quads) y[quad] = quad_values<Type>(w, quad);
}

template <class Type> DEVICE void to_f16(const u8 *w, uint2 *y, u32 quads) {
  const u32 quad = blockIdx.x * 256 + threadIdx.x;
  if (quad >= quads) return;
  const float4 v = quad_values<Type>(w, quad);
  y[quad] = make_uint2((u32)f32_to_f16_rn(v.x) | (u32)f32_to_f16_rn(v.y) << 16,
                       (u32)f32_to_f16_rn(v.z) | (u32)f32_to_f16_rn(v.w) << 16);
}

// w: blocks (vocabulary, quads * 4); tokens (T,); y: float32 (T, quads * 4). Block row y of the grid is one token. A token
// below zero, argmax's word for NaN, gives zeros.
template <class Type> DEVICE void rows_of(const u8 *w, const int *tokens, float4 *y, u32 quads) {
  const u32 quad = blockIdx.x * 256 + threadIdx.x;
  if (quad >= quads) return;
  const u64 row_bytes = (u64)(quads / (Type::VALUES / 4)) * Type::BYTES;
  const int token = tokens[blockIdx.y];
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (token >= 0) v = quad_values<Type>(w + token * row_bytes, quad);
  y[(u64)blockIdx.y * quads + quad] = v;
}

#define OF_TYPE(Type, name)                                                                             \
  KERNEL(256) dequantise_##name##_f32(const u8 *w, float4 *y, u32 quads) { to_f32<Type>(w, y, quads); } \
  KERNEL(256) dequantise_##name##_f16(const u8 *w, uint2 *y, u32 quads) { to_f16<Type>(w, y, quads); }  \
  KERNEL(256) embed_##name(const u8 *w, const int *tokens, float4 *y, u32 quads) { rows_of<Type>(w, tokens, y, quads); }

OF_TYPE(Q4_0, q4_0)
OF_TYPE(Q4_1, q4_1)
OF_TYPE(Q5_0, q5_0)
OF_TYPE(Q5_1, q5_1)
OF_TYPE(Q8_0, q8_0)
OF_TYPE(Q4_K, q4_k)
OF_TYPE(Q5_K, q5_k)
OF_TYPE(Q6_K, q6_k)
OF_TYPE(F16, f16)
OF_TYPE(BF16, bf16)

KERNEL(256) embed_f32(const u8 *w, const int *tokens, float4 *y, u32 quads) { rows_of<F32>(w, tokens, y, quads); }

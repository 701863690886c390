// Quantised rows as the mat-vec kernels read them: half a warp walks two rows, 128 values (a chunk) a lane, 2048 a step.
#include "prelude.cuh"

#define WARPS 2          // a block of threads
#define ROWS 2           // rows of the matrix that half a warp works on: they share the activations
#define LANES 16         // half a warp
#define STEP_VALUES 2048 // LANES chunks

// Eight blocks on a multiprocessor leave each thread 128 registers, which is what the widest types need.
#define MATVEC_KERNEL extern "C" __global__ void __launch_bounds__(WARPS * 32, 8)

// A type says
//   VALUES, BYTES   of one block
//   STAGED          0: blocks are multiples of 16 bytes and are read as such; 1: they come through shared memory
//   GROUPS          runs of values in a chunk that have a scale of their own (piece k of 32 belongs to k * GROUPS / 32)
//   CENTRE          what is subtracted from every value
//   SIGNED          values are signed bytes; less a CENTRE of 128 they are unsigned ones
//   NIBBLES         values are nibbles and nothing else: those of word(k), the high ones for pieces where high(k)
//   K_SCALES        scales and mins are whole numbers, one a byte of `scales` and `mins`; d and dmin are halves of `d`
//   load            takes a lane's chunk into registers
//   bytes(k)        piece k: four neighbouring values, one a byte
//   finish          acc + the chunk, from the group dot products `a` and the group sums of activations `s`

// Bytes of one row in shared memory. Blocks start at even addresses, 32-bit words are read at any of them.
struct Bytes {
  const u32 *words;
  u32 start;

  DEVICE u32 half(const Bytes &b, u32 at) { return ((const u16 *)b.words)[(b.start + at) >> 1]; }

  // out[i] = the word at byte at + 4 i. An aligned word and its neighbour are shifted into one; where `at` is aligned
  // the neighbour is the word itself, so that nothing behind the last byte is touched.
  template <int N> DEVICE void take(const Bytes &b, u32 at, u32 *out) {
    const u32 from = b.start + at, shift = (from & 2) * 8, last = (from + 2) >> 2;
    u32 low = b.words[from >> 2];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const u32 high = b.words[i + 1 < N ? (from >> 2) + i + 1 : last + i];
      out[i] = __funnelshift_r(low, high, shift);
      low = high;
    }
  }
};

// ---- four blocks of 32 values a chunk ----------------------------------------------------------------------------

// Rows may end inside a chunk: blocks from `count` on are not read, zeros stand for them.

struct Nibbles {  // 16 bytes of nibbles a block: low ones are values 0..15, high ones 16..31
  enum { VALUES = 32, STAGED = 1, GROUPS = 4, SIGNED = 0, K_SCALES = 0 };
  u32 q[4][4];
  DEVICE u32 word(const Nibbles &t, int k) { return t.q[k >> 3][k & 3]; }
  DEVICE bool high(int k) { return k & 4; }
  DEVICE u32 low4(const Nibbles &t, int k) { return word(t, k) >> (high(k) ? 4 : 0) & 0x0f0f0f0fu; }
  DEVICE void clear(Nibbles &t, int i) { t.q[i][0] = t.q[i][1] = t.q[i][2] = t.q[i][3] = 0; }
};

struct Q4_0 : Nibbles {
  enum { BYTES = 18, CENTRE = 8, NIBBLES = 1 };
  float d[4];
  DEVICE void load(Q4_0 &t, const Bytes &b, u32 at, u32 count) {
#pragma unroll
    for (int i = 0; i < 4; ++i, at += BYTES) {
      t.d[i] = 0.0f;
      clear(t, i);
      if (i >= count) continue;
      t.d[i] = scale_at(Bytes::half(b, at));
      Bytes::take<4>(b, at + 2, t.q[i]);
    }
  }
  DEVICE u32 bytes(const Q4_0 &t, int k) { return low4(t, k); }
  DEVICE float finish(const Q4_0 &t, float acc, const float *a, const float *) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) acc = __fmaf_rn(t.d[g], a[g], acc);
    return acc;
  }
};

struct Q4_1 : Nibbles {
  enum { BYTES = 20, CENTRE = 0, NIBBLES = 1 };
  float d[4], m[4];
  DEVICE void load(Q4_1 &t, const Bytes &b, u32 at, u32 count) {
#pragma unroll
    for (int i = 0; i < 4; ++i, at += BYTES) {
      t.d[i] = t.m[i] = 0.0f;
      clear(t, i);
      if (i >= count) continue;
      t.d[i] = scale_at(Bytes::half(b, at));
      t.m[i] = scale_at(Bytes::half(b, at + 2));
      Bytes::take<4>(b, at + 4, t.q[i]);
    }
  }
  DEVICE u32 bytes(const Q4_1 &t, int k) { return low4(t, k); }
  DEVICE float finish(const Q4_1 &t, float acc, const float *a, const float *s) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) acc = __fmaf_rn(t.m[g], s[g], __fmaf_rn(t.d[g], a[g], acc));
    return acc;
  }
};

struct Q5_0 : Nibbles {
  enum { BYTES = 22, CENTRE = 16, NIBBLES = 0 };
  float d[4];
  u32 qh[4];
  DEVICE void load(Q5_0 &t, const Bytes &b, u32 at, u32 count) {
#pragma unroll
    for (int i = 0; i < 4; ++i, at += BYTES) {
      t.d[i] = 0.0f;
      t.qh[i] = 0;
      clear(t, i);
      if (i >= count) continue;
      u32 words[5];
      t.d[i] = scale_at(Bytes::half(b, at));
      Bytes::take<5>(b, at + 2, words);
      t.qh[i] = words[0];
#pragma unroll
      for (int j = 0; j < 4; ++j) t.q[i][j] = words[j + 1];
    }
  }
  DEVICE u32 bytes(const Q5_0 &t, int k) { return with_fifth_bits(low4(t, k), t.qh[k >> 3] >> (k & 7) * 4); }
  DEVICE float finish(const Q5_0 &t, float acc, const float *a, const float *) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) acc = __fmaf_rn(t.d[g], a[g], acc);
    return acc;
  }
};

struct Q5_1 : Nibbles {
  enum { BYTES = 24, CENTRE = 0, NIBBLES = 0 };
  float d[4], m[4];
  u32 qh[4];
  DEVICE void load(Q5_1 &t, const Bytes &b, u32 at, u32 count) {
#pragma unroll
    for (int i = 0; i < 4; ++i, at += BYTES) {
      t.d[i] = t.m[i] = 0.0f;
      t.qh[i] = 0;
      clear(t, i);
      if (i >= count) continue;
      u32 words[5];
      t.d[i] = scale_at(Bytes::half(b, at));
      t.m[i] = scale_at(Bytes::half(b, at + 2));
      Bytes::take<5>(b, at + 4, words);
      t.qh[i] = words[0];
#pragma unroll
      for (int j = 0; j < 4; ++j) t.q[i][j] = words[j + 1];
    }
  }
  DEVICE u32 bytes(const Q5_1 &t, int k) { return with_fifth_bits(low4(t, k), t.qh[k >> 3] >> (k & 7) * 4); }
  DEVICE float finish(const Q5_1 &t, float acc, const float *a, const float *s) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) acc = __fmaf_rn(t.m[g], s[g], __fmaf_rn(t.d[g], a[g], acc));
    return acc;
  }
};

struct Q8_0 {
  enum { VALUES = 32, BYTES = 34, STAGED = 1, GROUPS = 4, CENTRE = 128, SIGNED = 1, NIBBLES = 0, K_SCALES = 0 };
  u32 q[4][8];
  float d[4];
  DEVICE void load(Q8_0 &t, const Bytes &b, u32 at, u32 count) {
#pragma unroll
    for (int i = 0; i < 4; ++i, at += BYTES) {
      t.d[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) t.q[i][j] = 0;
      if (i >= count) continue;
      t.d[i] = scale_at(Bytes::half(b, at));
      Bytes::take<8>(b, at + 2, t.q[i]);
    }
  }
  DEVICE u32 bytes(const Q8_0 &t, int k) { return t.q[k >> 3][k & 7]; }
  DEVICE float finish(const Q8_0 &t, float acc, const float *a, const float *) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) acc = __fmaf_rn(t.d[g], a[g], acc);
    return acc;
  }
};

// ---- half a block of 256 values a chunk --------------------------------------------------------------------------

// Sub-blocks 0 and 2 of the half are low nibbles, 1 and 3 the high nibbles of the same 32 bytes.
struct KScales {
  enum { VALUES = 256, STAGED = 0, GROUPS = 4, CENTRE = 0, SIGNED = 0, K_SCALES = 1 };
  u32 d, scales, mins, q[16];
  template <int N> DEVICE void take(const uint4 *at, u32 *out) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint4 v = at[i];
      out[4 * i] = v.x, out[4 * i + 1] = v.y, out[4 * i + 2] = v.z, out[4 * i + 3] = v.w;
    }
  }
  DEVICE void load_head(KScales &t, const u8 *block, u32 half) {
    const uint4 head = *(const uint4 *)block;
    t.d = head.x;
    t.scales = k_scales(head, half);
    t.mins = k_mins(head, half);
  }
  DEVICE u32 word(const KScales &t, int k) { return t.q[(k >> 4) * 8 + (k & 7)]; }
  DEVICE bool high(int k) { return k & 8; }
  DEVICE u32 low4(const KScales &t, int k) { return word(t, k) >> (high(k) ? 4 : 0) & 0x0f0f0f0fu; }
  DEVICE float finish(const KScales &t, float acc, const float *a, const float *s) {
    const float2 d = halves(t.d);
    float scaled = __fmul_rn(byte_0(t.scales), a[0]), mins = __fmul_rn(byte_0(t.mins), s[0]);
#pragma unroll
    for (int g = 1; g < GROUPS; ++g) {
      scaled = __fmaf_rn(byte_0(t.scales >> 8 * g), a[g], scaled);
      mins = __fmaf_rn(byte_0(t.mins >> 8 * g), s[g], mins);
    }
    return __fmaf_rn(-d.y, mins, __fmaf_rn(d.x, scaled, acc));
  }
};

struct Q4_K : KScales {
  enum { BYTES = 144, NIBBLES = 1 };
  DEVICE void load(Q4_K &t, const u8 *block, u32 half) {
    load_head(t, block, half);
    take<4>((const uint4 *)block + 1 + 4 * half, t.q);
  }
  DEVICE u32 bytes(const Q4_K &t, int k) { return low4(t, k); }
};

struct Q5_K : KScales {
  enum { BYTES = 176, NIBBLES = 0 };
  u32 qh[8];
  DEVICE void load(Q5_K &t, const u8 *block, u32 half) {
    load_head(t, block, half);
    take<2>((const uint4 *)block + 1, t.qh);
    take<4>((const uint4 *)block + 3 + 4 * half, t.q);
#pragma unroll
    for (int i = 0; i < 8; ++i) t.qh[i] >>= 4 * half;  // now bit g belongs to sub-block g of this half
  }
  DEVICE u32 bytes(const Q5_K &t, int k) {
    return or_and(low4(t, k), t.qh[k & 7] << 4 >> (k >> 3), 0x10101010u);
  }
};

// Four runs of 32: the low nibbles of 64 bytes, then the high ones; bits 2 run and 2 run + 1 of byte l of qh are on top.
struct Q6_K {
  enum { VALUES = 256, BYTES = 210, STAGED = 1, GROUPS = 8, CENTRE = 32, SIGNED = 0, NIBBLES = 0, K_SCALES = 0 };
  u32 ql[16], qh[8], scales[2];
  float d;
  DEVICE void load(Q6_K &t, const Bytes &b, u32 at, u32 half) {
    Bytes::take<16>(b, at + 64 * half, t.ql);
    Bytes::take<8>(b, at + 128 + 32 * half, t.qh);
    Bytes::take<2>(b, at + 192 + 8 * half, t.scales);
    t.d = scale_at(Bytes::half(b, at + 208));
  }
  DEVICE u32 bytes(const Q6_K &t, int k) {
    const int run = k >> 3;
    const u32 low = t.ql[k & 15] >> (run < 2 ? 0 : 4) & 0x0f0f0f0fu, top = t.qh[k & 7];
    return or_and(low, run < 2 ? top << (4 - 2 * run) : top >> (2 * run - 4), 0x30303030u);
  }
  DEVICE float finish(const Q6_K &t, float acc, const float *a, const float *) {
    float sum = __fmul_rn((float)(i8)t.scales[0], a[0]);
#pragma unroll
    for (int g = 1; g < GROUPS; ++g) sum = __fmaf_rn((float)(i8)(t.scales[g >> 2] >> 8 * (g & 3)), a[g], sum);
    return __fmaf_rn(t.d, sum, acc);
  }
};

// ---- walking a pair of rows --------------------------------------------------------------------------------------

// The bytes of one row that half a warp stages a step: 16 chunks, up to 14 bytes in front, rounded up to 16.
template <class Type> struct Step {
  enum { BYTES = STEP_VALUES / Type::VALUES * Type::BYTES, PIECES = (BYTES + 14 + 15) / 16 };
};

// Copies bytes first .. first + count of w, which itself is 16-aligned and padded to 16, in aligned 16-byte pieces.
// Returns where the first byte lies in `to`.
DEVICE u32 stage(uint4 *to, const u8 *w, u64 first, u32 count, u32 lane) {
  const uint4 *from = (const uint4 *)w + (first >> 4);
  const u32 start = (u32)first & 15, pieces = (start + count + 15) >> 4;
  for (u32 i = lane; i < pieces; i += LANES) to[i] = from[i];
  return start;
}

// What the lanes of half a warp add up: y[row + r] = sum of acc[r] * factor + bias[row + r].
DEVICE void store_rows(const float (&acc)[ROWS], float factor, const float *bias, float *y, u32 row, u32 rows) {
  float sum = __fmul_rn(half_warp_sums(acc[0], acc[1]), factor);
  row += threadIdx.x >> 3 & 1;  // lane 0 stores the first row, lane 8 the second
  if ((threadIdx.x & 7) == 0 && row < rows) {
    if (bias) sum = __fadd_rn(sum, bias[row]);
    y[row] = sum;
  }
}

// Half a warp's first row, and the rows it reads: behind the last one it reads the last one again and stores nothing.
struct Pair {
  u32 row, first, second;
  DEVICE Pair of_thread(u32 rows) {
    const u32 row = (blockIdx.x * (WARPS * 2) + threadIdx.x / LANES) * ROWS;
    return {row, min(row, rows - 1), min(row + 1, rows - 1)};
  }
};

// W times one token; block row y of the grid is the token. `Activations` knows how x is stored and multiplied: `add` adds
// the product of a lane's chunk of both rows with x to acc, in units of 1 / FACTOR. y: (T, rows).
template <class Type, class Activations>
DEVICE void matvec(const u8 *w, const Activations &x, const float *bias, float *y, u32 rows, u32 cols) {
  const u32 lane = threadIdx.x % LANES, chunks = (cols + 127) / 128;
  const Pair pair = Pair::of_thread(rows);
  const u32 row_bytes = cols / Type::VALUES * Type::BYTES;
  const u64 first = (u64)pair.first * row_bytes;
  const u32 apart = (pair.second - pair.first) * row_bytes;

  float acc[ROWS] = {0.0f, 0.0f};
  Type t[ROWS];
  if constexpr (Type::STAGED) {
    __shared__ uint4 staged[WARPS * 2][ROWS][Step<Type>::PIECES];
    uint4 *rows_at[ROWS] = {staged[threadIdx.x / LANES][0], staged[threadIdx.x / LANES][1]};
    for (u32 step = 0; step * LANES < chunks; ++step) {
      const u32 done = step * Step<Type>::BYTES, count = min(row_bytes - done, (u32)Step<Type>::BYTES);
      u32 start[ROWS];
      __syncwarp();
#pragma unroll
      for (int r = 0; r < ROWS; ++r) start[r] = stage(rows_at[r], w, first + done + (r ? apart : 0), count, lane);
      __syncwarp();
      const u32 chunk = step * LANES + lane;
      if (chunk >= chunks) continue;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const Bytes b = {(const u32 *)rows_at[r], start[r]};
        if constexpr (Type::VALUES == 256) Type::load(t[r], b, (lane >> 1) * Type::BYTES, lane & 1);
        else Type::load(t[r], b, lane * 4 * Type::BYTES, cols / 32 - chunk * 4);
      }
      x.add(t, lane, step, acc);
    }
  } else {
    const u8 *block = w + first + (lane >> 1) * Type::BYTES;
    for (u32 step = 0; step * LANES + lane < chunks; ++step, block += LANES / 2 * Type::BYTES) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) Type::load(t[r], r ? block + apart : block, lane & 1);
      x.add(t, lane, step, acc);
    }
  }
  __syncwarp();
  store_rows(acc, Activations::FACTOR, bias, y + (u64)blockIdx.y * rows, pair.row, rows);
}

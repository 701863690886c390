// The rest of a Qwen2 token. Arrays are float32, C order, positions (T) first. Divisions and roots are the correctly rounded
// ones, exponentials are exp_f32's: no kernel here uses an approximate instruction, so results are the same bits everywhere.
#include "prelude.cuh"

// Sum over a block of 256 threads; every thread gets it.
DEVICE float block_sum(float value) {
  __shared__ float parts[8];
  value = warp_sum(value);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = value;
  __syncthreads();
  float sum = parts[0];
#pragma unroll
  for (int i = 1; i < 8; ++i) sum = __fadd_rn(sum, parts[i]);
  return sum;
}

// y = x / sqrt(mean(x²) + eps) * weight; x, y (T, n). One block a row.
KERNEL(256) rms_norm(const float *__restrict__ x, const float *__restrict__ weight, float *__restrict__ y, u32 n, float eps) {
  x += (u64)blockIdx.x * n;
  y += (u64)blockIdx.x * n;
  float squares = 0.0f;
  for (u32 i = threadIdx.x; i < n; i += 256) squares = __fmaf_rn(x[i], x[i], squares);
  const float mean = __fdiv_rn(block_sum(squares), (float)n);
  const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
  for (u32 i = threadIdx.x; i < n; i += 256) y[i] = __fmul_rn(__fmul_rn(x[i], scale), weight[i]);
}

// Turns pair i of each head of x (T, heads, 2 half) by an angle whose cosine and sine stand in table (T, half).
// neox: values i and i + half make a pair; norm: 2i and 2i + 1. One thread a pair.
DEVICE void turn(const float *x, const float2 *table, float *y, u32 heads, u32 half, u32 first, u32 second, u32 i) {
  const u64 at = ((u64)blockIdx.y * heads + blockIdx.z) * 2 * half;
  const float2 angle = table[(u64)blockIdx.y * half + i];
  const float a = x[at + first], b = x[at + second];
  y[at + first] = __fsub_rn(__fmul_rn(a, angle.x), __fmul_rn(b, angle.y));
  y[at + second] = __fadd_rn(__fmul_rn(a, angle.y), __fmul_rn(b, angle.x));
}

KERNEL(128) rope_neox(const float *__restrict__ x, const float2 *__restrict__ table, float *__restrict__ y, u32 heads, u32 half) {
  const u32 i = blockIdx.x * 128 + threadIdx.x;
  if (i < half) turn(x, table, y, heads, half, i, i + half, i);
}

KERNEL(128) rope_norm(const float *__restrict__ x, const float2 *__restrict__ table, float *__restrict__ y, u32 heads, u32 half) {
  const u32 i = blockIdx.x * 128 + threadIdx.x;
  if (i < half) turn(x, table, y, heads, half, 2 * i, 2 * i + 1, i);
}

// Keys and values (T, n) of one layer into the cache (capacity, n), at positions (T,).
KERNEL(256) remember(const float *__restrict__ k, const float *__restrict__ v, const int *__restrict__ positions,
                     float *__restrict__ k_cache, float *__restrict__ v_cache, u32 n) {
  const u32 i = blockIdx.x * 256 + threadIdx.x;
  if (i >= n) return;
  const u64 from = (u64)blockIdx.y * n + i, to = (u64)positions[blockIdx.y] * n + i;
  k_cache[to] = k[from];
  v_cache[to] = v[from];
}

#define ATTEND_WARPS 4

// Causal grouped attention. q, y: (T, heads, D); caches (capacity, heads / group, D) of one layer; query t sees positions
// 0 .. positions[t]; query head h looks at key/value head h / group. One block a head and a query: each warp takes every
// fourth position and keeps a running maximum, sum and weighted values, so there is no limit on positions.
template <int PARTS> DEVICE void attend(const float *q, const float *k_cache, const float *v_cache, const int *positions,
                                        float *y, u32 group, float scale) {
  const u32 D = PARTS * 32, heads = gridDim.x, head = blockIdx.x, token = blockIdx.y;
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, stride = heads / group * D;
  const u32 seen = (u32)positions[token] + 1, offset = head / group * D + lane;
  __shared__ float peaks[ATTEND_WARPS], totals[ATTEND_WARPS], values[ATTEND_WARPS][PARTS * 32];
  q += ((u64)token * heads + head) * D + lane;

  float query[PARTS], sum[PARTS], peak = __int_as_float(0xff800000), total = 0.0f;  // minus infinity
#pragma unroll
  for (int i = 0; i < PARTS; ++i) query[i] = q[i * 32], sum[i] = 0.0f;
  for (u32 at = warp; at < seen; at += ATTEND_WARPS) {
    const float *k = k_cache + (u64)at * stride + offset, *v = v_cache + (u64)at * stride + offset;
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < PARTS; ++i) dot = __fmaf_rn(query[i], k[i * 32], dot);
    const float score = __fmul_rn(warp_sum(dot), scale);
    const float top = fmaxf(peak, score), keep = exp_f32(__fsub_rn(peak, top)), weight = exp_f32(__fsub_rn(score, top));
    peak = top;
    total = __fmaf_rn(total, keep, weight);
#pragma unroll
    for (int i = 0; i < PARTS; ++i) sum[i] = __fmaf_rn(sum[i], keep, __fmul_rn(weight, v[i * 32]));
  }
  if (lane == 0) peaks[warp] = peak, totals[warp] = total;
#pragma unroll
  for (int i = 0; i < PARTS; ++i) values[warp][i * 32 + lane] = sum[i];
  __syncthreads();

  float top = peaks[0];
  for (int w = 1; w < ATTEND_WARPS; ++w) top = fmaxf(top, peaks[w]);
  float all = 0.0f, part[ATTEND_WARPS];
  for (int w = 0; w < ATTEND_WARPS; ++w) {
    part[w] = exp_f32(__fsub_rn(peaks[w], top));  // 0 where a warp saw nothing
    all = __fmaf_rn(totals[w], part[w], all);
  }
  y += ((u64)token * heads + head) * D;
  for (u32 i = threadIdx.x; i < D; i += ATTEND_WARPS * 32) {
    float value = 0.0f;
    for (int w = 0; w < ATTEND_WARPS; ++w) value = __fmaf_rn(values[w][i], part[w], value);
    y[i] = __fdiv_rn(value, all);
  }
}

#define ATTEND(D)                                                                                                         \
  KERNEL(ATTEND_WARPS * 32) attend_##D(const float *__restrict__ q, const float *__restrict__ k_cache,                    \
                                       const float *__restrict__ v_cache, const int *__restrict__ positions,              \
                                       float *__restrict__ y, u32 group, float scale) {                                   \
    attend<D / 32>(q, k_cache, v_cache, positions, y, group, scale);                                                      \
  }

ATTEND(32)
ATTEND(64)
ATTEND(96)
ATTEND(128)
ATTEND(256)

// silu(gate) * up; silu(z) = z / (1 + e^-z)
KERNEL(256) swiglu(const float *__restrict__ gate, const float *__restrict__ up, float *__restrict__ y, u32 n) {
  const u32 i = blockIdx.x * 256 + threadIdx.x;
  if (i < n) y[i] = __fmul_rn(__fdiv_rn(gate[i], __fadd_rn(1.0f, exp_f32(-gate[i]))), up[i]);
}

KERNEL(256) add(const float *__restrict__ a, const float *__restrict__ b, float *__restrict__ y, u32 n) {
  const u32 i = blockIdx.x * 256 + threadIdx.x;
  if (i < n) y[i] = __fadd_rn(a[i], b[i]);
}

// The first index of the largest of each row of x (T, n); -1 where a row holds a NaN. One block a row.
KERNEL(256) argmax(const float *__restrict__ x, int *__restrict__ token, u32 n) {
  __shared__ float best[256];
  __shared__ int at[256];
  x += (u64)blockIdx.x * n;
  float most = __int_as_float(0xff800000);
  int where = n;  // behind all: any index of an equal value is smaller
  bool nan = false;
  for (u32 i = threadIdx.x; i < n; i += 256) {
    const float v = x[i];
    nan |= v != v;
    if (v > most || where == n) most = v, where = i;
  }
  best[threadIdx.x] = most;
  at[threadIdx.x] = nan ? -1 : where;
  __syncthreads();
  for (u32 half = 128; half > 0; half >>= 1) {
    if (threadIdx.x < half) {
      const float v = best[threadIdx.x + half];
      const int i = at[threadIdx.x + half], own = at[threadIdx.x];
      if (own >= 0 && (i < 0 || (i < n && (own == n || v > best[threadIdx.x] || (v == best[threadIdx.x] && i < own)))))
        best[threadIdx.x] = v, at[threadIdx.x] = i;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) token[blockIdx.x] = at[0];
}

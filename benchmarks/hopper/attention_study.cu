#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "attention_study.cuh"
#define CK(x)                                                          \
  do {                                                                 \
    cudaError_t e = (x);                                               \
    if (e != cudaSuccess) {                                            \
      printf("%s line %d: %s\n", #x, __LINE__, cudaGetErrorString(e)); \
      exit(1);                                                         \
    }                                                                  \
  } while (0)
__device__ float gauss(uint64_t i, uint32_t seed) {
  uint64_t z = i * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
  z ^= z >> 30;
  z *= 0xBF58476D1CE4E5B9ull;
  z ^= z >> 27;
  z *= 0x94D049BB133111EBull;
  z ^= z >> 31;
  float u1 = ((uint32_t)z + 1.f) * 2.3283064e-10f, u2 = (uint32_t)(z >> 32) * 2.3283064e-10f;
  return sqrtf(-2.f * logf(fminf(u1, 1.f))) * cospif(2.f * u2);
}
__global__ void fill(__nv_bfloat16* x, size_t n, uint32_t seed) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x)
    x[i] = __float2bfloat16(gauss(i, seed));
}
// plain pre-pass: exact means, exact amax; one block per (bh)
__global__ void prek(const __nv_bfloat16* k, int8_t* out, float* ks, int m,
                     int D) {  // grid (m/128, bh), 128 threads = rows
  int bh = blockIdx.y, r = threadIdx.x, row = blockIdx.x * 128 + r;
  const __nv_bfloat16* src = k + ((size_t)bh * m + row) * D;
  __shared__ unsigned am[4];
  if (r < 4) am[r] = 0;
  __syncthreads();
  float a = 0;
  for (int d = 0; d < D; d++) a = fmaxf(a, fabsf(__bfloat162float(src[d])));
  int t = (r & 7) >> 1;
  atomicMax(&am[t], __float_as_uint(a));
  __syncthreads();
  a = fmaxf(__uint_as_float(am[t]), 1e-30f);
  float inv = __fdiv_rn(127.f, a);
  if (r < 4)
    ks[((size_t)bh * (m / 128) + blockIdx.x) * 4 + r] = __uint_as_float(am[r]) * (1.f / 127.f);
  int8_t* dst = out + ((size_t)bh * m + (size_t)row) * D;  // row-major image with 16B chunk swizzle
  for (int d = 0; d < D; d++) {
    int c = d / 16;
    int sw = D == 128 ? (c ^ (r & 7)) : (c ^ ((r >> 1) & 3));
    dst[sw * 16 + d % 16] =
        (int8_t)max(-127, min(127, __float2int_rn(__fmul_rn(__bfloat162float(src[d]), inv))));
  }
}
__global__ void vamax(const __nv_bfloat16* v, float* vs, float* vm, int m, int D, float vr) {
  int bh = blockIdx.x, d = threadIdx.x;
  float a = 0;
  for (int i = 0; i < m; i++)
    a = fmaxf(a, fabsf(__bfloat162float(v[((size_t)bh * m + i) * D + d])));
  vs[bh * D + d] = a / vr;
  vm[bh * D + d] = 0;
}
__global__ void prev(const __nv_bfloat16* v, const float* vs, uint8_t* out, int m, int D) {
  int bh = blockIdx.y, pan = blockIdx.x;
  for (int i = threadIdx.x; i < 64 * D; i += blockDim.x) {
    int d = i / 64, p = i % 64;
    int b16 = p / 16, pp = p % 16;
    int tok = b16 * 16 + 2 * (pp >> 2) + 8 * ((pp >> 1) & 1) + (pp & 1);
    float x = __bfloat162float(v[((size_t)bh * m + pan * 64 + tok) * D + d]) / vs[bh * D + d];
    uint16_t e;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0,%1,%2;" : "=h"(e) : "f"(0.f), "f"(x));
    int c = p / 16, sw = c ^ ((d >> 1) & 3);
    out[((size_t)bh * m + pan * 64) * D + d * 64 + sw * 16 + p % 16] = (uint8_t)(e & 0xff);
  }
}
__global__ void ref(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v,
                    const __nv_bfloat16* o, double* acc, int L, int D, int bh, bool causal) {
  extern __shared__ float sc[];
  __shared__ float red[256];
  int h = (blockIdx.x * 37) % bh, r = (int)(((long long)blockIdx.x * 2654435761ll) % L);
  int M = causal ? r + 1 : L;
  const __nv_bfloat16* qq = q + ((size_t)h * L + r) * D;
  float mx = -1e30f;
  for (int j = threadIdx.x; j < M; j += 256) {
    float a = 0;
    _Pragma("unroll 8") for (int d = 0; d < D; d++) a +=
        __bfloat162float(qq[d]) * __bfloat162float(k[((size_t)h * L + j) * D + d]);
    a /= sqrtf(D);
    sc[j] = a;
    mx = fmaxf(mx, a);
  }
  red[threadIdx.x] = mx;
  __syncthreads();
  for (int i = 0; i < 256; i++) mx = fmaxf(mx, red[i]);
  __syncthreads();
  float l = 0;
  for (int j = threadIdx.x; j < M; j += 256) {
    float e = expf(sc[j] - mx);
    sc[j] = e;
    l += e;
  }
  red[threadIdx.x] = l;
  __syncthreads();
  double tl = 0;
  for (int i = 0; i < 256; i++) tl += red[i];
  if (threadIdx.x < D) {
    double a = 0;
    for (int j = 0; j < M; j++)
      a += (double)sc[j] * __bfloat162float(v[((size_t)h * L + j) * D + threadIdx.x]);
    a /= tl;
    float g = __bfloat162float(o[((size_t)h * L + r) * D + threadIdx.x]);
    if (!(g == g))
      atomicAdd(acc + 2, 1.0);
    else
      atomicAdd(acc, fabs(g - a));
    atomicAdd(acc + 1, fabs(a));
  }
}
__global__ void verr(const __nv_bfloat16* v, const float* vs, const uint8_t* img, float* vm, int m,
                     int D) {
  int bh = blockIdx.x, d = threadIdx.x;
  double e = 0;
  for (int i = 0; i < m; i++) {
    int pan = i / 64, w = i % 64, b16 = w / 16, tau = w % 16;
    int pp = 4 * ((tau & 7) >> 1) + 2 * (tau >> 3) + (tau & 1);
    int c = b16, sw = c ^ ((d >> 1) & 3);
    uint8_t code = img[((size_t)bh * m + pan * 64) * D + d * 64 + sw * 16 + pp];
    uint32_t h2;
    uint16_t cc = code;
    asm("cvt.rn.f16x2.e4m3x2 %0,%1;" : "=r"(h2) : "h"(cc));
    float x = __half2float(__ushort_as_half(h2 & 0xffff));
    e += (double)x * vs[bh * D + d] - __bfloat162float(v[((size_t)bh * m + i) * D + d]);
  }
  vm[bh * D + d] = (float)(-e / m);
}
template <class C>
float run(Params p, int iters, bool quiet = false) {
  auto f = attn<C>;
  CK(cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, C::SMEM));
  p.mblocks = (p.n + C::BM - 1) / C::BM;
  p.group = std::max(1, std::min(p.bh, (24 << 20) / (2 * p.m * C::D)));
  dim3 grid(std::min(132, p.mblocks * p.bh));
  cudaEvent_t a, b;
  cudaEventCreate(&a);
  cudaEventCreate(&b);
  std::vector<float> ts;
  for (int i = 0; i < iters + 2; i++) {
    cudaMemsetAsync(p.counter, 0, 4);
    cudaEventRecord(a);
    f<<<grid, C::THREADS, C::SMEM>>>(p);
    cudaEventRecord(b);
    CK(cudaGetLastError());
    CK(cudaDeviceSynchronize());
    float ms;
    cudaEventElapsedTime(&ms, a, b);
    if (i >= 2) ts.push_back(ms);
  }
  std::sort(ts.begin(), ts.end());
  return ts[ts.size() / 2];
}
template <class C>
void test(const char* name, int B, int H, int L) {
  constexpr int D = C::D;
  int bh = B * H;
  size_t n = (size_t)bh * L * D;
  __nv_bfloat16 *q, *k, *v, *o;
  int8_t* ki;
  uint8_t* vi;
  float *ks, *vs, *vm;
  CK(cudaMalloc(&q, n * 2));
  CK(cudaMalloc(&k, n * 2));
  CK(cudaMalloc(&v, n * 2));
  CK(cudaMalloc(&o, n * 2));
  CK(cudaMalloc(&ki, n));
  CK(cudaMalloc(&vi, n));
  CK(cudaMalloc(&ks, n / D / 32 * 4));
  CK(cudaMalloc(&vs, bh * D * 4));
  CK(cudaMalloc(&vm, bh * D * 4));
  fill<<<1024, 256>>>(q, n, 1);
  fill<<<1024, 256>>>(k, n, 2);
  fill<<<1024, 256>>>(v, n, 3);
  cudaMemset(o, 0xff, n * 2);
  prek<<<dim3(L / 128, bh), 128>>>(k, ki, ks, L, D);
  vamax<<<bh, D>>>(v, vs, vm, L, D, C::F16 ? .25f : 448.f);
  prev<<<dim3(L / 64, bh), 256>>>(v, vs, vi, L, D);
  verr<<<bh, D>>>(v, vs, vi, vm, L, D);
  CK(cudaDeviceSynchronize());
  int* ctr;
  CK(cudaMalloc(&ctr, 4));
  Params p{q, ki, ks, vi, vs, vm, o, L, L, bh, 1.4426950408889634f / sqrtf(D), ctr, 0};
  float ms = run<C>(p, 7);
  double fl = 4.0 * bh * L * (double)L * D * (C::CAUSAL ? .5 : 1);
  double num = 0, den = 0;
  int bad = 0;
  {
    double* acc;
    CK(cudaMalloc(&acc, 24));
    cudaMemset(acc, 0, 24);
    cudaFuncSetAttribute(ref, cudaFuncAttributeMaxDynamicSharedMemorySize, L * 4);
    ref<<<512, 256, L * 4>>>(q, k, v, o, acc, L, D, bh, C::CAUSAL);
    CK(cudaDeviceSynchronize());
    double h[3];
    cudaMemcpy(h, acc, 24, cudaMemcpyDeviceToHost);
    num = h[0];
    den = h[1];
    bad = (int)h[2];
    cudaFree(acc);
  }
  printf("%-26s L=%6d %8.3f ms %7.0f TOPS relL1 %.4f nan %d\n", name, L, ms, fl / ms * 1e-9,
         num / den, bad);
  fflush(stdout);
  cudaFree(ctr);
  for (void* x : {(void*)q, (void*)k, (void*)v, (void*)o, (void*)ki, (void*)vi, (void*)ks,
                  (void*)vs, (void*)vm})
    cudaFree(x);
}
#define T(...) test<Cfg<__VA_ARGS__>>(#__VA_ARGS__, B, 32, L)
int main() {
  for (int L : {1024, 2048, 4096, 8192, 16384}) {
    int B = std::min(4, 32768 / L);
    T(128, 3, 128, true, 4, false, 14);
    T(128, 3, 128, true, 4, false, 12);
    T(128, 3, 128, true, 2, false, 12);
    T(128, 3, 128, true, 0, false, 12);
    T(64, 3, 128, true, 4, false, 12);
    T(64, 3, 128, true, 2, false, 12);
    T(64, 3, 128, true, 0, false, 12);
    T(128, 3, 128, true, 2, true, 12);
    T(128, 3, 128, true, 0, true, 12);
    T(64, 3, 128, true, 0, true, 12);
  }
  return system("nvidia-smi --query-gpu=clocks.sm,power.draw,name --format=csv,noheader");
}

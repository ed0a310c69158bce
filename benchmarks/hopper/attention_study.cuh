#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "wgmma_gen.cuh"

struct Params {
  const __nv_bfloat16* q;  // [bh, n, d]
  const int8_t* k;         // [bh_kv, m/64, 64*d] swizzled tile images
  const float* ks;         // [bh_kv, m/128, 4]
  const uint8_t* v;        // [bh_kv, m/64, d*64] V^T panels
  const float* vs;         // [bh_kv, d] dequantization scale
  const float* vm;         // [bh_kv, d] mean
  __nv_bfloat16* o;        // [bh, n, d]
  int n, m, bh;
  float scale_log2;
  int* counter;
  int mblocks;
  int group;
};

__device__ __forceinline__ uint32_t sptr(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void mbar_init(uint32_t b, int c) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(b), "r"(c));
}
__device__ __forceinline__ void mbar_expect(uint32_t b, int n) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(b), "r"(n) : "memory");
}
__device__ __forceinline__ void mbar_arrive(uint32_t b) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(b) : "memory");
}
__device__ __forceinline__ void mbar_wait(uint32_t b, int ph) {
  asm volatile(
      "{.reg .pred p;\nW: mbarrier.try_wait.parity.shared.b64 p,[%0],%1;\n@p bra D;\nbra W;\nD:}" ::
          "r"(b),
      "r"(ph)
      : "memory");
}
__device__ __forceinline__ void bulk(uint32_t dst, const void* src, int bytes, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(
          dst),
      "l"(src), "r"(bytes), "r"(bar)
      : "memory");
}
__device__ __forceinline__ void wg_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wg_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void wg_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ uint64_t mkdesc(uint32_t addr,
                                           int rowbytes) {  // rowbytes 128 -> swizzle 1, 64 -> 2
  return (uint64_t)((addr & 0x3FFFF) >> 4) | (1ull << 16) |
         ((uint64_t)((8 * rowbytes) >> 4) << 32) | ((uint64_t)(rowbytes == 128 ? 1 : 2) << 62);
}
__device__ __forceinline__ uint32_t f2ip2(float x, float y, uint32_t c) {
  uint32_t d;
  asm volatile(
      "{.reg .s32 a,b; cvt.rzi.s32.f32 a,%1; cvt.rzi.s32.f32 b,%2; cvt.pack.sat.u8.s32.b32 "
      "%0,b,a,%3;}"
      : "=r"(d)
      : "f"(x), "f"(y), "r"(c));
  return d;
}
__device__ __forceinline__ uint32_t s8x2(float x, float y, uint32_t c) {
  uint32_t d;
  asm volatile(
      "{.reg .s32 a,b; cvt.rni.s32.f32 a,%1; cvt.rni.s32.f32 b,%2; cvt.pack.sat.s8.s32.b32 "
      "%0,b,a,%3;}"
      : "=r"(d)
      : "f"(x), "f"(y), "r"(c));
  return d;
}
__device__ __forceinline__ uint32_t f2fp4(float x, float y, float z, float w) {
  uint32_t d;
  asm volatile(
      "{.reg .b16 a,b; cvt.rn.satfinite.e4m3x2.f32 a,%2,%1; cvt.rn.satfinite.e4m3x2.f32 b,%4,%3; "
      "mov.b32 %0,{a,b};}"
      : "=r"(d)
      : "f"(x), "f"(y), "f"(z), "f"(w));
  return d;
}
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

template <int D_, int NWG_, int BN_, bool F16_, int X_, bool CAUSAL_, int OFF2_ = 14>
struct Cfg {
  static constexpr float kOff = OFF2_ * .5f;
  static constexpr int D = D_, NWG = NWG_, BN = BN_, X = X_;
  static constexpr bool F16 = F16_, CAUSAL = CAUSAL_;
  static constexpr int BM = 64 * NWG, ST = 2;
  static constexpr int KB = BN * D, PANEL = (D + 8) * 64, VB = (BN / 64) * PANEL;
  static constexpr int OREG = (D + 8) / 2;
  static constexpr int oQ = 0, oK = oQ + 2 * BM * D, oV = oK + ST * KB, oS = oV + ST * VB,
                       oQS = oS + ST * 64, oVS = oQS + 2 * BM * 4, oB = oVS + 4 * 2 * D * 4,
                       oO = (oB + 256 + 127) / 128 * 128;
  static constexpr int OBUF = 128 * OREG * 4, SMEM = oO + NWG * OBUF + 1024;
  static constexpr int PROM = (OFF2_ <= 12 ? 1024 : 512) / BN;
  static constexpr int THREADS = 128 * (NWG + 1);
  static constexpr int RC = NWG == 3 ? 152 : 240, RP = NWG == 3 ? 56 : 24;
};
constexpr float kTau = 1.75f;

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1) attn(const __grid_constant__ Params p) {
  constexpr int D = C::D, BN = C::BN, NWG = C::NWG, BM = C::BM, ST = C::ST;
  extern __shared__ uint8_t raw[];
  uint8_t* sm = (uint8_t*)(((uintptr_t)raw + 1023) & ~(uintptr_t)1023);
  const uint32_t sb = sptr(sm);
  const uint32_t barKF = sb + C::oB, barKE = barKF + 8 * ST, barVF = barKE + 8 * ST,
                 barVE = barVF + 8 * ST, barQF = barVE + 8 * ST, barQE = barQF + 16,
                 barSF = barQE + 16;
  volatile int* tiles = (volatile int*)(sm + C::oB + 8 * (4 * ST + 6));
  const int wg = threadIdx.x >> 7;
  const int total = p.mblocks * p.bh;
  if (threadIdx.x == 0) {
    for (int s = 0; s < ST; s++) {
      mbar_init(barKF + 8 * s, 1);
      mbar_init(barKE + 8 * s, NWG * 4);
      mbar_init(barVF + 8 * s, 1);
      mbar_init(barVE + 8 * s, NWG * 4);
    }
    for (int s = 0; s < 2; s++) {
      mbar_init(barQF + 8 * s, 96);
      mbar_init(barQE + 8 * s, NWG * 4);
      mbar_init(barSF + 8 * s, 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  {
    uint32_t one = C::F16 ? 0x28282828u : 0x38383838u;
    for (int i = threadIdx.x; i < ST * (BN / 64) * 128; i += C::THREADS) {
      int pan = i / 128, w = i % 128;
      int s = pan / (BN / 64), q = pan % (BN / 64);
      *(uint32_t*)(sm + C::oV + s * C::VB + q * C::PANEL + D * 64 + w * 4) = one;
    }
    asm volatile("fence.proxy.async.shared::cta;");
  }
  __syncthreads();
  auto decode =
      [&](int tile, int& mb, int& bh,
          int& nt) {  // causal: longest first inside sections of heads whose K and V fit in L2
        if (C::CAUSAL) {
          int per = p.group * p.mblocks, sec = tile / per, r = tile - sec * per,
              gs = min(p.group, p.bh - sec * p.group);
          mb = p.mblocks - 1 - r / gs;
          bh = sec * p.group + r % gs;
          nt = min(p.m / BN, (min((mb + 1) * BM, p.n) + BN - 1) / BN);
        } else {
          bh = tile / p.mblocks;
          mb = tile % p.mblocks;
          nt = p.m / BN;
        }
      };
  if (wg == NWG) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::RP));
    if (threadIdx.x == NWG * 128) {
      int cnt = 0;
      for (int it = 0;; it++) {
        int sl = it & 1;
        mbar_wait(barSF + 8 * sl, (it >> 1) & 1);
        int tile = tiles[sl];
        if (tile >= total) break;
        int mb, bh, nt;
        decode(tile, mb, bh, nt);
        const int8_t* K = p.k + (size_t)bh * p.m * D;
        const uint8_t* V = p.v + (size_t)bh * p.m * D;
        const float* S = p.ks + (size_t)bh * (p.m / 128) * 4;
        for (int n = 0; n < nt; n++, cnt++) {
          int t = nt - 1 - n, s = cnt % ST, ph = (cnt / ST) & 1;
          mbar_wait(barKE + 8 * s, ph ^ 1);
          mbar_expect(barKF + 8 * s, C::KB + (BN / 128) * 16);
          bulk(sb + C::oK + s * C::KB, K + (size_t)t * C::KB, C::KB, barKF + 8 * s);
          bulk(sb + C::oS + s * 64, S + (size_t)t * (BN / 128) * 4, (BN / 128) * 16, barKF + 8 * s);
          mbar_wait(barVE + 8 * s, ph ^ 1);
          mbar_expect(barVF + 8 * s, BN * D);
#pragma unroll
          for (int q = 0; q < BN / 64; q++)
            bulk(sb + C::oV + s * C::VB + q * C::PANEL, V + (size_t)t * BN * D + q * 64 * D, 64 * D,
                 barVF + 8 * s);
        }
      }
    } else if (threadIdx.x >= NWG * 128 + 32) {  // Q warps: 96 threads, 4 lanes per row
      const int qt = threadIdx.x - NWG * 128 - 32, part = qt & 3;
      for (int it = 0;; it++) {
        int sl = it & 1;
        mbar_wait(barQE + 8 * sl, ((it >> 1) & 1) ^ 1);
        if (qt == 0) {
          tiles[sl] = it == 0 ? blockIdx.x : gridDim.x + atomicAdd(p.counter, 1);
          mbar_arrive(barSF + 8 * sl);
        }
        asm volatile("bar.sync 7,96;" ::: "memory");
        int tile = tiles[sl];
        if (tile >= total) {
          mbar_arrive(barQF + 8 * sl);
          break;
        }
        int mb, bh, nt;
        decode(tile, mb, bh, nt);
        uint8_t* dst = sm + C::oQ + sl * BM * D;
        float* qs = (float*)(sm + C::oQS) + sl * BM;
        {
          float* vd = (float*)(sm + C::oVS) + (it & 3) * 2 * D;
          for (int i = qt; i < D; i += 96) {
            vd[i] = __ldg(p.vs + (size_t)bh * D + i);
            vd[D + i] = __ldg(p.vm + (size_t)bh * D + i);
          }
        }
        auto load = [&](uint4(&x)[D / 32], int r) {
          const int row = mb * BM + r;
          const uint4* src = (const uint4*)(p.q + ((size_t)bh * p.n + row) * D);
#pragma unroll
          for (int i = 0; i < D / 32; i++)
            x[i] = r < BM && row < p.n ? __ldg(src + i * 4 + part) : make_uint4(0, 0, 0, 0);
        };
        uint4 x[D / 32], nx[D / 32];
        load(nx, qt >> 2);
#pragma unroll 1
        for (int r = qt >> 2; r < BM; r += 24) {
#pragma unroll
          for (int i = 0; i < D / 32; i++) x[i] = nx[i];
          load(nx, r + 24);
          uint32_t am = 0;
          const uint32_t* w = (const uint32_t*)x;
#pragma unroll
          for (int i = 0; i < D / 8; i++) {
            am = max(am, w[i] << 16 & 0x7fff0000u);
            am = max(am, w[i] & 0x7fff0000u);
          }
          am = max(am, __shfl_xor_sync(~0u, am, 1));
          am = max(am, __shfl_xor_sync(~0u, am, 2));
          float a = fmaxf(__uint_as_float(am), 7.888609052210118e-31f);
          float inv = __fdiv_rn(127.f, a);
          if (part == 0) qs[r] = __fmul_rn(a, __uint_as_float(0x3c010204u)) * p.scale_log2;
#pragma unroll
          for (int c = 0; c < D / 32; c++) {
            uint32_t o[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
              uint32_t w0 = w[c * 4 + 2 * i], w1 = w[c * 4 + 2 * i + 1];
              o[i] = s8x2(__fmul_rn(__uint_as_float(w1 << 16), inv),
                          __fmul_rn(__uint_as_float(w1 & 0xffff0000u), inv),
                          s8x2(__fmul_rn(__uint_as_float(w0 << 16), inv),
                               __fmul_rn(__uint_as_float(w0 & 0xffff0000u), inv), 0));
              o[i] = __byte_perm(o[i], o[i], 0x1032);
            }
            int byte = (c * 4 + part) * 8, chunk = byte >> 4;
            int sw = D == 128 ? (chunk ^ (r & 7)) : (chunk ^ ((r >> 1) & 3));
            *(uint2*)(dst + r * D + sw * 16 + (byte & 8)) = make_uint2(o[0], o[1]);
          }
        }
        asm volatile("fence.proxy.async.shared::cta;");
        mbar_arrive(barQF + 8 * sl);
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::RC));
  const int tid = threadIdx.x & 127, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t4 = lane & 3;
  using PVt = PV<D + 8, C::F16>;
  using QKt = QK<BN>;
  int cnt = 0, it = 0, mb, bh, nt, row0, skip, sl;
  float qk[2];
  uint64_t dq;
  int s[BN / 2];
  uint32_t pk[BN / 8];
  typename PVt::T o[PVt::kRegs];
  float m[2], mb_[2] = {0.f, 0.f};
  int acc;
  bool has, live;
  float* ob = (float*)(sm + C::oO + wg * C::OBUF) + tid * 4;
  auto begin = [&]() -> bool {
    sl = it & 1;
    mbar_wait(barQF + 8 * sl, (it >> 1) & 1);
    int tile = __shfl_sync(~0u, tiles[sl], 0);
    if (!__any_sync(~0u, tile < total)) return false;
    decode(tile, mb, bh, nt);
    row0 = mb * BM;
    const float* qs = (const float*)(sm + C::oQS) + sl * BM + wg * 64;
    qk[0] = qs[warp * 16 + g];
    qk[1] = qs[warp * 16 + g + 8];
    dq = mkdesc(sb + C::oQ + sl * BM * D + wg * 64 * D, D);
    skip = 0;
    if (C::CAUSAL) {
      int e = min((row0 + wg * 64 + 64 + BN - 1) / BN, p.m / BN);
      skip = max(nt - e, 0);
    }
    it++;
    return true;
  };
  // a warpgroup whose rows end before the tile's last keys lets one K and one V stage pass (BM - 64
  // <= BN)
  auto dropk = [&]() {
    if (C::CAUSAL && live && skip && lane == 0) {
      int st = cnt % ST;
      mbar_wait(barKF + 8 * st, (cnt / ST) & 1);
      mbar_arrive(barKE + 8 * st);
    }
    __syncwarp();
  };
  auto dropv = [&]() {
    if (C::CAUSAL && live && skip && lane == 0) {
      int st = cnt % ST;
      mbar_wait(barVF + 8 * st, (cnt / ST) & 1);
      mbar_arrive(barVE + 8 * st);
    }
    __syncwarp();
  };
  auto qkmma = [&](int n, bool wait = true) {
    int c = cnt + n, st = c % ST;
    if (wait) mbar_wait(barKF + 8 * st, (c / ST) & 1);
    uint64_t dk = mkdesc(sb + C::oK + st * C::KB, D);
    wg_fence();
#pragma unroll
    for (int i = 0; i < D / 32; i++) QKt::mma(s, dq + 2 * i, dk + 2 * i, i > 0);
    wg_commit();
  };
  auto pvmma = [&](int n) {
    int c = cnt + n, st = c % ST;
    mbar_wait(barVF + 8 * st, (c / ST) & 1);
    wg_fence();
#pragma unroll
    for (int i = 0; i < BN / 32; i++) {
      uint64_t dv = mkdesc(sb + C::oV + st * C::VB + (i / 2) * C::PANEL, 64) + 2 * (i & 1);
      PVt::mma(o, pk + 4 * i, dv, acc | (i > 0));
    }
    wg_commit();
    acc = 1;
  };
  auto softmax = [&](int n, bool first,
                     float (&f)[2]) {  // s (int) -> y (float bits); returns rescale factors in f
    const float* sk = (const float*)(sm + C::oS + ((cnt + n) % ST) * 64);
    float ks[(BN + 127) / 128];
#pragma unroll
    for (int i = 0; i < (BN + 127) / 128; i++) ks[i] = sk[i * 4 + t4];
    float mx[2];
    bool diag = false;
    int lim[2];
    if (C::CAUSAL) {
      int t = nt - 1 - n;
      diag = (t + 1) * BN > row0 + wg * 64;
      lim[0] = row0 + wg * 64 + warp * 16 + g - t * BN;
      lim[1] = lim[0] + 8;
    }
    if (C::CAUSAL && diag) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int a = -(1 << 30);
#pragma unroll
        for (int j = 0; j < BN / 8; j++)
#pragma unroll
          for (int b = 0; b < 2; b++)
            a = max(a, (8 * j + 2 * t4 + b <= lim[h]) ? s[4 * j + 2 * h + b] : -(1 << 30));
        mx[h] = (float)a * (qk[h] * ks[0]);
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int a = s[2 * h], a2 = s[4 + 2 * h];
#pragma unroll
        for (int j = 0; j < BN / 8; j += 2) {
          a = __vimax3_s32(a, s[4 * j + 2 * h], s[4 * j + 2 * h + 1]);
          a2 = __vimax3_s32(a2, s[4 * j + 4 + 2 * h], s[4 * j + 5 + 2 * h]);
        }
        a = max(a, a2);
        mx[h] = (float)a * (qk[h] * ks[0]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      mx[h] = fmaxf(mx[h], __shfl_xor_sync(~0u, mx[h], 1));
      mx[h] = fmaxf(mx[h], __shfl_xor_sync(~0u, mx[h], 2));
    }
    bool trig = false;
    if (first) {
      m[0] = mx[0];
      m[1] = mx[1];
    } else {
      trig = __any_sync(~0u, mx[0] > m[0] + kTau || mx[1] > m[1] + kTau);
      if (trig) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float mn = fmaxf(m[h], mx[h]);
          f[h] = ex2(m[h] - mn);
          m[h] = mn;
        }
      }
    }
#pragma unroll
    for (int gi = 0; gi < (BN + 127) / 128; gi++) {
      float sc[2], k8[2], ce[2], ch[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        sc[h] = qk[h] * ks[gi];
        k8[h] = 8.f * sc[h];
        ce[h] = C::kOff - m[h];
        ch[h] = 8.f * ce[h] + 56.f;
      }
#pragma unroll
      for (int j = gi * 16; j < gi * 16 + 16 && j < BN / 8; j++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int b = 0; b < 2; b++) {
            int i = 4 * j + 2 * h + b;
            float fl = __int2float_rn(s[i]);
            s[i] = __float_as_int(((j >> 1) & 3) < C::X ? ex2(fmaf(fl, sc[h], ce[h]))
                                                        : fmaf(fl, k8[h], ch[h]));
          }
    }
    if (C::CAUSAL && diag) {
#pragma unroll
      for (int j = 0; j < BN / 8; j++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int b = 0; b < 2; b++)
            if (8 * j + 2 * t4 + b > lim[h])
              s[4 * j + 2 * h + b] = ((j >> 1) & 3) < C::X ? 0 : (int)0xff800000u;
    }
#pragma unroll
    for (int i = 0; i < BN / 2; i++) asm volatile("" : "+r"(s[i]));
    return trig;
  };
  auto pack = [&]() {
#pragma unroll
    for (int q = 0; q < BN / 16; q++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float e0 = __int_as_float(s[8 * q + 2 * h]), e1 = __int_as_float(s[8 * q + 2 * h + 1]),
              e4 = __int_as_float(s[8 * q + 4 + 2 * h]), e5 = __int_as_float(s[8 * q + 5 + 2 * h]);
        pk[2 * q + h] = (q & 3) < C::X ? f2fp4(e0, e1, e4, e5) : f2ip2(e0, e1, f2ip2(e4, e5, 0));
      }
  };
  auto oget = [&](int i) -> float {
    if constexpr (C::F16) {
      uint32_t w = o[i >> 1];
      __half2 h2 = *(__half2*)&w;
      return (i & 1) ? __high2float(h2) : __low2float(h2);
    } else
      return o[i];
  };
  // register order for o: f32: 4j+2h+b ; f16: (2j+h) packs b -> flat index 2*(2j+h)+b = 4j+2h+b,
  // the same
  auto promote = [&](float (&md)[2]) {
    float fa[2] = {ex2(mb_[0] - md[0]), ex2(mb_[1] - md[1])};
#pragma unroll
    for (int i = 0; i < C::OREG; i += 4) {
      float4 b4;
      if (has)
        b4 = *(float4*)(ob + (i / 4) * 512);
      else
        b4 = make_float4(0, 0, 0, 0);
      b4.x = fmaf(b4.x, fa[0], oget(i));
      b4.y = fmaf(b4.y, fa[0], oget(i + 1));
      b4.z = fmaf(b4.z, fa[1], oget(i + 2));
      b4.w = fmaf(b4.w, fa[1], oget(i + 3));
      *(float4*)(ob + (i / 4) * 512) = b4;
    }
    has = true;
    mb_[0] = md[0];
    mb_[1] = md[1];
    acc = 0;
  };

  float f[2] = {1.f, 1.f};
  live = begin();
  dropk();
  qkmma(skip, live);
  dropv();
#pragma unroll 1
  while (live) {
    mb_[0] = mb_[1] = 0.f;
    acc = 0;
    has = false;
    wg_wait<0>();
    softmax(skip, true, f);
    if (lane == 0) mbar_arrive(barKE + 8 * ((cnt + skip) % ST));
    pack();
#pragma unroll 1
    for (int n = skip + 1; n < nt; n++) {
      qkmma(n);
      pvmma(n - 1);
      wg_wait<1>();
      float mo[2] = {m[0], m[1]};
      bool trig = softmax(n, false, f);
      if (lane == 0) mbar_arrive(barKE + 8 * ((cnt + n) % ST));
      wg_wait<0>();
      if (lane == 0) mbar_arrive(barVE + 8 * ((cnt + n - 1) % ST));
#pragma unroll
      for (int i = 0; i < PVt::kRegs; i++) {
        if constexpr (C::F16)
          asm volatile("" : "+r"(o[i]));
        else
          asm volatile("" : "+f"(o[i]));
      }
      if ((n - skip) % C::PROM == 0)
        promote(mo);
      else if (trig) {
#pragma unroll
        for (int i = 0; i < PVt::kRegs; i++) {
          if constexpr (C::F16) {
            __half2 h2 = __float2half2_rn(f[i & 1]);
            __half2 v = *(__half2*)&o[i];
            v = __hmul2(v, h2);
            o[i] = *(uint32_t*)&v;
          } else
            o[i] *= f[(i >> 1) & 1];
        }
      }
      pack();
    }
    if (lane == 0) mbar_arrive(barQE + 8 * sl);
    pvmma(nt - 1);
    const int cur_vd = (it - 1) & 3, cur_bh = bh, cur_row = row0 + wg * 64;
    const int last = (cnt + nt - 1) % ST;
    cnt += nt;
    const float m0 = m[0], m1 = m[1];
    live = begin();
    dropk();
    qkmma(skip, live);  // without a next tile this multiplies stale shared memory and nobody reads
                        // the result
    wg_wait<1>();
    if (lane == 0) mbar_arrive(barVE + 8 * last);
    dropv();
#pragma unroll
    for (int i = 0; i < PVt::kRegs; i++) {
      if constexpr (C::F16)
        asm volatile("" : "+r"(o[i]));
      else
        asm volatile("" : "+f"(o[i]));
    }
    // epilogue: final rows as bf16 pairs, in place of the accumulator registers
    {
      float fa[2] = {ex2(mb_[0] - m0), ex2(mb_[1] - m1)};
      const float one = C::F16 ? 0.25f : 1.f;
      float l0 = oget(D / 2), l1 = oget(D / 2 + 2);
      if (has) {
        float4 b4 = *(float4*)(ob + (D / 8) * 512);
        l0 = fmaf(b4.x, fa[0], l0);
        l1 = fmaf(b4.z, fa[1], l1);
      }
      float inv[2] = {__fdividef(one, l0), __fdividef(one, l1)};
      const float* vd = (const float*)(sm + C::oVS) + cur_vd * 2 * D + 2 * t4;
      __nv_bfloat16* out = p.o + ((size_t)cur_bh * p.n + cur_row + warp * 16 + g) * D + 8 * t4;
      const bool in0 = cur_row + warp * 16 + g < p.n, in1 = cur_row + warp * 16 + g + 8 < p.n;
#pragma unroll
      for (int j0 = 0; j0 < D / 8; j0 += 4) {
        uint32_t r[2][4];
#pragma unroll
        for (int jj = 0; jj < 4; jj++) {
          const int j = j0 + jj;
          float4 b4 = make_float4(0, 0, 0, 0);
          if (has) b4 = *(float4*)(ob + j * 512);
          float2 sc = *(const float2*)(vd + 8 * j), mn = *(const float2*)(vd + D + 8 * j);
          float x0 = fmaf(b4.x, fa[0], oget(4 * j)) * inv[0],
                x1 = fmaf(b4.y, fa[0], oget(4 * j + 1)) * inv[0],
                x2 = fmaf(b4.z, fa[1], oget(4 * j + 2)) * inv[1],
                x3 = fmaf(b4.w, fa[1], oget(4 * j + 3)) * inv[1];
          __nv_bfloat162 p0 = __floats2bfloat162_rn(fmaf(x0, sc.x, mn.x), fmaf(x1, sc.y, mn.y)),
                         p1 = __floats2bfloat162_rn(fmaf(x2, sc.x, mn.x), fmaf(x3, sc.y, mn.y));
          r[0][jj] = *(uint32_t*)&p0;
          r[1][jj] = *(uint32_t*)&p1;
        }
// 4x4 transpose in the quad: lane t ends with the 16 bytes of column block j0 + t
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
          for (int st = 1; st < 4; st <<= 1) {
            const bool up = t4 & st;
#pragma unroll
            for (int i = 0; i < 4; i++)
              if (!(i & st)) {
                uint32_t give = up ? r[h][i] : r[h][i | st];
                uint32_t got = __shfl_xor_sync(~0u, give, st);
                if (up)
                  r[h][i] = got;
                else
                  r[h][i | st] = got;
              }
          }
          if (h ? in1 : in0)
            *(uint4*)(out + (size_t)h * 8 * D + 8 * j0) =
                make_uint4(r[h][0], r[h][1], r[h][2], r[h][3]);
        }
        asm volatile("" ::: "memory");
      }
    }
  }
}

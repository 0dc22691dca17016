// One Mixture-of-Depths block for the CPU, in place and channels_last: the operator
// pliant::mod_block_, whose arguments are told in mod_block.py.
//
// B images      C channels    P = H W positions   k channels processed
// r hidden units of the selector                  m channels inside the core
//
// A team of threads works on one image at a time, or each thread on images of its own. A
// team splits the pool by positions, the selector by channels and the core by rows. Between
// two steps it waits for all: the picked channels have been read by everyone before anyone
// writes to the image, so channels may be picked that are written to.
//
// The core is computed in planes, a picture for each channel, on LANES columns at once:
// its channels are too few to fill a vector. Only the image itself is channels_last.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

using at::Tensor;
using i64 = int64_t;

constexpr i64 LANES = 16;
constexpr i64 AT_ONCE = 8;  // positions that the pool adds before it adds to the sum
typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));

// bfloat16 is stored as the upper half of a float.
using bf16 = uint16_t;
inline float wide(float v) { return v; }
inline float wide(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
template <class T>
inline T narrow(float v);
template <>
inline float narrow<float>(float v) { return v; }
template <>
inline bf16 narrow<bf16>(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return static_cast<bf16>(v != v ? 0x7fc0 : rounded);
}

inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }
inline i64 rounded_up(i64 n) { return (n + LANES - 1) / LANES * LANES; }
inline float relu(float v) { return v < 0 ? 0 : v; }  // NaN stays NaN

enum class Fusion { first, last, original, replace };

// Everything about a call that all images share. T: float or bf16.
template <class T>
struct Block {
  i64 B, C, H, W, r, k, m, dilation;
  bool bottleneck, by_index;
  Fusion fusion;
  T* x;               // [B, H, W, C]
  const T* down;      // [C, r]
  const T* up;        // [r, C]
  const float* w[3];  // [m, k] [m, m, 3, 3] [k, m], or twice [k, k, 3, 3]
  const float* b[3];
  i64 P() const { return H * W; }
  i64 inside() const { return bottleneck ? m : k; }
  i64 pitch() const { return rounded_up(W) + 2 * dilation; }
  i64 plane() const { return (H + 2 * dilation) * pitch(); }
};

// What a team shares while it works on one image, and what each of its threads has for itself.
struct Shared {
  float *sums, *hidden, *mean, *logits, *planes, *planes2;  // [n, C] [n, r] [C] [C] planes
  uint64_t* candidates;                                     // [n, k]
};
struct Own {
  float *hidden, *scores, *picked, *row, *last, *last_bias, *y;
  uint64_t* keys;
  i64 *index, *offsets;
};

// Carves pieces out of one allocation; without one it only counts.
struct Carver {
  char* base;
  size_t used = 0;
  template <class U>
  U* take(i64 n) {
    U* piece = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += (n * sizeof(U) + 63) / 64 * 64;
    return piece;
  }
};

template <class T>
Shared shared_scratch(const Block<T>& p, i64 n, Carver& from) {
  Shared s;
  s.sums = from.take<float>(n * p.C);
  s.hidden = from.take<float>(n * p.r);
  s.mean = from.take<float>(p.C);
  s.logits = from.take<float>(p.C);
  s.planes = from.take<float>(p.inside() * p.plane() + LANES);
  s.planes2 = p.bottleneck ? nullptr : from.take<float>(p.inside() * p.plane() + LANES);
  s.candidates = from.take<uint64_t>(n * p.k);
  return s;
}

template <class T>
Own own_scratch(const Block<T>& p, i64 n, Carver& from) {
  Own o;
  const i64 wide_k = rounded_up(p.k);
  o.hidden = from.take<float>(p.r);
  o.scores = from.take<float>(p.k);
  o.picked = from.take<float>(p.k * LANES);
  o.row = from.take<float>(p.inside() * LANES);
  o.last = from.take<float>(p.inside() * wide_k);
  o.last_bias = from.take<float>(wide_k);
  o.y = from.take<float>(wide_k);
  o.keys = from.take<uint64_t>(std::max(p.C, n * p.k));
  o.index = from.take<i64>(p.k);
  o.offsets = from.take<i64>(9 * p.inside());
  return o;
}

struct Range {
  i64 begin, end;
};
inline Range share(i64 all, i64 t, i64 n) { return {all * t / n, all * (t + 1) / n}; }

// Sums over the positions of a share, for all channels.
template <class T>
void sum_positions(const Block<T>& p, const T* x, Range positions, float* __restrict__ sums) {
  const i64 C = p.C;
  std::fill(sums, sums + C, 0.0f);
  i64 at = positions.begin;
  for (; at + AT_ONCE <= positions.end; at += AT_ONCE) {
    const T* __restrict__ v = x + at * C;
    for (i64 c = 0; c < C; ++c) {
      const float a = wide(v[c]) + wide(v[c + C]), b = wide(v[c + 2 * C]) + wide(v[c + 3 * C]);
      const float d = wide(v[c + 4 * C]) + wide(v[c + 5 * C]);
      const float e = wide(v[c + 6 * C]) + wide(v[c + 7 * C]);
      sums[c] += (a + b) + (d + e);
    }
  }
  for (; at < positions.end; ++at) {
    const T* __restrict__ v = x + at * C;
    for (i64 c = 0; c < C; ++c) sums[c] += wide(v[c]);
  }
}

// The mean of a share of the channels, and what these give to the hidden units.
template <class T>
void down_share(const Block<T>& p, const Shared& s, Range channels, i64 n, float* __restrict__ hidden) {
  std::fill(hidden, hidden + p.r, 0.0f);
  const float scale = 1.0f / static_cast<float>(p.P());
  for (i64 c = channels.begin; c < channels.end; ++c) {
    float sum = 0;
    for (i64 t = 0; t < n; ++t) sum += s.sums[t * p.C + c];
    s.mean[c] = sum * scale;
  }
  i64 c = channels.begin;
  for (; c + 4 <= channels.end; c += 4) {
    const T* __restrict__ w = p.down + c * p.r;
    const float a = s.mean[c], b = s.mean[c + 1], d = s.mean[c + 2], e = s.mean[c + 3];
    for (i64 j = 0; j < p.r; ++j)
      hidden[j] += (a * wide(w[j]) + b * wide(w[j + p.r])) + (d * wide(w[j + 2 * p.r]) + e * wide(w[j + 3 * p.r]));
  }
  for (; c < channels.end; ++c)
    for (i64 j = 0; j < p.r; ++j) hidden[j] += s.mean[c] * wide(p.down[c * p.r + j]);
}

// The logits of a share of the channels.
template <class T>
void up_share(const Block<T>& p, const Shared& s, Range channels, i64 n, float* hidden) {
  i64 active[4];
  i64 waiting = 0;
  float* __restrict__ logits = s.logits;
  std::fill(logits + channels.begin, logits + channels.end, 0.0f);
  for (i64 j = 0; j < p.r; ++j) {
    float sum = 0;
    for (i64 t = 0; t < n; ++t) sum += s.hidden[t * p.r + j];
    hidden[j] = relu(sum);
    if (hidden[j] == 0) continue;  // about half of them: their weights need no reading
    active[waiting++] = j;
    if (waiting < 4) continue;
    waiting = 0;
    const T* __restrict__ w0 = p.up + active[0] * p.C;
    const T* __restrict__ w1 = p.up + active[1] * p.C;
    const T* __restrict__ w2 = p.up + active[2] * p.C;
    const T* __restrict__ w3 = p.up + active[3] * p.C;
    const float a = hidden[active[0]], b = hidden[active[1]], d = hidden[active[2]], e = hidden[active[3]];
    for (i64 c = channels.begin; c < channels.end; ++c)
      logits[c] += (a * wide(w0[c]) + b * wide(w1[c])) + (d * wide(w2[c]) + e * wide(w3[c]));
  }
  for (i64 i = 0; i < waiting; ++i) {
    const T* __restrict__ w = p.up + active[i] * p.C;
    const float a = hidden[active[i]];
    for (i64 c = channels.begin; c < channels.end; ++c) logits[c] += a * wide(w[c]);
  }
}

// A number that sorts as (logit, then the lower channel): NaN is largest, as for torch.topk.
inline uint64_t key_of(float logit, i64 channel) {
  const float v = logit + 0.0f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (v != v) bits = 0xffffffffu;
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(channel));
}

// The largest `count` of keys, largest first, to their front.
inline void largest_first(uint64_t* keys, i64 all, i64 count) {
  std::partial_sort(keys, keys + count, keys + all, std::greater<uint64_t>());
}

// The best k of a share of the channels.
template <class T>
void best_of_share(const Block<T>& p, const Shared& s, Range channels, uint64_t* keys, uint64_t* best) {
  const i64 all = channels.end - channels.begin, count = std::min(p.k, all);
  for (i64 i = 0; i < all; ++i) keys[i] = key_of(s.logits[channels.begin + i], channels.begin + i);
  largest_first(keys, all, count);
  std::copy(keys, keys + count, best);
  std::fill(best + count, best + p.k, 0);  // below every channel's key
}

// The k channels, their scores, and what ends the core with the scores in it.
template <class T>
void choose(const Block<T>& p, const Shared& s, i64 n, const Own& o) {
  std::copy(s.candidates, s.candidates + n * p.k, o.keys);
  if (n > 1) largest_first(o.keys, n * p.k, p.k);
  for (i64 j = 0; j < p.k; ++j) o.keys[j] = 0xffffffffu - static_cast<uint32_t>(o.keys[j]);
  if (p.by_index) std::sort(o.keys, o.keys + p.k);
  const i64 wide_k = rounded_up(p.k);
  for (i64 j = 0; j < p.k; ++j) {
    o.index[j] = static_cast<i64>(o.keys[j]);
    o.scores[j] = 1.0f / (1.0f + std::exp(-s.logits[o.index[j]]));
  }
  for (i64 j = 0; j < wide_k; ++j) {
    const bool there = j < p.k;
    o.last_bias[j] = there && p.bottleneck ? p.b[2][j] * o.scores[j] : 0;
    if (p.bottleneck)
      for (i64 i = 0; i < p.m; ++i)
        o.last[i * wide_k + j] = there ? p.w[2][j * p.m + i] * o.scores[j] : 0;
  }
}

// out[o] = b[o] + sum_i w[o, i] in[i], each of LANES columns; N outputs at once.
template <int N, class In>
inline void combine(In in, i64 inputs, const float* w, const float* b, float* out) {
  Vector sum[N];
  for (int o = 0; o < N; ++o) sum[o] = b[o] - Vector{};
  for (i64 i = 0; i < inputs; ++i) {
    const Vector v = in(i);
    for (int o = 0; o < N; ++o) sum[o] += w[o * inputs + i] * v;
  }
  for (int o = 0; o < N; ++o) store(out + o * LANES, sum[o]);
}

template <class In>
inline void combine_all(In in, i64 inputs, const float* w, const float* b, i64 outputs, float* out) {
  i64 o = 0;
  for (; o + 4 <= outputs; o += 4) combine<4>(in, inputs, w + o * inputs, b + o, out + o * LANES);
  if (outputs - o == 3) combine<3>(in, inputs, w + o * inputs, b + o, out + o * LANES);
  if (outputs - o == 2) combine<2>(in, inputs, w + o * inputs, b + o, out + o * LANES);
  if (outputs - o == 1) combine<1>(in, inputs, w + o * inputs, b + o, out + o * LANES);
}

// Puts LANES columns of a row of all channels into planes, through ReLU if asked for.
template <class T>
void into_planes(const Block<T>& p, const float* row, i64 h, i64 w, bool activate, float* planes) {
  float* to = planes + (h + p.dilation) * p.pitch() + p.dilation + w;
  for (i64 o = 0; o < p.inside(); ++o)
    for (i64 l = 0; l < LANES; ++l)
      to[o * p.plane() + l] = activate ? relu(row[o * LANES + l]) : row[o * LANES + l];
}

// Zeros around the pictures, for the rows of a share.
template <class T>
void pad(const Block<T>& p, Range rows, float* planes) {
  const i64 d = p.dilation, pitch = p.pitch();
  for (i64 o = 0; o < p.inside(); ++o) {
    float* plane = planes + o * p.plane();
    if (rows.begin == 0) std::fill(plane, plane + d * pitch, 0.0f);
    if (rows.end == p.H) std::fill(plane + (p.H + d) * pitch, plane + (p.H + 2 * d) * pitch, 0.0f);
    for (i64 h = rows.begin + d; h < rows.end + d; ++h) {
      std::fill(plane + h * pitch, plane + h * pitch + d, 0.0f);
      std::fill(plane + h * pitch + d + p.W, plane + (h + 1) * pitch, 0.0f);
    }
  }
}

// Gathers the picked channels of the rows of a share; in a bottleneck through the first 1x1.
template <class T>
void gather(const Block<T>& p, const T* x, Range rows, const Own& o, float* planes) {
  for (i64 h = rows.begin; h < rows.end; ++h) {
    for (i64 w = 0; w < p.W; w += LANES) {
      const i64 valid = std::min(LANES, p.W - w);
      const T* from = x + (h * p.W + w) * p.C;
      if (valid < LANES) std::fill(o.picked, o.picked + p.k * LANES, 0.0f);
      for (i64 l = 0; l < valid; ++l)
        for (i64 j = 0; j < p.k; ++j) o.picked[j * LANES + l] = wide(from[l * p.C + o.index[j]]);
      if (!p.bottleneck) {
        into_planes(p, o.picked, h, w, false, planes);
        continue;
      }
      const float* picked = o.picked;
      combine_all([picked](i64 j) { return load(picked + j * LANES); }, p.k, p.w[0], p.b[0], p.m, o.row);
      into_planes(p, o.row, h, w, true, planes);
    }
  }
  pad(p, rows, planes);
}

// A 3x3 convolution of LANES columns of one row, into o.row.
template <class T>
inline void conv3x3(const Block<T>& p, const float* planes, i64 h, i64 w, int layer, const Own& o) {
  const float* base = planes + h * p.pitch() + w;
  const i64* offsets = o.offsets;
  const i64 n = p.inside();
  combine_all([=](i64 i) { return load(base + offsets[i]); }, 9 * n, p.w[layer], p.b[layer], n, o.row);
}

// x[i] += y[i] for `count` neighbours, in pieces whose width the compiler knows.
template <int N, class T>
inline void add(T* x, const float* y) {
  for (int i = 0; i < N; ++i) x[i] = narrow<T>(wide(x[i]) + y[i]);
}
template <class T>
inline void add_neighbours(T* x, const float* y, i64 count) {
  i64 i = 0;
  for (; i + 16 <= count; i += 16) add<16>(x + i, y + i);
  if (count & 8) add<8>(x + i, y + i), i += 8;
  if (count & 4) add<4>(x + i, y + i), i += 4;
  if (count & 2) add<2>(x + i, y + i), i += 2;
  if (count & 1) add<1>(x + i, y + i);
}

// The end of the core for LANES columns: the last 1x1, the scores, and the fusion with x.
template <class T>
void fuse(const Block<T>& p, T* x, i64 h, i64 w, const Own& o) {
  const i64 wide_k = rounded_up(p.k), valid = std::min(LANES, p.W - w);
  if (p.bottleneck)
    for (i64 i = 0; i < p.m * LANES; ++i) o.row[i] = relu(o.row[i]);
  for (i64 l = 0; l < valid; ++l) {
    T* to = x + (h * p.W + w + l) * p.C;
    if (p.bottleneck) {
      for (i64 j = 0; j < wide_k; j += LANES) {
        Vector sum = load(o.last_bias + j);
        for (i64 i = 0; i < p.m; ++i) sum += o.row[i * LANES + l] * load(o.last + i * wide_k + j);
        store(o.y + j, sum);
      }
    } else {
      for (i64 j = 0; j < p.k; ++j) o.y[j] = o.row[j * LANES + l] * o.scores[j];
    }
    switch (p.fusion) {
      case Fusion::first: add_neighbours(to, o.y, p.k); break;
      case Fusion::last: add_neighbours(to + p.C - p.k, o.y, p.k); break;
      case Fusion::original:
        for (i64 j = 0; j < p.k; ++j) to[o.index[j]] = narrow<T>(wide(to[o.index[j]]) + o.y[j]);
        break;
      case Fusion::replace:
        for (i64 j = 0; j < p.k; ++j) to[o.index[j]] = narrow<T>(o.y[j]);
    }
  }
}

// Thread t of n on one image. All n call this together; `wait` waits for all.
template <class T, class Wait>
void run(const Block<T>& p, T* x, const Shared& s, const Own& o, i64 t, i64 n, Wait wait) {
  const Range channels = share(p.C, t, n), rows = share(p.H, t, n);
  sum_positions(p, x, share(p.P(), t, n), s.sums + t * p.C);
  wait();
  down_share(p, s, channels, n, s.hidden + t * p.r);
  wait();
  up_share(p, s, channels, n, o.hidden);
  best_of_share(p, s, channels, o.keys, s.candidates + t * p.k);
  wait();
  choose(p, s, n, o);
  for (i64 i = 0; i < p.inside(); ++i)
    for (i64 tap = 0; tap < 9; ++tap)
      o.offsets[i * 9 + tap] = i * p.plane() + (tap / 3 * p.pitch() + tap % 3) * p.dilation;
  gather(p, x, rows, o, s.planes);
  wait();
  const float* planes = s.planes;
  if (!p.bottleneck) {
    for (i64 h = rows.begin; h < rows.end; ++h)
      for (i64 w = 0; w < p.W; w += LANES) {
        conv3x3(p, planes, h, w, 0, o);
        into_planes(p, o.row, h, w, true, s.planes2);
      }
    pad(p, rows, s.planes2);
    wait();
    planes = s.planes2;
  }
  for (i64 h = rows.begin; h < rows.end; ++h)
    for (i64 w = 0; w < p.W; w += LANES) {
      conv3x3(p, planes, h, w, 1, o);
      fuse(p, x, h, w, o);
    }
}

i64 threads() {
#ifdef _OPENMP
  at::internal::lazy_init_num_threads();
  return at::in_parallel_region() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

template <class T>
void run_all(const Block<T>& p) {
  const i64 most = threads(), image = p.P() * p.C;
  const i64 work = image + 2 * p.C * p.r + 20 * p.P() * p.inside() * p.inside();
  const bool alone = most == 1 || work * p.B < 32768;  // else starting the others takes longer
  const bool by_image = !alone && p.B >= most;
  const i64 team = alone || by_image ? 1 : most, teams = by_image ? most : 1;

  thread_local std::unique_ptr<char[]> kept;
  thread_local size_t kept_size = 0;
  Carver counted{nullptr};
  for (i64 i = 0; i < teams; ++i) shared_scratch(p, team, counted);
  for (i64 i = 0; i < team * teams; ++i) own_scratch(p, team, counted);
  if (kept_size < counted.used + 64) {
    kept.reset();
    kept.reset(new char[counted.used + 64]);
    kept_size = counted.used + 64;
  }
  char* base = kept.get();
  base += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64;
  Carver scratch{base};
  std::vector<Shared> shared;
  std::vector<Own> own;
  for (i64 i = 0; i < teams; ++i) shared.push_back(shared_scratch(p, team, scratch));
  for (i64 i = 0; i < team * teams; ++i) own.push_back(own_scratch(p, team, scratch));

  const auto no_wait = [] {};
  if (alone) {
    for (i64 b = 0; b < p.B; ++b) run(p, p.x + b * image, shared[0], own[0], 0, 1, no_wait);
    return;
  }
#ifdef _OPENMP
  // No num_threads clause, as in ATen: GOMP's pool does not bear it.
#pragma omp parallel
  {
    const i64 t = omp_get_thread_num(), n = omp_get_num_threads();  // n may be less than asked for
    if (by_image) {
      const Range images = share(p.B, t, n);
      for (i64 b = images.begin; b < images.end; ++b)
        run(p, p.x + b * image, shared[t], own[t], 0, 1, no_wait);
    } else {
      const auto wait = [] {
#pragma omp barrier
      };
      for (i64 b = 0; b < p.B; ++b) {
        run(p, p.x + b * image, shared[0], own[t], t, n, wait);
        wait();
      }
    }
  }
#endif
}

Fusion fusion_of(std::string_view name) {
  if (name == "first") return Fusion::first;
  if (name == "last") return Fusion::last;
  if (name == "original") return Fusion::original;
  TORCH_CHECK(name == "replace", "fusion must be first, last, original or replace; not ", std::string(name));
  return Fusion::replace;
}

bool by_index(std::string_view order) {
  TORCH_CHECK(order == "score" || order == "index", "order must be score or index; not ", std::string(order));
  return order == "index";
}

const void* data(const Tensor& t) { return t.const_data_ptr(); }

void check(const Tensor& t, const Tensor& x, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(t.sizes() == shape, name, " has the shape ", t.sizes(), ", which should be ", shape);
  TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.is_cpu(), name, " must be a CPU tensor of ", x.scalar_type());
}

template <class T>
void call(Block<T>& p, const Tensor& x, const std::vector<Tensor>& weights) {
  p.x = static_cast<T*>(x.mutable_data_ptr());
  p.down = static_cast<const T*>(data(weights[0]));
  p.up = static_cast<const T*>(data(weights[1]));
  std::vector<float> converted;
  if (!std::is_same_v<T, float>) {
    i64 all = 0;
    for (size_t i = 2; i < weights.size(); ++i) all += weights[i].numel();
    converted.resize(all);
  }
  float* to = converted.data();
  for (size_t i = 2; i < weights.size(); ++i) {
    const i64 n = weights[i].numel();
    const T* from = static_cast<const T*>(data(weights[i]));
    const float* values;
    if constexpr (std::is_same_v<T, float>) {
      values = from;
    } else {
      for (i64 j = 0; j < n; ++j) to[j] = wide(from[j]);
      values = to;
      to += n;
    }
    (i % 2 ? p.b : p.w)[i / 2 - 1] = values;
  }
  run_all(p);
}

void mod_block_(
    const Tensor& x,
    const Tensor& down,
    const Tensor& up,
    const Tensor& weight1,
    const Tensor& bias1,
    const Tensor& weight2,
    const Tensor& bias2,
    const std::optional<Tensor>& weight3,
    const std::optional<Tensor>& bias3,
    i64 dilation,
    std::string_view order,
    std::string_view fusion) {
  TORCH_CHECK(x.dim() == 4, "x must be [B, C, H, W], not ", x.sizes());
  TORCH_CHECK(
      x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "x must be float32 or bfloat16, not ", x.scalar_type());
  TORCH_CHECK(down.dim() == 2 && weight1.dim() == 4 && dilation >= 1, "down must be a matrix, weight1 a kernel");
  TORCH_CHECK(weight3.has_value() == bias3.has_value(), "weight3 and bias3 go together");
  const bool bottleneck = weight3.has_value();
  const i64 C = x.size(1), r = down.size(1), k = weight1.size(1), m = weight1.size(0);
  TORCH_CHECK(1 <= k && k <= C, "k must be from 1 to ", C, " channels, not ", k);
  const i64 side = bottleneck ? 1 : 3;
  check(down, x, {C, r}, "down");
  check(up, x, {r, C}, "up");
  check(weight1, x, {bottleneck ? m : k, k, side, side}, "weight1");
  check(bias1, x, {m}, "bias1");
  check(weight2, x, {m, m, 3, 3}, "weight2");
  check(bias2, x, {m}, "bias2");
  if (bottleneck) {
    check(*weight3, x, {k, m, 1, 1}, "weight3");
    check(*bias3, x, {k}, "bias3");
  }
  const auto fusion_ = fusion_of(fusion);
  const bool by_index_ = by_index(order);
  if (x.numel() == 0) return;
  if (!x.is_contiguous(at::MemoryFormat::ChannelsLast)) {
    const Tensor last = x.contiguous(at::MemoryFormat::ChannelsLast);
    mod_block_(last, down, up, weight1, bias1, weight2, bias2, weight3, bias3, dilation, order, fusion);
    x.copy_(last);
    return;
  }
  std::vector<Tensor> weights = {down, up, weight1, bias1, weight2, bias2};
  if (bottleneck) weights.insert(weights.end(), {*weight3, *bias3});
  for (Tensor& w : weights) w = w.contiguous();
  const auto with = [&](auto type) {
    Block<decltype(type)> p{x.size(0), C, x.size(2), x.size(3), r, k, m, dilation, bottleneck, by_index_, fusion_};
    call(p, x, weights);
  };
  x.scalar_type() == at::kFloat ? with(float{}) : with(bf16{});
}

// Gradients are those of the plain form, which the caller takes where one is wanted.
void mod_block_autograd(
    const Tensor& x,
    const Tensor& down,
    const Tensor& up,
    const Tensor& weight1,
    const Tensor& bias1,
    const Tensor& weight2,
    const Tensor& bias2,
    const std::optional<Tensor>& weight3,
    const std::optional<Tensor>& bias3,
    i64 dilation,
    std::string_view order,
    std::string_view fusion) {
  if (at::GradMode::is_enabled()) {
    bool wanted = false;
    for (const Tensor* t : {&x, &down, &up, &weight1, &bias1, &weight2, &bias2}) wanted |= t->requires_grad();
    wanted |= weight3.has_value() && weight3->requires_grad();
    wanted |= bias3.has_value() && bias3->requires_grad();
    TORCH_CHECK(!wanted, "pliant::mod_block_ has no gradient: call it under torch.no_grad(), or use the plain form");
  }
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("pliant::mod_block_", "").typed<decltype(mod_block_)>();
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.call(x, down, up, weight1, bias1, weight2, bias2, weight3, bias3, dilation, order, fusion);
  }
  if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(pliant, CPU, m) { m.impl("mod_block_", mod_block_); }
TORCH_LIBRARY_IMPL(pliant, AutogradCPU, m) { m.impl("mod_block_", mod_block_autograd); }

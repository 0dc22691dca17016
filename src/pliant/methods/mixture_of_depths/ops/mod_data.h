// The data of one Mixture-of-Depths block: what a call is about, the layout of its images, and the
// memory that its computation in mod_kernel.h needs.
//
// B images      C channels    P = H W positions   k channels processed
// r hidden units of the selector                  m channels inside the core
// t of n: a share of the work on one image        L channels in a block of the layout
//
// The layout of an image is [C / L, P, L]: with L = 1 planes (NCHW), with 8 or 16 ONNX Runtime's
// blocks (NCHWc). LAST stands for one block of all channels (channels_last).

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "bfloat16.h"

namespace pliant {
namespace {  // libraries of several versions may be in one process

using i64 = int64_t;

constexpr i64 LANES = 16;
constexpr int LAST = 0;
typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));

inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }
inline i64 rounded_up(i64 n) { return (n + LANES - 1) / LANES * LANES; }
inline float relu(float v) { return v < 0 ? 0 : v; }  // NaN stays NaN

enum class Fusion { first, last, original, replace };
enum class Step { pool, down, up, gather, middle, end };
constexpr Step STEPS[] = {Step::pool, Step::down, Step::up, Step::gather, Step::middle, Step::end};

// Everything about a call that all images share. T: float or bf16; L: of the layout.
template <class T, int L>
struct Block {
  i64 B, C, H, W, r, k, m, dilation;
  bool bottleneck, by_index;
  Fusion fusion;
  T* x = nullptr;               // [B, C / L, H, W, L]
  const T* down = nullptr;      // [C, r]
  const T* up = nullptr;        // [r, C]
  const float* w[3] = {};       // [m, k] [m, m, 3, 3] [k, m], or twice [k, k, 3, 3]
  const float* b[3] = {};
  float* logits = nullptr;  // [B, C] and [B, k]: what the selector saw and chose, if it is asked for
  i64* channels = nullptr;
  i64 P() const { return H * W; }
  i64 inside() const { return bottleneck ? m : k; }
  i64 pitch() const { return rounded_up(W) + 2 * dilation; }
  i64 plane() const { return (H + 2 * dilation) * pitch(); }
  // Where channel c of the first position is, and how far the next position is.
  i64 place(i64 c) const { return L == LAST ? c : c / (L + !L) * P() * L + c % (L + !L); }
  i64 stride() const { return L == LAST ? C : L; }
  // Blocks are pooled by whoever computes with their means; one block is pooled by positions.
  bool has(Step step) const {
    return step == Step::pool ? L == LAST : step != Step::middle || !bottleneck;
  }
  // Roughly, multiplications; below 32768 for all images starting other threads takes longer.
  i64 work() const { return P() * C + 2 * C * r + 20 * P() * inside() * inside(); }
  bool small() const { return work() * B < 32768; }
};

// What the shares of an image have in common, and what each has for itself.
struct Shared {
  float *sums, *hidden, *mean, *logits, *planes, *planes2;  // [n, C] [n, r] [C] [C] planes
  uint64_t* candidates;                                     // [n, k]
};
struct Own {
  float *hidden, *scores, *picked, *row, *last, *last_bias, *y;
  uint64_t* keys;
  i64 *index, *places, *offsets;
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

// The scratch memory of n shares of one image.
struct Team {
  Shared shared;
  std::vector<Own> own;
  template <class T, int L>
  Team(const Block<T, L>& p, i64 n, Carver& from) {
    shared.sums = from.take<float>(L == LAST ? n * p.C : 0);
    shared.hidden = from.take<float>(n * p.r);
    shared.mean = from.take<float>(p.C);
    shared.logits = from.take<float>(p.C);
    shared.planes = from.take<float>(p.inside() * p.plane() + LANES);
    shared.planes2 = p.bottleneck ? nullptr : from.take<float>(p.inside() * p.plane() + LANES);
    shared.candidates = from.take<uint64_t>(n * p.k);
    const i64 wide_k = rounded_up(p.k);
    for (i64 t = 0; t < n; ++t) {
      Own o;
      o.hidden = from.take<float>(p.r);
      o.scores = from.take<float>(p.k);
      o.picked = from.take<float>(p.k * LANES);
      o.row = from.take<float>(p.inside() * LANES);
      o.last = from.take<float>(p.inside() * wide_k);
      o.last_bias = from.take<float>(wide_k);
      o.y = from.take<float>(wide_k);
      o.keys = from.take<uint64_t>(std::max(p.C, n * p.k));
      o.index = from.take<i64>(p.k);
      o.places = from.take<i64>(p.k);
      o.offsets = from.take<i64>(9 * p.inside());
      own.push_back(o);
    }
  }
};

// `teams` teams of n shares, in memory that this thread keeps for its next call.
template <class T, int L>
std::vector<Team> scratch(const Block<T, L>& p, i64 teams, i64 n) {
  thread_local std::unique_ptr<char[]> kept;
  thread_local size_t kept_size = 0;
  Carver counted{nullptr};
  for (i64 i = 0; i < teams; ++i) Team(p, n, counted);
  if (kept_size < counted.used + 64) {
    kept.reset();
    kept_size = 0;
    kept.reset(new char[counted.used + 64]);
    kept_size = counted.used + 64;
  }
  char* base = kept.get();
  Carver from{base + (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64};
  std::vector<Team> made;
  for (i64 i = 0; i < teams; ++i) made.emplace_back(p, n, from);
  return made;
}

}  // namespace
}  // namespace pliant

// One Mixture-of-Depths block for the CPU, in place: its arithmetic, for whoever has threads. The
// letters are those of mod_data.h.
//
// Work on an image goes in steps, each of which n shares may do at once; all shares of a step
// end before the next begins. So everyone has read the picked channels before anyone writes to
// the image, and channels may be picked that are written to.
//
// The core is computed in planes, a picture for each channel, on LANES columns at once: its
// channels are too few to fill a vector. Only the image itself has a layout.

#pragma once

#include <cmath>
#include <functional>

#include "mod_data.h"

namespace pliant {
namespace {  // libraries of several versions may be in one process

constexpr i64 AT_ONCE = 8;  // vectors, or positions, that the pool adds before it adds to the sum

struct Range {
  i64 begin, end;
};
inline Range share(i64 all, i64 t, i64 n) { return {all * t / n, all * (t + 1) / n}; }

// A share of the channels, in whole blocks of a blocked layout.
template <class T, int L>
inline Range channel_share(const Block<T, L>& p, i64 t, i64 n) {
  if (L == LAST) return share(p.C, t, n);
  const Range blocks = share(p.C / (L + !L), t, n);
  return {blocks.begin * L, blocks.end * L};
}

// Sums over the positions of a share, for all channels.
template <class T>
void sum_positions(const Block<T, LAST>& p, const T* x, Range positions, float* __restrict__ sums) {
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

// The sums over all positions of the L channels of one block [P, L].
template <class T, int L>
void sum_block(const T* x, i64 positions, float* sums) {
  static_assert(LANES % L == 0);
  const i64 all = positions * L;
  Vector total[AT_ONCE] = {};
  i64 at = 0;
  for (; at + AT_ONCE * LANES <= all; at += AT_ONCE * LANES)
    for (i64 i = 0; i < AT_ONCE; ++i)
      for (i64 l = 0; l < LANES; ++l) total[i][l] += wide(x[at + i * LANES + l]);
  float lanes[LANES];
  store(lanes, ((total[0] + total[1]) + (total[2] + total[3])) + ((total[4] + total[5]) + (total[6] + total[7])));
  for (; at < all; at += LANES)  // a rest begins with the first channel of the block, too
    for (i64 l = 0; l < std::min(LANES, all - at); ++l) lanes[l] += wide(x[at + l]);
  for (i64 c = 0; c < L; ++c) {
    float sum = 0;
    for (i64 l = c; l < LANES; l += L) sum += lanes[l];
    sums[c] = sum;
  }
}

// The mean of a share of the channels, and what these give to the hidden units.
template <class T, int L>
void down_share(const Block<T, L>& p, const T* x, const Shared& s, Range channels, i64 n, float* __restrict__ hidden) {
  std::fill(hidden, hidden + p.r, 0.0f);
  const float scale = 1.0f / static_cast<float>(p.P());
  if constexpr (L != LAST)
    for (i64 c = channels.begin; c < channels.end; c += L) sum_block<T, L>(x + p.place(c), p.P(), s.mean + c);
  for (i64 c = channels.begin; c < channels.end; ++c) {
    float sum = L == LAST ? 0 : s.mean[c];
    if (L == LAST)
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
template <class T, int L>
void up_share(const Block<T, L>& p, const Shared& s, Range channels, i64 n, float* hidden) {
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
template <class T, int L>
void best_of_share(const Block<T, L>& p, const Shared& s, Range channels, uint64_t* keys, uint64_t* best) {
  const i64 all = channels.end - channels.begin, count = std::min(p.k, all);
  for (i64 i = 0; i < all; ++i) keys[i] = key_of(s.logits[channels.begin + i], channels.begin + i);
  largest_first(keys, all, count);
  std::copy(keys, keys + count, best);
  std::fill(best + count, best + p.k, 0);  // below every channel's key
}

inline float sigmoid(float v) { return 1.0f / (1.0f + std::exp(-v)); }

// The k channels, their scores, and what ends the core with the scores in it.
template <class T, int L>
void choose(const Block<T, L>& p, const Shared& s, i64 n, const Own& o) {
  std::copy(s.candidates, s.candidates + n * p.k, o.keys);
  if (n > 1) largest_first(o.keys, n * p.k, p.k);
  for (i64 j = 0; j < p.k; ++j) o.keys[j] = 0xffffffffu - static_cast<uint32_t>(o.keys[j]);
  if (p.by_index) std::sort(o.keys, o.keys + p.k);
  const i64 wide_k = rounded_up(p.k);
  for (i64 j = 0; j < p.k; ++j) {
    o.index[j] = static_cast<i64>(o.keys[j]);
    o.places[j] = p.place(o.index[j]);
    o.scores[j] = sigmoid(s.logits[o.index[j]]);
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
template <class T, int L>
void into_planes(const Block<T, L>& p, const float* row, i64 h, i64 w, bool activate, float* planes) {
  float* to = planes + (h + p.dilation) * p.pitch() + p.dilation + w;
  for (i64 o = 0; o < p.inside(); ++o)
    for (i64 l = 0; l < LANES; ++l)
      to[o * p.plane() + l] = activate ? relu(row[o * LANES + l]) : row[o * LANES + l];
}

// Zeros around the pictures, for the rows of a share.
template <class T, int L>
void pad(const Block<T, L>& p, Range rows, float* planes) {
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

// LANES columns of the picked channels, zeros where the image has no more of them.
template <class T, int L>
void pick(const Block<T, L>& p, const T* x, i64 h, i64 w, const Own& o) {
  const i64 valid = std::min(LANES, p.W - w);
  const T* from = x + (h * p.W + w) * p.stride();
  if (valid < LANES) std::fill(o.picked, o.picked + p.k * LANES, 0.0f);
  if constexpr (L == LAST) {
    for (i64 l = 0; l < valid; ++l)
      for (i64 j = 0; j < p.k; ++j) o.picked[j * LANES + l] = wide(from[l * p.C + o.index[j]]);
  } else {
    for (i64 j = 0; j < p.k; ++j)
      for (i64 l = 0; l < valid; ++l) o.picked[j * LANES + l] = wide(from[o.places[j] + l * L]);
  }
}

// Gathers the picked channels of the rows of a share; in a bottleneck through the first 1x1.
template <class T, int L>
void gather(const Block<T, L>& p, const T* x, Range rows, const Own& o, float* planes) {
  for (i64 h = rows.begin; h < rows.end; ++h) {
    for (i64 w = 0; w < p.W; w += LANES) {
      pick(p, x, h, w, o);
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
template <class T, int L>
inline void conv3x3(const Block<T, L>& p, const float* planes, i64 h, i64 w, int layer, const Own& o) {
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

// Adds y to the k channels from `first` on of one position, which is `x` of the first channel.
template <class T, int L>
inline void add_at(const Block<T, L>& p, T* x, i64 first, const float* y) {
  if constexpr (L == LAST) {
    add_neighbours(x + first, y, p.k);
  } else {
    for (i64 c = first; c < first + p.k;) {
      const i64 count = std::min(L - c % L, first + p.k - c);
      add_neighbours(x + p.place(c), y + (c - first), count);
      c += count;
    }
  }
}

// The end of the core for LANES columns: the last 1x1, the scores, and the fusion with x.
template <class T, int L>
void fuse(const Block<T, L>& p, T* x, i64 h, i64 w, const Own& o) {
  const i64 wide_k = rounded_up(p.k), valid = std::min(LANES, p.W - w);
  if (p.bottleneck)
    for (i64 i = 0; i < p.m * LANES; ++i) o.row[i] = relu(o.row[i]);
  for (i64 l = 0; l < valid; ++l) {
    T* to = x + (h * p.W + w + l) * p.stride();
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
      case Fusion::first: add_at(p, to, 0, o.y); break;
      case Fusion::last: add_at(p, to, p.C - p.k, o.y); break;
      case Fusion::original:
        for (i64 j = 0; j < p.k; ++j) to[o.places[j]] = narrow<T>(wide(to[o.places[j]]) + o.y[j]);
        break;
      case Fusion::replace:
        for (i64 j = 0; j < p.k; ++j) to[o.places[j]] = narrow<T>(o.y[j]);
    }
  }
}

// Share t of n of one step on image b.
template <class T, int L>
void run_step(Step step, const Block<T, L>& p, i64 b, const Team& team, i64 t, i64 n) {
  const Shared& s = team.shared;
  const Own& o = team.own[t];
  T* x = p.x + b * p.P() * p.C;
  const Range channels = channel_share(p, t, n), rows = share(p.H, t, n);
  switch (step) {
    case Step::pool:
      if constexpr (L == LAST) sum_positions(p, x, share(p.P(), t, n), s.sums + t * p.C);
      break;
    case Step::down: down_share(p, x, s, channels, n, s.hidden + t * p.r); break;
    case Step::up:
      up_share(p, s, channels, n, o.hidden);
      best_of_share(p, s, channels, o.keys, s.candidates + t * p.k);
      break;
    case Step::gather:
      choose(p, s, n, o);
      if (t == 0 && p.logits) std::copy(s.logits, s.logits + p.C, p.logits + b * p.C);
      if (t == 0 && p.channels) std::copy(o.index, o.index + p.k, p.channels + b * p.k);
      for (i64 i = 0; i < p.inside(); ++i)
        for (i64 tap = 0; tap < 9; ++tap)
          o.offsets[i * 9 + tap] = i * p.plane() + (tap / 3 * p.pitch() + tap % 3) * p.dilation;
      gather(p, x, rows, o, s.planes);
      break;
    case Step::middle:
      for (i64 h = rows.begin; h < rows.end; ++h)
        for (i64 w = 0; w < p.W; w += LANES) {
          conv3x3(p, s.planes, h, w, 0, o);
          into_planes(p, o.row, h, w, true, s.planes2);
        }
      pad(p, rows, s.planes2);
      break;
    case Step::end:
      for (i64 h = rows.begin; h < rows.end; ++h)
        for (i64 w = 0; w < p.W; w += LANES) {
          conv3x3(p, p.bottleneck ? s.planes : s.planes2, h, w, 1, o);
          fuse(p, x, h, w, o);
        }
  }
}

// All steps on image b by one thread.
template <class T, int L>
void run_alone(const Block<T, L>& p, i64 b, const Team& team) {
  for (Step step : STEPS)
    if (p.has(step)) run_step(step, p, b, team, 0, 1);
}

}  // namespace
}  // namespace pliant

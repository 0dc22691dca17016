// What a training step of a Mixture-of-Depths block computes for one image: planes, sums, ranks.
// Used by mod_training.cpp, whose legend holds here.
//
// The core's channels are too few to fill a vector, so that it is computed in planes, a picture
// for each channel, in float32, rows with their padding one after the other: a tap of a kernel is
// then a shift of the whole plane. What stands behind the end of a row is left out afterwards.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "bfloat16.h"

namespace mod_planes {

using i64 = int64_t;

// Values that are added in float32 before they are added to a sum in double.
constexpr i64 AT_ONCE = 128;

using pliant::bf16;
using pliant::narrow;
using pliant::wide;

// Where the values of a feature map lie: channels_last, or planes.
struct Map {
  i64 batch, channels, height, width, positions, channel, position;  // the last two: strides
  Map(const i64* sizes, bool by_position)
      : batch(sizes[0]), channels(sizes[1]), height(sizes[2]), width(sizes[3]),
        positions(height * width), channel(by_position ? 1 : positions), position(by_position ? channels : 1) {}
  bool by_position() const { return channel == 1 && channels > 1; }
};

struct Layer {
  const float *weight, *scale, *shift;
  i64 inputs, outputs, taps, pad;
};

// A plane with its padding, and how far a kernel's taps are apart in it.
struct Frame {
  i64 height, width, pad, row, length, size, shifts[9];
  Frame(i64 height, i64 width, i64 pad, i64 taps)
      : height(height), width(width), pad(pad), row(width + 2 * pad), length(height * row),
        size((height + 2 * pad) * row + 2 * pad) {
    for (i64 t = 0; t < 9; t++) shifts[t] = taps == 9 ? (t / 3) * pad * row + (t % 3) * pad : 0;
  }
  // Planes of [H, W], each times a and plus b and perhaps ReLU, in frames of zeros.
  void fill(float* frames, const float* planes, i64 count, const float* a, const float* b, bool relu) const {
    std::fill(frames, frames + count * size, 0.f);
    for (i64 c = 0; c < count; c++)
      for (i64 h = 0; h < height; h++) {
        float* to = frames + c * size + (h + pad) * row + pad;
        const float* from = planes + (c * height + h) * width;
        const float times = a ? a[c] : 1.f, plus = b ? b[c] : 0.f;
        for (i64 w = 0; w < width; w++) {
          const float v = times * from[w] + plus;
          to[w] = relu ? (v > 0.f ? v : (v != v ? v : 0.f)) : v;
        }
      }
  }
};

// sums[t] of the rows: every output position of every output plane, over taps and input planes.
template <bool NINE>
void convolve(const Frame& f, const float* in, i64 inputs, const float* weight, i64 outputs, float* out) {
  for (i64 o = 0; o < outputs; o++) {
    float* __restrict sum = out + o * f.length;
    std::fill(sum, sum + f.length, 0.f);
    for (i64 i = 0; i < inputs; i++) {
      const float* v = in + i * f.size;
      const float* w = weight + (o * inputs + i) * (NINE ? 9 : 1);
      if constexpr (NINE) {
        const float *a = v + f.shifts[0], *b = v + f.shifts[3], *c = v + f.shifts[6];
        const i64 d = f.pad, e = 2 * f.pad;
        for (i64 q = 0; q < f.length; q++)
          sum[q] += w[0] * a[q] + w[1] * a[q + d] + w[2] * a[q + e] + w[3] * b[q] + w[4] * b[q + d] +
                    w[5] * b[q + e] + w[6] * c[q] + w[7] * c[q + d] + w[8] * c[q + e];
      } else {
        for (i64 q = 0; q < f.length; q++) sum[q] += w[0] * v[q];
      }
    }
  }
}

// The gradient of a kernel: `rows` as `convolve` lays its output out, zero behind the rows' ends.
template <bool NINE>
void kernel_gradient(const Frame& f, const float* in, i64 inputs, const float* rows, i64 outputs, float* sums) {
  for (i64 o = 0; o < outputs; o++)
    for (i64 i = 0; i < inputs; i++) {
      const float* __restrict g = rows + o * f.length;
      const float* v = in + i * f.size;
      float* to = sums + (o * inputs + i) * (NINE ? 9 : 1);
      if constexpr (NINE) {
        const float *a = v + f.shifts[0], *b = v + f.shifts[3], *c = v + f.shifts[6];
        const i64 d = f.pad, e = 2 * f.pad;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0, s8 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4, s5, s6, s7, s8)
        for (i64 q = 0; q < f.length; q++) {
          s0 += g[q] * a[q], s1 += g[q] * a[q + d], s2 += g[q] * a[q + e];
          s3 += g[q] * b[q], s4 += g[q] * b[q + d], s5 += g[q] * b[q + e];
          s6 += g[q] * c[q], s7 += g[q] * c[q + d], s8 += g[q] * c[q + e];
        }
        const float all[9] = {s0, s1, s2, s3, s4, s5, s6, s7, s8};
        std::copy(all, all + 9, to);
      } else {
        float s = 0;
#pragma omp simd reduction(+ : s)
        for (i64 q = 0; q < f.length; q++) s += g[q] * v[q];
        *to = s;
      }
    }
}

inline void convolve(const Frame& f, const float* in, const Layer& layer, float* out) {
  (layer.taps == 9 ? convolve<true> : convolve<false>)(f, in, layer.inputs, layer.weight, layer.outputs, out);
}

// Statistics of a layer's output over the batch, and what they make of it: a * raw + b.
struct Norm {
  std::vector<float> a, b, mean, rstd;
  Norm(const float* mean, const float* rstd, const Layer& layer)
      : a(layer.outputs), b(layer.outputs), mean(mean, mean + layer.outputs), rstd(rstd, rstd + layer.outputs) {
    for (i64 c = 0; c < layer.outputs; c++) {
      a[c] = layer.scale[c] * rstd[c];
      b[c] = layer.shift[c] - a[c] * mean[c];
    }
  }
};

// Sums along a row first, then of rows: float32 would lose digits over thousands of positions.
template <class T>
void mean_of(const T* x, const Map& map, float* mean, std::vector<float>& row) {
  const i64 C = map.channels, W = map.width;
  std::fill(mean, mean + C, 0.f);
  if (map.by_position()) {
    // Rows of pixels are added as they are, so that few channels make long vectors, too.
    row.assign(W * C, 0.f);
    float* __restrict sum = row.data();
    for (i64 h = 0; h < map.height; h++) {
      const T* v = x + h * W * C;
      for (i64 i = 0; i < W * C; i++) sum[i] += wide(v[i]);
    }
    for (i64 w = 0; w < W; w++)
      for (i64 c = 0; c < C; c++) mean[c] += sum[w * C + c];
  } else {
    for (i64 c = 0; c < C; c++)
      for (i64 h = 0; h < map.height; h++) {
        const T* v = x + c * map.positions + h * W;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 w = 0; w < W; w++) sum += wide(v[w]);
        mean[c] += sum;
      }
  }
  for (i64 c = 0; c < C; c++) mean[c] /= static_cast<float>(map.positions);
}

inline float dot(const float* a, const float* b, i64 n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

// The mean of a plane, and the sum of squared distances from it.
inline void plane_moments(const float* v, i64 n, double* moments) {
  double sum = 0, squares = 0;
  for (i64 begin = 0; begin < n; begin += AT_ONCE) {
    const i64 end = std::min(begin + AT_ONCE, n);
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (i64 i = begin; i < end; i++) s += v[i];
    sum += s;
  }
  const float mean = static_cast<float>(sum / static_cast<double>(n));
  double rest = 0;  // what the rounded mean misses
  for (i64 begin = 0; begin < n; begin += AT_ONCE) {
    const i64 end = std::min(begin + AT_ONCE, n);
    float s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
    for (i64 i = begin; i < end; i++) {
      const float d = v[i] - mean;
      s += d, q += d * d;
    }
    rest += s, squares += q;
  }
  rest /= static_cast<double>(n);
  moments[0] = mean + rest, moments[1] = squares - static_cast<double>(n) * rest * rest;
}

// The k highest logits, best first; NaN before all, of equal ones the lower channel.
inline void rank(const float* logits, i64 channels, i64 k, bool by_index, i64* index) {
  std::vector<i64> all(channels);
  std::iota(all.begin(), all.end(), 0);
  const auto before = [&](i64 p, i64 q) {
    const float a = logits[p], b = logits[q];
    if ((a != a) != (b != b)) return a != a;
    return a > b || (!(a < b) && p < q);
  };
  std::partial_sort(all.begin(), all.begin() + k, all.end(), before);
  if (by_index) std::sort(all.begin(), all.begin() + k);
  std::copy(all.begin(), all.begin() + k, index);
}

// Channels that the core's output goes to.
inline void places(const std::string& fusion, const i64* index, i64 k, i64 channels, i64* to) {
  for (i64 j = 0; j < k; j++)
    to[j] = fusion == "first" ? j : fusion == "last" ? channels - k + j : index[j];
}

// Sums of a gradient, and of it times the normalised value, for one plane.
inline void norm_sums(const float* g, const float* raw, float mean, float rstd, i64 n, double* sums) {
  double all = 0, product = 0;
  for (i64 begin = 0; begin < n; begin += AT_ONCE) {
    const i64 end = std::min(begin + AT_ONCE, n);
    float s = 0, x = 0;
#pragma omp simd reduction(+ : s, x)
    for (i64 p = begin; p < end; p++) {
      s += g[p];
      x += g[p] * ((raw[p] - mean) * rstd);
    }
    all += s, product += x;
  }
  sums[0] = all, sums[1] = product;
}

}  // namespace mod_planes

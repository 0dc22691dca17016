// A Mixture-of-Depths block in training, for the CPU: forward and backward, each one operator,
// whose arguments are told in mod_training.py.
//
// B images      C channels    P = H W positions   k channels processed
// r hidden units of the selector                  m_l channels behind the core's layer l
//
// A layer is a convolution (1x1, or 3x3 with padding), batch norm by the statistics of the batch,
// and ReLU but for the last. Threads take images; between layers they meet, because statistics
// are of the whole batch. Sums over images are taken image by image, in their order: results do
// not depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "mod_training.h"

namespace {

using at::Tensor;
using namespace mod_planes;

std::vector<Layer> layers_of(at::TensorList weights, at::TensorList scales, at::TensorList shifts, i64 dilation) {
  std::vector<Layer> layers;
  for (size_t l = 0; l < weights.size(); l++) {
    const i64 taps = weights[l].size(2) * weights[l].size(3);
    layers.push_back({weights[l].const_data_ptr<float>(), scales[l].const_data_ptr<float>(),
                      shifts[l].const_data_ptr<float>(), weights[l].size(1), weights[l].size(0), taps,
                      taps == 9 ? dilation : 0});
  }
  return layers;
}

// What a backward pass needs of a forward pass: channels, and values one after the other. Few
// tensors, because each costs about as long as a small block.
struct Kept {
  i64* index;                                      // [B, k]
  float *scores, *mean, *hidden, *picked;          // [B, k], [B, C], [B, r], [B, k, P]
  std::vector<float*> raw, means, rstds;           // for each layer [B, m, P], [m], [m]
  static i64 size(const Map& map, const std::vector<Layer>& layers, i64 units) {
    const i64 k = layers[0].inputs;
    i64 values = map.batch * (k + map.channels + units + k * map.positions);
    for (const Layer& layer : layers) values += layer.outputs * (map.batch * map.positions + 2);
    return values;
  }
  Kept(const Tensor& channels, const Tensor& values, const Map& map, const std::vector<Layer>& layers, i64 units) {
    const i64 k = layers[0].inputs;
    float* next = values.data_ptr<float>();
    const auto take = [&](i64 count) { return (next += count) - count; };
    index = channels.data_ptr<i64>();
    scores = take(map.batch * k), mean = take(map.batch * map.channels), hidden = take(map.batch * units);
    picked = take(map.batch * k * map.positions);
    for (const Layer& layer : layers) {
      raw.push_back(take(map.batch * layer.outputs * map.positions));
      means.push_back(take(layer.outputs));
      rstds.push_back(take(layer.outputs));
    }
  }
};

template <class T>
void forward(const Tensor& x, const Map& map, const std::vector<Layer>& layers, const float* down,
             const float* up, i64 units, bool by_index, const std::string& fusion, at::TensorList running_means,
             at::TensorList running_vars, at::ArrayRef<double> eps, at::ArrayRef<double> momenta, const Kept& kept, Tensor& out) {
  const i64 B = map.batch, C = map.channels, P = map.positions, k = layers[0].inputs;
  const T* xs = static_cast<const T*>(x.const_data_ptr());
  T* outs = static_cast<T*>(out.data_ptr());
  i64* index = kept.index;
  float* scores = kept.scores;
  float* picked = kept.picked;

  for (size_t l = 0; l < layers.size(); l++) {
    const Layer& layer = layers[l];
    const i64 m = layer.outputs;
    const Frame frame(map.height, map.width, layer.pad, layer.taps);
    std::vector<double> sums(2 * B * m);
    float* raw = kept.raw[l];
    std::optional<Norm> norm;
    if (l) norm.emplace(kept.means[l - 1], kept.rstds[l - 1], layers[l - 1]);
    at::parallel_for(0, B, 1, [&](i64 begin, i64 end) {
      std::vector<float> frames(layer.inputs * frame.size), rows(m * frame.length), row, logits(C);
      for (i64 b = begin; b < end; b++) {
        const float* before = picked + b * k * P;
        if (l) {
          before = kept.raw[l - 1] + b * layer.inputs * P;
        } else {
          const T* image = xs + b * C * P;
          if (down) {
            float* mean = kept.mean + b * C;
            float* hidden = kept.hidden + b * units;
            mean_of(image, map, mean, row);
            for (i64 u = 0; u < units; u++) {
              const float v = dot(down + u * C, mean, C);
              hidden[u] = v > 0.f || v != v ? v : 0.f;
            }
            for (i64 c = 0; c < C; c++) logits[c] = dot(up + c * units, hidden, units);
            rank(logits.data(), C, k, by_index, index + b * k);
            for (i64 j = 0; j < k; j++) scores[b * k + j] = 1.f / (1.f + std::exp(-logits[index[b * k + j]]));
          }
          for (i64 j = 0; j < k; j++) {
            const T* from = image + index[b * k + j] * map.channel;
            float* to = picked + (b * k + j) * P;
            for (i64 p = 0; p < P; p++) to[p] = wide(from[p * map.position]);
          }
        }
        frame.fill(frames.data(), before, layer.inputs, l ? norm->a.data() : nullptr,
                   l ? norm->b.data() : nullptr, l > 0);
        convolve(frame, frames.data(), layer, rows.data());
        for (i64 o = 0; o < m; o++) {
          float* plane = raw + (b * m + o) * P;
          for (i64 h = 0; h < map.height; h++)
            std::memcpy(plane + h * map.width, rows.data() + o * frame.length + h * frame.row,
                        map.width * sizeof(float));
          plane_moments(plane, P, sums.data() + 2 * (b * m + o));
        }
      }
    });
    float *mean = kept.means[l], *rstd = kept.rstds[l];
    const double n = static_cast<double>(B * P);
    for (i64 o = 0; o < m; o++) {
      double average = 0, spread = 0;
      for (i64 b = 0; b < B; b++) average += sums[2 * (b * m + o)] / static_cast<double>(B);
      for (i64 b = 0; b < B; b++) {
        const double apart = sums[2 * (b * m + o)] - average;
        spread += (sums[2 * (b * m + o) + 1] + static_cast<double>(P) * apart * apart) / n;
      }
      mean[o] = static_cast<float>(average);
      rstd[o] = static_cast<float>(1 / std::sqrt(spread + eps[l]));
      if (!running_means.empty()) {
        const double momentum = momenta[l];
        float* old = running_means[l].data_ptr<float>() + o;
        *old = static_cast<float>((1 - momentum) * *old + momentum * average);
        old = running_vars[l].data_ptr<float>() + o;
        *old = static_cast<float>((1 - momentum) * *old + momentum * spread * n / (n - 1));
      }
    }
  }
  const size_t last = layers.size() - 1;
  const Norm norm(kept.means[last], kept.rstds[last], layers[last]);
  const bool replace = fusion == "replace";
  const float* raw = kept.raw[last];
  at::parallel_for(0, B, 1, [&](i64 begin, i64 end) {
    std::vector<i64> to(k);
    for (i64 b = begin; b < end; b++) {
      T* image = outs + b * C * P;
      std::memcpy(image, xs + b * C * P, C * P * sizeof(T));
      places(fusion, index + b * k, k, C, to.data());
      for (i64 j = 0; j < k; j++) {
        const float score = down ? scores[b * k + j] : 1.f;
        const float a = norm.a[j] * score, plus = norm.b[j] * score;
        const float* y = raw + (b * k + j) * P;
        T* v = image + to[j] * map.channel;
        for (i64 p = 0; p < P; p++) {
          T& value = v[p * map.position];
          value = narrow<T>((replace ? 0.f : wide(value)) + (a * y[p] + plus));
        }
      }
    }
  });
}

struct Gradients {
  Tensor x, down, up;
  std::vector<Tensor> weights, scales, shifts;
};

template <class T>
void backward(const Tensor& of_out, const Map& map, const std::vector<Layer>& layers, const float* down,
              const float* up, i64 units, const std::string& fusion, const Kept& kept, Gradients& to) {
  const i64 B = map.batch, C = map.channels, P = map.positions, k = layers[0].inputs;
  const T* gs = static_cast<const T*>(of_out.const_data_ptr());
  T* gx = to.x.defined() ? static_cast<T*>(to.x.data_ptr()) : nullptr;
  const i64* index = kept.index;
  const float* scores = kept.scores;
  const size_t last = layers.size() - 1;
  const bool replace = fusion == "replace";
  i64 widest = k;
  for (const Layer& layer : layers) widest = std::max(widest, layer.outputs);
  // The gradient of the norm's output of the layer at hand, its sums, and the logits' gradients.
  Tensor current_ = at::empty({B * widest * P}, at::kFloat), below_ = at::empty({B * widest * P}, at::kFloat);
  float *current = current_.data_ptr<float>(), *below = below_.data_ptr<float>();
  std::vector<float> of_logits(B * k), of_hidden(B * std::max<i64>(units, 1));
  std::vector<double> sums(2 * B * widest);

  const auto norm_of = [&](size_t l) {
    return Norm(kept.means[l], kept.rstds[l], layers[l]);
  };
  {
    const Norm norm = norm_of(last);
    const float* raws = kept.raw[last];
    at::parallel_for(0, B, 1, [&](i64 begin, i64 end) {
      std::vector<i64> places_(k);
      for (i64 b = begin; b < end; b++) {
        places(fusion, index + b * k, k, C, places_.data());
        for (i64 j = 0; j < k; j++) {
          const T* from = gs + b * C * P + places_[j] * map.channel;
          const float* raw = raws + (b * k + j) * P;
          float* g = current + (b * k + j) * P;
          for (i64 p = 0; p < P; p++) g[p] = wide(from[p * map.position]);
          if (down) {
            const float score = scores[b * k + j], a = norm.a[j], plus = norm.b[j];
            double all = 0;
            for (i64 first = 0; first < P; first += AT_ONCE) {
              const i64 behind = std::min(first + AT_ONCE, P);
              float s = 0;
#pragma omp simd reduction(+ : s)
              for (i64 p = first; p < behind; p++) {
                s += g[p] * (a * raw[p] + plus);
                g[p] *= score;
              }
              all += s;
            }
            of_logits[b * k + j] = static_cast<float>(all) * score * (1.f - score);
          }
          norm_sums(g, raw, norm.mean[j], norm.rstd[j], P, sums.data() + 2 * (b * k + j));
        }
      }
    });
  }
  for (size_t l = last + 1; l-- > 0;) {
    const Layer& layer = layers[l];
    const i64 m = layer.outputs, n = layer.inputs, taps = layer.taps;
    const Norm norm = norm_of(l);
    std::optional<Norm> previous;
    if (l) previous.emplace(norm_of(l - 1));
    std::vector<float> offset(m), slope(m);
    for (i64 o = 0; o < m; o++) {
      double g = 0, gx_ = 0;
      for (i64 b = 0; b < B; b++) g += sums[2 * (b * m + o)], gx_ += sums[2 * (b * m + o) + 1];
      to.shifts[l].data_ptr<float>()[o] = static_cast<float>(g);
      to.scales[l].data_ptr<float>()[o] = static_cast<float>(gx_);
      // The norm's gradient is a (g - mean(g) - normalised mean(g normalised)).
      const double count = static_cast<double>(B * P);
      offset[o] = static_cast<float>(g / count);
      slope[o] = static_cast<float>(norm.rstd[o] * gx_ / count);
    }
    std::vector<float> flipped(n * m * taps);
    for (i64 o = 0; o < m; o++)
      for (i64 i = 0; i < n; i++)
        for (i64 t = 0; t < taps; t++)
          flipped[(i * m + o) * taps + taps - 1 - t] = layer.weight[(o * n + i) * taps + t];
    const Layer transposed{flipped.data(), nullptr, nullptr, m, n, taps, layer.pad};
    const Frame frame(map.height, map.width, layer.pad, taps);
    std::vector<float> of_weight(B * m * n * taps);
    std::vector<double> next(2 * B * widest);
    const float* raws = kept.raw[l];
    at::parallel_for(0, B, 1, [&](i64 begin, i64 end) {
      std::vector<float> in(n * frame.size), out(m * frame.size), rows(std::max(m, n) * frame.length);
      std::vector<float> of_mean(C), tiled(map.by_position() ? map.width * C : 0);
      for (i64 b = begin; b < end; b++) {
        // The convolution's gradient, in rows with zeros behind them; then the same in frames.
        std::fill(out.begin(), out.end(), 0.f);
        for (i64 o = 0; o < m; o++)
          for (i64 h = 0; h < map.height; h++) {
            float* row = rows.data() + o * frame.length + h * frame.row;
            const float* g = current + (b * m + o) * P + h * map.width;
            const float* raw = raws + (b * m + o) * P + h * map.width;
            for (i64 w = 0; w < map.width; w++)
              row[w] = norm.a[o] * ((g[w] - offset[o]) - (raw[w] - norm.mean[o]) * slope[o]);
            std::fill(row + map.width, row + frame.row, 0.f);
            std::memcpy(out.data() + o * frame.size + (h + frame.pad) * frame.row + frame.pad, row,
                        map.width * sizeof(float));
          }
        const float* before = (l ? kept.raw[l - 1] : kept.picked) + b * n * P;
        frame.fill(in.data(), before, n, l ? previous->a.data() : nullptr, l ? previous->b.data() : nullptr, l > 0);
        (taps == 9 ? kernel_gradient<true> : kernel_gradient<false>)(
            frame, in.data(), n, rows.data(), m, of_weight.data() + b * m * n * taps);
        if (l || gx) convolve(frame, out.data(), transposed, rows.data());
        if (l) {  // through ReLU, to the norm before
          for (i64 i = 0; i < n; i++) {
            float* g = below + (b * n + i) * P;
            const float a = previous->a[i], plus = previous->b[i];
            for (i64 h = 0; h < map.height; h++) {
              const float* row = rows.data() + i * frame.length + h * frame.row;
              const float* raw = before + i * P + h * map.width;
              for (i64 w = 0; w < map.width; w++) g[h * map.width + w] = a * raw[w] + plus <= 0.f ? 0.f : row[w];
            }
            norm_sums(g, before + i * P, previous->mean[i], previous->rstd[i], P, next.data() + 2 * (b * n + i));
          }
          continue;
        }
        if (down) {
          const float* hidden = kept.hidden + b * units;
          float* g = of_hidden.data() + b * units;
          std::fill(g, g + units, 0.f);
          for (i64 j = 0; j < k; j++)
            for (i64 u = 0; u < units; u++) g[u] += of_logits[b * k + j] * up[index[b * k + j] * units + u];
          std::fill(of_mean.begin(), of_mean.end(), 0.f);
          for (i64 u = 0; u < units; u++) {
            if (hidden[u] <= 0.f) g[u] = 0.f;
            for (i64 c = 0; c < C; c++) of_mean[c] += g[u] * down[u * C + c];
          }
          for (i64 c = 0; c < C; c++) of_mean[c] /= static_cast<float>(P);
        }
        if (!gx) continue;
        const T* __restrict from = gs + b * C * P;
        T* __restrict image = gx + b * C * P;
        const float* __restrict mean = of_mean.data();
        if (map.by_position()) {
          for (i64 w = 0; w < map.width; w++) std::copy(mean, mean + C, tiled.data() + w * C);
          const float* __restrict means = tiled.data();
          const i64 n_row = map.width * C;
          for (i64 h = 0; h < map.height; h++)
            for (i64 i = 0; i < n_row; i++) image[h * n_row + i] = narrow<T>(wide(from[h * n_row + i]) + means[i]);
        } else {
          for (i64 c = 0; c < C; c++)
            for (i64 p = 0; p < P; p++) image[c * P + p] = narrow<T>(wide(from[c * P + p]) + mean[c]);
        }
        for (i64 j = 0; j < k; j++) {  // anew, so that it is rounded once
          const i64 c = index[b * k + j];
          for (i64 h = 0; h < map.height; h++) {
            const float* row = rows.data() + j * frame.length + h * frame.row;
            for (i64 w = 0; w < map.width; w++) {
              const i64 at = c * map.channel + (h * map.width + w) * map.position;
              image[at] = narrow<T>((replace ? 0.f : wide(from[at])) + mean[c] + row[w]);
            }
          }
        }
      }
    });
    float* of_kernel = to.weights[l].data_ptr<float>();
    std::fill(of_kernel, of_kernel + m * n * taps, 0.f);
    for (i64 b = 0; b < B; b++)
      for (i64 v = 0; v < m * n * taps; v++) of_kernel[v] += of_weight[b * m * n * taps + v];
    std::swap(current, below);
    std::swap(sums, next);
  }
  if (!down) return;
  const float *mean = kept.mean, *hidden = kept.hidden;
  float *of_down = to.down.data_ptr<float>(), *of_up = to.up.data_ptr<float>();
  at::parallel_for(0, units, 1, [&](i64 begin, i64 end) {
    for (i64 u = begin; u < end; u++)
      for (i64 b = 0; b < B; b++) {
        const float g = of_hidden[b * units + u];
        for (i64 c = 0; c < C; c++) of_down[u * C + c] += g * mean[b * C + c];
      }
  });
  for (i64 b = 0; b < B; b++)
    for (i64 j = 0; j < k; j++)
      for (i64 u = 0; u < units; u++)
        of_up[index[b * k + j] * units + u] += of_logits[b * k + j] * hidden[b * units + u];
}

const float* values(const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// The output, and the two tensors of `Kept`.
std::tuple<Tensor, Tensor, Tensor> mod_training(const Tensor& x, const std::optional<Tensor>& index,
                                 const std::optional<Tensor>& down, const std::optional<Tensor>& up,
                                 at::TensorList weights, at::TensorList scales, at::TensorList shifts,
                                 at::TensorList running_means, at::TensorList running_vars,
                                 at::ArrayRef<double> eps, at::ArrayRef<double> momenta, int64_t dilation,
                                 bool by_position, c10::string_view order, c10::string_view fusion) {
  const Map map(x.sizes().data(), by_position);
  const auto layers = layers_of(weights, scales, shifts, dilation);
  const i64 B = map.batch, k = layers[0].inputs, units = down ? down->size(0) : 0;
  const auto floats = at::TensorOptions().dtype(at::kFloat);
  Tensor channels = index ? index->clone(at::MemoryFormat::Contiguous) : at::empty({B, k}, floats.dtype(at::kLong));
  Tensor values_ = at::empty({Kept::size(map, layers, units)}, floats);
  const Kept kept(channels, values_, map, layers, units);
  Tensor out = at::empty_like(x);
  (x.scalar_type() == at::kFloat ? forward<float> : forward<bf16>)(
      x, map, layers, values(down), values(up), units, order == "index", std::string(fusion), running_means,
      running_vars, eps, momenta, kept, out);
  return {out, channels, values_};
}

// Gradients of x (empty where it is not wanted), down, up, and of each layer's weight, scale, shift.
std::vector<Tensor> mod_training_backward(const Tensor& of_out, const Tensor& channels, const Tensor& kept_,
                                          const std::optional<Tensor>& down, const std::optional<Tensor>& up,
                                          at::TensorList weights, at::TensorList scales, at::TensorList shifts,
                                          int64_t dilation, bool by_position, c10::string_view fusion, bool wants_x) {
  const Map map(of_out.sizes().data(), by_position);
  const auto layers = layers_of(weights, scales, shifts, dilation);
  const size_t n = layers.size();
  const auto floats = at::TensorOptions().dtype(at::kFloat);
  const i64 units = down ? down->size(0) : 0;
  const Kept kept(channels, kept_, map, layers, units);
  Gradients to;
  if (wants_x) to.x = at::empty_like(of_out);
  to.down = down ? at::zeros({units, map.channels}, floats) : at::empty({0}, floats);
  to.up = down ? at::zeros({map.channels, units}, floats) : at::empty({0}, floats);
  for (size_t l = 0; l < n; l++) {
    to.weights.push_back(at::empty(weights[l].sizes(), floats));
    to.scales.push_back(at::empty({layers[l].outputs}, floats));
    to.shifts.push_back(at::empty({layers[l].outputs}, floats));
  }
  (of_out.scalar_type() == at::kFloat ? backward<float> : backward<bf16>)(
      of_out, map, layers, values(down), values(up), units, std::string(fusion), kept, to);
  std::vector<Tensor> gradients{wants_x ? to.x : at::empty({0}, floats), to.down, to.up};
  for (const auto* list : {&to.weights, &to.scales, &to.shifts})
    gradients.insert(gradients.end(), list->begin(), list->end());
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(pliant, CPU, m) {
  m.impl("mod_training", mod_training);
  m.impl("mod_training_backward", mod_training_backward);
}

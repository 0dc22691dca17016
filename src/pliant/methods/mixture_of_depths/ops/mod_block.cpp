// The operator pliant::mod_block_ of PyTorch, channels_last, whose arguments are told in
// mod_block.py: a Mixture-of-Depths block by mod_kernel.h, on the threads of PyTorch's pool.
//
// A team of threads works on one image at a time, waiting for all between two steps, or each
// thread on images of its own.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "mod_kernel.h"

namespace {

using at::Tensor;
using pliant::bf16;
using pliant::Block;
using pliant::Fusion;
using pliant::i64;
using pliant::LAST;
using pliant::Team;

i64 threads() {
#ifdef _OPENMP
  at::internal::lazy_init_num_threads();
  return at::in_parallel_region() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

template <class T>
void run_all(const Block<T, LAST>& p) {
  const i64 most = threads();
  const bool alone = most == 1 || p.small();
  const bool by_image = !alone && p.B >= most;
  const i64 team = alone || by_image ? 1 : most, teams = by_image ? most : 1;
  const std::vector<Team> made = pliant::scratch(p, teams, team);
  if (alone) {
    for (i64 b = 0; b < p.B; ++b) pliant::run_alone(p, b, made[0]);
    return;
  }
#ifdef _OPENMP
  // No num_threads clause, as in ATen: GOMP's pool does not bear it.
#pragma omp parallel
  {
    const i64 t = omp_get_thread_num(), n = omp_get_num_threads();  // n may be less than asked for
    if (by_image) {
      const pliant::Range images = pliant::share(p.B, t, n);
      for (i64 b = images.begin; b < images.end; ++b) pliant::run_alone(p, b, made[t]);
    } else {
      for (i64 b = 0; b < p.B; ++b)
        for (pliant::Step step : pliant::STEPS) {
          if (!p.has(step)) continue;
          pliant::run_step(step, p, b, made[0], t, n);
#pragma omp barrier
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
void call(Block<T, LAST>& p, const Tensor& x, const std::vector<Tensor>& weights) {
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
      for (i64 j = 0; j < n; ++j) to[j] = pliant::wide(from[j]);
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
    Block<decltype(type), LAST> p{x.size(0), C, x.size(2), x.size(3), r, k, m, dilation, bottleneck, by_index_, fusion_};
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

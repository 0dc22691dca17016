// The operator pliant.MoDBlock of ONNX Runtime: a Mixture-of-Depths block by mod_kernel.h, on the
// threads of the session. It works in place where ONNX Runtime lets it.
//
// inputs   x [B, C, H, W], laid out in blocks of `block` channels (1: as it says); then constants:
//          down [C, r]  up [r, C]  weight1 bias1 weight2 bias2 and, of a bottleneck, weight3 bias3
// outputs  x, processed; if asked for, logits [B, C] and channels [B, k], in the core's order
// attributes  block, dilation, order (score, index), fusion (first, last, original, replace)
//
// No thread may wait for another in ONNX Runtime, so each step of a block is a loop of its own.

#include <string>
#include <thread>

#include "mod_kernel.h"
#include "ort_abi.h"

namespace {

using ort::Api;
using ort::CustomOp;
using ort::KernelContext;
using ort::KernelInfo;
using ort::Status;
using pliant::Block;
using pliant::Fusion;
using pliant::i64;

constexpr int FIRST_WEIGHT = 1, WEIGHTS = 8;
constexpr i64 MOST_SHARES = 8;  // of one image: with more, starting them takes longer than they save

// The threads of a session are not told. More shares than threads do little harm.
i64 shares() {
  static const i64 found = std::clamp<i64>(std::thread::hardware_concurrency(), 1, MOST_SHARES);
  return found;
}

struct Weight {
  const float* data = nullptr;
  std::vector<i64> sizes;
};

class Kernel {
 public:
  Kernel(const Api& api, const KernelInfo* info) : api_(api) {
    const size_t inputs = api.inputs(info);
    for (size_t i = FIRST_WEIGHT; i < inputs && i <= WEIGHTS; ++i) {
      const ort::Value* value = api.constant(info, i);
      if (!value) refuse("its weights must be constants");
      i64 sizes[4];
      const size_t dimensions = api.sizes(value, sizes, 4);
      if (dimensions > 4) refuse("a weight has more than 4 dimensions");
      weights_.push_back({api.data<float>(value), {sizes, sizes + dimensions}});
    }
    block_ = api.number(info, "block");
    dilation_ = api.number(info, "dilation");
    by_index_ = text(info, "order") == "index";
    fusion_ = fusion(text(info, "fusion"));
    bottleneck_ = weights_.size() == WEIGHTS;
    if (!bottleneck_ && weights_.size() != WEIGHTS - 2) refuse("it takes 7 or 9 inputs");
    check();
  }

  Status* compute(KernelContext* context) const {
    switch (block_) {
      case 1: return run<1>(context);
      case 8: return run<8>(context);
      default: return run<16>(context);
    }
  }

 private:
  [[noreturn]] void refuse(const std::string& why) const {
    throw ort::Failure{api_.error(ort::INVALID_ARGUMENT, ("pliant.MoDBlock: " + why).c_str())};
  }

  std::string text(const KernelInfo* info, const char* name) const {
    char found[16];
    api_.text(info, name, found, sizeof found);
    return found;
  }

  Fusion fusion(const std::string& name) const {
    if (name == "first") return Fusion::first;
    if (name == "last") return Fusion::last;
    if (name == "original") return Fusion::original;
    if (name != "replace") refuse("fusion must be first, last, original or replace, not " + name);
    return Fusion::replace;
  }

  void check() {
    if (weights_[0].sizes.size() != 2 || weights_[2].sizes.size() != 4) refuse("down is no matrix or weight1 no kernel");
    C_ = weights_[0].sizes[0], r_ = weights_[0].sizes[1];
    m_ = weights_[2].sizes[0], k_ = weights_[2].sizes[1];
    const i64 side = bottleneck_ ? 1 : 3;
    std::vector<std::vector<i64>> wanted = {
        {C_, r_}, {r_, C_}, {bottleneck_ ? m_ : k_, k_, side, side}, {m_}, {m_, m_, 3, 3}, {m_}};
    if (bottleneck_) wanted.insert(wanted.end(), {{k_, m_, 1, 1}, {k_}});
    for (size_t i = 0; i < wanted.size(); ++i)
      if (weights_[i].sizes != wanted[i]) refuse("weight " + std::to_string(i) + " does not fit the others");
    if (k_ < 1 || k_ > C_ || dilation_ < 1) refuse("k or dilation makes no sense");
    if ((block_ != 1 && block_ != 8 && block_ != 16) || C_ % block_) refuse("channels do not come in whole blocks");
  }

  template <int L>
  Status* run(KernelContext* context) const {
    const ort::Value* x = api_.input(context, 0);
    i64 sizes[4];
    if (api_.sizes(x, sizes, 4) != 4 || sizes[1] != C_) refuse("x must be [B, " + std::to_string(C_) + ", H, W]");
    const float* from = api_.data<float>(x);
    float* to = api_.data<float>(api_.output(context, 0, sizes, 4));
    const i64 B = sizes[0], image = C_ * sizes[2] * sizes[3];
    Block<float, L> p{B, C_, sizes[2], sizes[3], r_, k_, m_, dilation_, bottleneck_, by_index_, fusion_, to};
    p.down = weights_[0].data, p.up = weights_[1].data;
    for (size_t i = 2; i < weights_.size(); ++i) (i % 2 ? p.b : p.w)[i / 2 - 1] = weights_[i].data;
    const size_t outputs = api_.outputs(context);
    const i64 logits[] = {B, C_}, channels[] = {B, k_};
    if (outputs > 1) p.logits = api_.data<float>(api_.output(context, 1, logits, 2));
    if (outputs > 2) p.channels = api_.data<i64>(api_.output(context, 2, channels, 2));
    const bool copy = from != to;
    if (!image || !B) return nullptr;
    if (p.small() || B >= shares()) {
      auto one = [&](size_t b) {
        if (copy) std::copy(from + b * image, from + (b + 1) * image, to + b * image);
        pliant::run_alone(p, b, pliant::scratch(p, 1, 1)[0]);
      };
      if (p.small())
        for (i64 b = 0; b < B; ++b) one(b);
      else
        api_.parallel(context, B, one);
      return nullptr;
    }
    const i64 n = shares();
    const pliant::Team team = pliant::scratch(p, 1, n)[0];
    for (i64 b = 0; b < B; ++b) {
      if (copy) std::copy(from + b * image, from + (b + 1) * image, to + b * image);
      for (pliant::Step step : pliant::STEPS) {
        if (!p.has(step)) continue;
        auto part = [&](size_t t) { pliant::run_step(step, p, b, team, t, n); };
        api_.parallel(context, n, part);
      }
    }
    return nullptr;
  }

  Api api_;
  std::vector<Weight> weights_;
  i64 C_ = 0, r_ = 0, k_ = 0, m_ = 0, block_ = 0, dilation_ = 0;
  bool bottleneck_ = false, by_index_ = false;
  Fusion fusion_ = Fusion::first;
};

// What goes wrong, as ONNX Runtime wants it.
template <class F>
Status* guarded(const Api& api, F fn) {
  try {
    return fn();
  } catch (const ort::Failure& failure) {
    return failure.status;
  } catch (const std::exception& e) {
    return api.error(ort::FAIL, e.what());
  }
}

const Api* api_in_use = nullptr;  // of this process; set before any kernel is made

CustomOp described() {
  CustomOp op{};
  op.version = ort::VERSION;
  op.GetName = [](const CustomOp*) { return "MoDBlock"; };
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU
  op.GetInputType = [](const CustomOp*, size_t) { return ort::FLOAT; };
  op.GetInputTypeCount = [](const CustomOp*) -> size_t { return FIRST_WEIGHT + WEIGHTS; };
  op.GetOutputType = [](const CustomOp*, size_t i) { return i == 2 ? ort::INT64 : ort::FLOAT; };
  op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return 3; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetInputCharacteristic = [](const CustomOp*, size_t i) { return i > WEIGHTS - 2 ? ort::OPTIONAL : ort::REQUIRED; };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t i) { return i ? ort::OPTIONAL : ort::REQUIRED; };
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
  op.CreateKernelV2 = [](const CustomOp*, const void* const* table, const KernelInfo* info, void** kernel) {
    const Api api(table);
    return guarded(api, [&]() -> Status* {
      *kernel = new Kernel(api, info);
      return nullptr;
    });
  };
  op.KernelComputeV2 = [](void* kernel, KernelContext* context) {
    return guarded(*api_in_use, [&] { return static_cast<Kernel*>(kernel)->compute(context); });
  };
  op.InferOutputShapeFn = [](const CustomOp*, ort::ShapeInference* context) {
    return guarded(*api_in_use, [&]() -> Status* {
      api_in_use->keep_shape(context, 0);
      return nullptr;
    });
  };
  op.GetStartVersion = [](const CustomOp*) { return 1; };
  op.GetEndVersion = [](const CustomOp*) { return 1; };
  op.GetMayInplace = [](int** inputs, int** outputs) -> size_t {
    static int first = 0;
    *inputs = *outputs = &first;
    return 1;
  };
  op.ReleaseMayInplace = [](int*, int*) {};
  op.GetAliasMap = [](int**, int**) -> size_t { return 0; };
  op.ReleaseAliasMap = [](int*, int*) {};
  return op;
}

// Why this processor is not the one that the library was built for; null if it is. ONNX Runtime
// chooses its blocks by AVX512F, and a file in other blocks would be read wrongly.
const char* another_processor() {
#if defined(__x86_64__)
#ifdef __AVX512F__
  if (!__builtin_cpu_supports("avx512f")) return "it was built for a processor with AVX512";
#else
  if (__builtin_cpu_supports("avx512f")) return "it was built for a processor without AVX512";
#endif
#ifdef __AVX2__
  if (!__builtin_cpu_supports("avx2")) return "it was built for a processor with AVX2";
#endif
#endif
  return nullptr;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) Status* RegisterCustomOps(
    ort::SessionOptions* options, const ort::Base* base) {
  const void* const* table = base->GetApi(ort::VERSION);
  const Api first(table ? table : base->GetApi(1));
  const char* reason = table ? another_processor() : "it needs ONNX Runtime 1.18 or newer";
  if (reason)
    return first.error(ort::FAIL, (std::string("pliant's operator cannot run here: ") + reason).c_str());
  return guarded(first, [&]() -> Status* {
    static const Api api(table);
    static const CustomOp op = described();
    // Not released: sessions refer to it until they end, at the latest with the process.
    static ort::Domain* const domain = [] {
      ort::Domain* made = api.domain("pliant");
      api.add(made, &op);
      return made;
    }();
    api_in_use = &api;
    api.add(options, domain);
    return nullptr;
  });
}

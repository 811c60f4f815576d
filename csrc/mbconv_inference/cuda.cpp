// effkernels::mbconv_inference on CUDA: three launches of the phases' kernels. Where a tile of a wide block does not
// fit shared memory, or costs more than it saves, the expansion is a launch of its own.
#include "dwconv/cuda_tensor.h"
#include "dwconv/tiles.h"
#include "expand_dwconv/cuda_tensor.h"
#include "expand_dwconv/tiles.h"
#include "mbconv_inference/parameters.h"
#include "pointwise_inference/cuda_tensor.h"
#include "pointwise_inference/tiles.h"
#include "squeeze_excite/cuda_tensor.h"

namespace effk {
namespace {

Tensor mbconv_inference(Tensor x, EFFK_BLOCK_PARAMETERS, int64_t stride, int64_t pad_top, int64_t pad_left,
                        int64_t out_h, int64_t out_w, bool residual) {
  const int64_t n = x.size(0), hidden = depthwise.size(0), out_c = project.size(0);
  require(expand || hidden == x.size(1), "without an expand convolution, hidden must be C");
  const ChannelVectors norm1({mean1, var1, gamma1, beta1}, eps1, act1, hidden, x);
  const ChannelVectors norm2({mean2, var2, gamma2, beta2}, eps2, act2, hidden, x);
  const ChannelVectors norm3({mean3, var3, gamma3, beta3}, eps3, kIdentity, out_c, x);
  const Transform nothing = make_transform(nullptr, nullptr, nullptr, nullptr, 0, 0, kIdentity);
  const DeviceGuard guard(x.get_device_index());
  const Stream stream = current_stream(x);
  const bool tf32 = multiplies_in_tf32(x);
  Tensor y = empty_map(x, {n, out_c, out_h, out_w});
  if (y.numel() == 0) return y;

  // Wide maps of which both ends are ours are in channels_last.
  Tensor d = empty_map(x, {n, hidden, out_h, out_w}, expand || is_channels_last(x));
  const Reduce reduce = w1 ? Reduce::kMean : Reduce::kNone;
  Tensor pooled = empty_sums(d, reduce), workspace;
  Means means{};
  const auto run = [&](auto plan) {
    workspace = empty_floats(x, {plan.workspace_floats});
    plan.reduce_into(static_cast<float*>(pooled.data_ptr()), static_cast<float*>(workspace.data_ptr()));
    means = plan.unmerged_means();
    execute(plan, stream);
  };
  Tensor depthwise_weight = depthwise;
  std::optional<expand_dwconv::Plan> fused;
  if (expand) {
    auto q = expand_dwconv::make_problem(x, *expand, norm1.transform, depthwise_weight, norm2.transform, stride,
                                         pad_top, pad_left, out_h, out_w, tf32);
    q.d.data = d.data_ptr();
    q.reduce = reduce;
    const auto tile = choose_tile(q, [&](const expand_dwconv::Tile& t) { return worthwhile(q, t); });
    if (tile) fused = make_plan(q, *tile);
  }
  if (fused) {
    run(*fused);
  } else {
    Tensor e = x;
    if (expand) {
      e = empty_map(x, {n, hidden, x.size(2), x.size(3)}, true);
      std::optional<Tensor> no_gate;
      auto q = pointwise_inference::make_problem(x, *expand, norm1.transform, no_gate, std::nullopt, tf32);
      q.y = map_of(e, "e");
      execute(make_plan(q, *choose_tile(q)), stream);
    }
    auto q = dwconv::make_problem(e, depthwise_weight, nothing, norm2.transform, stride, pad_top, pad_left);
    q.y = map_of(d, "d");
    q.reduce = reduce;
    q.channels_last = is_channels_last(d);
    run(make_plan(q, *choose_tile(q)));
  }

  std::optional<Tensor> gates;
  if (w1) {
    gates = empty_floats(x, {n, hidden});
    const squeeze_excite::GateLayers layers(*w1, b1, *w2, b2, squeeze_act, gate, hidden);
    execute(squeeze_excite::plan_gate(means, static_cast<float*>(gates->data_ptr()), layers.reduce, layers.expand, n,
                                      layers.dtype),
            stream);
  }
  Tensor project_weight = project;
  auto q = pointwise_inference::make_problem(d, project_weight, norm3.transform, gates,
                                             residual ? std::optional<Tensor>(x) : std::nullopt, tf32);
  q.y = map_of(y, "y");
  execute(make_plan(q, *choose_tile(q)), stream);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CUDA, m) { m.impl("mbconv_inference.cuda", TORCH_BOX(&mbconv_inference)); }

}  // namespace
}  // namespace effk

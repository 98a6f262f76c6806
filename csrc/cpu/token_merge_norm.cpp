// token_merge_norm on the CPU: token_merge with a LayerNorm in front of it.
#include <cmath>
#include <optional>
#include <vector>

#include "merge_tensors.h"
#include "row_kernels.h"

namespace bigain {
namespace {

// The affine parts of a LayerNorm as one, value * factor + offset, in rows of C values of type A: a row for each batch
// element, or, with stride 0, one for all. No values where there is no affine part.
template <typename A>
struct NormAffine {
  std::vector<A> factor, offset;
  int64_t batch_stride = 0;

  // (value * norm_weight + norm_bias) * (1 + scale) + shift. Tensors are contiguous and of type A, pairs both or
  // neither.
  NormAffine(const Merge& merge, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
             const std::optional<Tensor>& scale, const std::optional<Tensor>& shift) {
    const auto values_of = [](const std::optional<Tensor>& tensor) {
      return tensor.has_value() ? static_cast<const A*>(tensor->const_data_ptr()) : nullptr;
    };
    const A *weights = values_of(norm_weight), *biases = values_of(norm_bias);
    const A *scales = values_of(scale), *shifts = values_of(shift);
    if (weights == nullptr && scales == nullptr) return;
    const int64_t count = scales == nullptr ? merge.channels : merge.batch * merge.channels;
    batch_stride = scales == nullptr ? 0 : merge.channels;
    factor.resize(count);
    offset.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = i % merge.channels;
      const A weight = weights == nullptr ? A(1) : weights[c], bias = weights == nullptr ? A(0) : biases[c];
      factor[i] = scales == nullptr ? weight : weight * (1 + scales[i]);
      offset[i] = scales == nullptr ? bias : bias * (1 + scales[i]) + shifts[i];
    }
  }
};

// merge_mean of normalized tokens. Each token is in one slot, so its statistics are computed where it is added: it is
// read once for them, and once more, from the cache, for the sum.
template <typename T>
void merge_normalized(const Merge& merge, accumulate_t<T> eps, const NormAffine<accumulate_t<T>>& affine, T* out) {
  using A = accumulate_t<T>;
  const Tokens<T> tokens(merge.x);
  const RowKernels<T>& kernels = row_kernels<T>();
  const MergeArguments arguments = merge.arguments(false);
  const int64_t slots = merge.slots, channels = merge.channels;
  for_each_task(merge.batch * slots, channels, [&](int64_t begin, int64_t end) {
    SlotMembers<T> slot;
    std::vector<A> means;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / slots;
      slot.find(tokens, arguments, b, task % slots, merge.tokens);
      means.resize(slot.rows.size());
      for (size_t i = 0; i < means.size(); ++i) {
        A inverse;
        kernels.moments(slot.rows[i], channels, eps, &means[i], &inverse);
        slot.weights[i] *= inverse;
      }
      const bool plain = affine.factor.empty();
      const int64_t row = b * affine.batch_stride;
      kernels.mean_normalized(slot.rows.data(), means.data(), slot.weights.data(), static_cast<int64_t>(means.size()),
                              slot.total, plain ? nullptr : affine.factor.data() + row,
                              plain ? nullptr : affine.offset.data() + row, channels, out + task * channels);
    }
  });
}

// token_merge with mode "mean" of LayerNorm(x). norm_weight and norm_bias (C), scale and shift (B, C).
Tensor token_merge_norm(const Tensor& input, const Tensor& slot, const Tensor& offsets, const Tensor& members,
                        const Tensor& anchor, const std::optional<Tensor>& weights, double norm_eps,
                        const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                        const std::optional<Tensor>& scale, const std::optional<Tensor>& shift) {
  const Merge merge(input, slot, offsets, members, anchor, weights);
  check_norm(input, merge, norm_weight, norm_bias, scale, shift);
  const std::optional<Tensor> wide_weight = accumulated(norm_weight, input), wide_bias = accumulated(norm_bias, input);
  const std::optional<Tensor> wide_scale = accumulated(scale, input), wide_shift = accumulated(shift, input);
  Tensor out = new_tensor({merge.batch, merge.slots, merge.channels}, merge.x.scalar_type());
  if (out.numel() == 0) return out;
  with_type_of(merge.x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    const NormAffine<A> affine(merge, wide_weight, wide_bias, wide_scale, wide_shift);
    merge_normalized<T>(merge, static_cast<A>(norm_eps), affine, static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cpp, m) {
  m.def(
      "token_merge_norm(Tensor x, Tensor slot, Tensor offsets, Tensor members, Tensor anchor, Tensor? weights,"
      " float norm_eps, Tensor? norm_weight, Tensor? norm_bias, Tensor? scale, Tensor? shift) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(bigain_cpp, CPU, m) { m.impl("token_merge_norm", TORCH_BOX(&bigain::token_merge_norm)); }

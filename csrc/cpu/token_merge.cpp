// token_merge, token_merge_norm and token_unmerge on the CPU.
#include "op_common.h"
#include "row_kernels.h"

namespace bigain {
namespace {

// A table of a plan, contiguous, with its values checked: 0 <= value < high.
Tensor plan_table(const char* name, const Tensor& table, int64_t high) {
  const Tensor result = torch::stable::contiguous(table);
  check_range(name, result, 0, high);
  return result;
}

void check_ascending(const Tensor& offsets) {
  const int32_t* values = offsets.const_data_ptr<int32_t>();
  const int64_t width = offsets.size(1), count = offsets.numel();
  for (int64_t i = 0; i + 1 < count; ++i) {
    if ((i + 1) % width != 0 && values[i] > values[i + 1]) {
      fail("offsets: got ", values[i], " before ", values[i + 1], ", expected ascending values");
    }
  }
}

struct MergeArguments {
  const int32_t *offsets, *members;
  int64_t rows, slots;
  const void* weights;  // (B, N) of the accumulation type, or null
  bool mlerp;
};

// x (B, N, C) -> out (B, M, C): the mean over the members of each slot, in ascending order of tokens.
template <typename T>
void merge_mean(const Tensor& x, const MergeArguments& arguments, T* out) {
  using A = accumulate_t<T>;
  const Tokens<T> tokens(x);
  const RowKernels<T>& kernels = row_kernels<T>();
  const RowKernels<A>& wide = row_kernels<A>();
  const int64_t count = x.size(1), channels = x.size(2), slots = arguments.slots;
  const A* const weights = static_cast<const A*>(arguments.weights);
  for_each_task(x.size(0) * slots, channels, [&](int64_t begin, int64_t end) {
    std::vector<A> sum(channels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / slots, p = b % arguments.rows;
      const int32_t* const bounds = arguments.offsets + p * (slots + 1) + task % slots;
      const int32_t* const members = arguments.members + p * count;
      T* const target = out + task * channels;
      if (bounds[1] - bounds[0] == 1 && weights == nullptr && !arguments.mlerp) {
        std::memcpy(target, tokens.row(b, members[bounds[0]]), channels * sizeof(T));
        continue;
      }
      std::fill(sum.begin(), sum.end(), A(0));
      A total = 0, largest = 0;
      for (int32_t i = bounds[0]; i < bounds[1]; ++i) {
        const T* const token = tokens.row(b, members[i]);
        const A weight = weights == nullptr ? A(1) : weights[b * count + members[i]];
        kernels.add(token, weight, channels, sum.data());
        total += weight;
        if (arguments.mlerp) largest = std::max(largest, kernels.norm(token, channels));
      }
      if (arguments.mlerp) {
        // The mean first: |sum| of large or tiny weights would over- or underflow. A mean without a length stays zero.
        for (A& value : sum) value /= total;
        const A length = wide.norm(sum.data(), channels);
        total = length != 0 ? length / largest : A(1);
      }
      kernels.divide_narrow(sum.data(), total, channels, target);
    }
  });
}

// The tensors of a merge, checked, as the kernels read them.
struct Merge : PlanSizes {
  Tensor x, anchor, members, offsets;
  std::optional<Tensor> weights;

  Merge(const Tensor& input, const Tensor& slot, const Tensor& offsets_in, const Tensor& members_in,
        const Tensor& anchor_in, const std::optional<Tensor>& weights_in)
      : PlanSizes(check_merge(input, slot, offsets_in, members_in, anchor_in, weights_in)),
        x(with_unit_stride(input)),
        anchor(plan_table("anchor", anchor_in, tokens)),
        members(plan_table("members", members_in, tokens)),
        offsets(plan_table("offsets", offsets_in, tokens + 1)),
        weights(accumulated(weights_in, x)) {
    check_ascending(offsets);
  }

  MergeArguments arguments(bool mlerp) const {
    return {offsets.const_data_ptr<int32_t>(),
            members.const_data_ptr<int32_t>(),
            rows,
            slots,
            weights.has_value() ? weights->const_data_ptr() : nullptr,
            mlerp};
  }
};

// x (B, N, C), plan tables of P rows with P dividing B -> (B, M, C)
Tensor token_merge(const Tensor& input, const Tensor& slot, const Tensor& offsets, const Tensor& members,
                   const Tensor& anchor, const std::string& mode, const std::optional<Tensor>& weights) {
  check_merge_mode(mode);
  const Merge merge(input, slot, offsets, members, anchor, weights);
  Tensor out = new_tensor({merge.batch, merge.slots, merge.channels}, merge.x.scalar_type());
  if (out.numel() == 0) return out;
  with_type_of(merge.x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* const target = static_cast<T*>(out.mutable_data_ptr());
    if (mode == "prune") {
      const Tokens<T> view(merge.x);
      const int32_t* const kept = merge.anchor.const_data_ptr<int32_t>();
      const int64_t slots = merge.slots, channels = merge.channels;
      for_each_task(merge.batch * slots, channels, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t b = task / slots;
          std::memcpy(target + task * channels, view.row(b, kept[b % merge.rows * slots + task % slots]),
                      channels * sizeof(T));
        }
      });
    } else {
      merge_mean<T>(merge.x, merge.arguments(mode == "mlerp"), target);
    }
  });
  return out;
}

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

// merge_mean of normalized tokens. Each token is in one slot, so its statistics are computed where it is added, while
// it is in the cache.
template <typename T>
void merge_normalized(const Merge& merge, accumulate_t<T> eps, const NormAffine<accumulate_t<T>>& affine, T* out) {
  using A = accumulate_t<T>;
  const Tokens<T> tokens(merge.x);
  const RowKernels<T>& kernels = row_kernels<T>();
  const MergeArguments arguments = merge.arguments(false);
  const int64_t slots = merge.slots, channels = merge.channels;
  const A* const weights = static_cast<const A*>(arguments.weights);
  for_each_task(merge.batch * slots, channels, [&](int64_t begin, int64_t end) {
    std::vector<A> sum(channels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / slots, p = b % merge.rows;
      const int32_t* const bounds = arguments.offsets + p * (slots + 1) + task % slots;
      const int32_t* const members = arguments.members + p * merge.tokens;
      std::fill(sum.begin(), sum.end(), A(0));
      A total = 0;
      for (int32_t i = bounds[0]; i < bounds[1]; ++i) {
        const A weight = weights == nullptr ? A(1) : weights[b * merge.tokens + members[i]];
        kernels.add_normalized(tokens.row(b, members[i]), eps, weight, channels, sum.data());
        total += weight;
      }
      const int64_t row = b * affine.batch_stride;
      if (affine.factor.empty()) {
        kernels.divide_narrow(sum.data(), total, channels, out + task * channels);
      } else {
        kernels.divide_affine(sum.data(), total, affine.factor.data() + row, affine.offset.data() + row, channels,
                              out + task * channels);
      }
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

// y (B, M, C) -> out (B, N, C): gate * y[slot] + residual. R is the type of the residual, that of y or the wide one.
template <typename T, typename R>
void unmerge(const Tensor& y, const int32_t* slot, int64_t rows, int64_t tokens, const accumulate_t<T>* gate,
             const std::optional<Tensor>& residual, T* out) {
  const Tokens<T> slots(y);
  const int64_t channels = y.size(2);
  const RowKernels<T>& kernels = row_kernels<T>();
  std::optional<Tokens<R>> added;
  if (residual.has_value()) added.emplace(*residual);
  for_each_task(y.size(0) * tokens, channels, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tokens, n = task % tokens;
      const T* const source = slots.row(b, slot[b % rows * tokens + n]);
      T* const target = out + task * channels;
      if (gate == nullptr && !added.has_value()) {
        std::memcpy(target, source, channels * sizeof(T));
        continue;
      }
      const accumulate_t<T>* const row_gate = gate == nullptr ? nullptr : gate + b * channels;
      const R* const row_residual = added.has_value() ? added->row(b, n) : nullptr;
      if constexpr (std::is_same_v<T, R>) {
        kernels.affine(source, row_gate, row_residual, channels, target);
      } else {
        kernels.affine_wide(source, row_gate, row_residual, channels, target);
      }
    }
  });
}

// y (B, M, C), plan tables, residual (B, N, C) or none, gate (B, C) or none -> (B, N, C)
Tensor token_unmerge(const Tensor& input, const Tensor& slot_in, const Tensor& offsets, const Tensor& members,
                     const Tensor& anchor, const std::optional<Tensor>& residual_in,
                     const std::optional<Tensor>& gate_in) {
  const PlanSizes sizes = check_unmerge(input, slot_in, offsets, members, anchor, residual_in, gate_in);
  const int64_t tokens = sizes.tokens, rows = sizes.rows;
  const Tensor slot = plan_table("slot", slot_in, sizes.slots), y = with_unit_stride(input);
  const std::optional<Tensor> gate = accumulated(gate_in, y);
  const bool same_type = !residual_in.has_value() || residual_in->scalar_type() == y.scalar_type();
  const std::optional<Tensor> residual =
      residual_in.has_value() && same_type ? with_unit_stride(*residual_in) : accumulated(residual_in, y);
  Tensor out = new_tensor({sizes.batch, tokens, sizes.channels}, y.scalar_type());
  if (out.numel() == 0) return out;
  with_type_of(y, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    const int32_t* const slot_of = slot.const_data_ptr<int32_t>();
    const A* const gates = gate.has_value() ? static_cast<const A*>(gate->const_data_ptr()) : nullptr;
    T* const target = static_cast<T*>(out.mutable_data_ptr());
    if (same_type) {
      unmerge<T, T>(y, slot_of, rows, tokens, gates, residual, target);
    } else {
      unmerge<T, A>(y, slot_of, rows, tokens, gates, residual, target);
    }
  });
  return out;
}

}  // namespace
}  // namespace bigain

STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cpp, m) {
  m.def(
      "token_merge(Tensor x, Tensor slot, Tensor offsets, Tensor members, Tensor anchor, str mode, Tensor? weights)"
      " -> Tensor");
  m.def(
      "token_merge_norm(Tensor x, Tensor slot, Tensor offsets, Tensor members, Tensor anchor, Tensor? weights,"
      " float norm_eps, Tensor? norm_weight, Tensor? norm_bias, Tensor? scale, Tensor? shift) -> Tensor");
  m.def(
      "token_unmerge(Tensor y, Tensor slot, Tensor offsets, Tensor members, Tensor anchor, Tensor? residual,"
      " Tensor? gate) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(bigain_cpp, CPU, m) {
  m.impl("token_merge", TORCH_BOX(&bigain::token_merge));
  m.impl("token_merge_norm", TORCH_BOX(&bigain::token_merge_norm));
  m.impl("token_unmerge", TORCH_BOX(&bigain::token_unmerge));
}

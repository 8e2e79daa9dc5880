#include "python/bindings_options.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "generator/errors.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {
namespace {

py::type* options_type = nullptr;  // leaked, because it must outlive the interpreter's own teardown

constexpr const char* kAcceptedPerHead =
    "None, or torch.float32, (num_heads) or (batch, num_heads), contiguous in the last dimension";
constexpr const char* kAcceptedCuSeqlens =
    "(batch + 1), torch.int32, contiguous: where each sequence begins, and where the last ends";

constexpr const char* kAcceptedBias =
    "None, or torch.bool, torch.float32 or q's dtype, of 1 to 4 dimensions that broadcast to (batch, num_heads, "
    "seqlen_q, seqlen_k)";
constexpr const char* kAcceptedSeed = "(2), torch.int32, contiguous, where dropout_p is not 0.0";
constexpr const char* kAcceptedSinks =
    "None, or (num_heads), torch.float32, torch.float16 or torch.bfloat16, contiguous";
constexpr const char* kAcceptedBlockTable =
    "None, or (batch, pages of a sequence), torch.int32, contiguous in the last dimension: page numbers";

struct AnyField {
  const char* name;
  const char* accepted;    // of a tensor, in words
  py::ssize_t place = -1;  // in the tuple, once connect_options() has looked
  AnyField* next;          // all that there are
  static inline AnyField* first = nullptr;

  explicit AnyField(const char* name, const char* accepted = nullptr) : name(name), accepted(accepted), next(first) {
    first = this;
  }
  AnyField(const AnyField&) = delete;
};

// One field of Options: a number, converted, or a tensor as it is.
template <typename T>
struct Field : AnyField {
  using AnyField::AnyField;

  T operator()(py::handle options) const {
    const py::handle object = PyTuple_GET_ITEM(options.ptr(), place);
    if constexpr (std::is_same_v<T, py::handle>) {
      return object;
    } else {
      py::detail::make_caster<T> value;
      if (value.load(object, true)) return py::detail::cast_op<T>(value);
      throw ArgumentError({name, "is " + kind_text(object), "its type in Options"});
    }
  }
};

// By the names that they have in Python.
struct Fields {
  Field<std::optional<double>> softmax_scale{"softmax_scale"};
  Field<bool> causal{"causal"};
  Field<std::int64_t> window_left{"window_left"}, window_right{"window_right"};
  Field<double> softcap{"softcap"};
  Field<py::handle> alibi_slopes{"alibi_slopes", kAcceptedPerHead};
  Field<py::handle> attn_bias{"attn_bias", kAcceptedBias};
  Field<double> dropout_p{"dropout_p"};
  Field<py::handle> dropout_seed{"dropout_seed", kAcceptedSeed};
  Field<py::handle> s_aux{"s_aux", kAcceptedSinks};
  Field<py::handle> cu_seqlens_q{"cu_seqlens_q", kAcceptedCuSeqlens}, cu_seqlens_k{"cu_seqlens_k", kAcceptedCuSeqlens};
  Field<std::int64_t> max_seqlen_q{"max_seqlen_q"}, max_seqlen_k{"max_seqlen_k"};
  Field<py::handle> seqused_k{"seqused_k", kAcceptedOfBatch}, leftpad_k{"leftpad_k", kAcceptedOfBatch};
  Field<py::handle> block_table{"block_table", kAcceptedBlockTable};
  Field<std::int64_t> seqused_more{"seqused_more"}, num_splits{"num_splits"};
  Field<bool> has_backward{"has_backward"};
} field;

// One length for the whole batch, or cu_seqlens.
std::optional<Varlen> read_varlen(py::handle options, const Argument& q) {
  if (layout_of(options) != Layout::kTotal) return std::nullopt;
  const Argument cu_seqlens_q("cu_seqlens_q", field.cu_seqlens_q(options));
  check_small_tensor(cu_seqlens_q, q, ElementType::kInt32,
                     cu_seqlens_q.info.rank == 1 && cu_seqlens_q.info.shape[0] >= 1, kAcceptedCuSeqlens);
  // Pages say where the keys lie, and seqused_k how many they are.
  if (is_paged(options) && !field.seqused_k(options).is_none())
    return Varlen{static_cast<const int*>(cu_seqlens_q.info.data), nullptr, cu_seqlens_q.info.shape[0] - 1,
                  field.max_seqlen_q(options), field.max_seqlen_k(options)};
  const Argument cu_seqlens_k("cu_seqlens_k", field.cu_seqlens_k(options));
  check_small_tensor(cu_seqlens_k, q, ElementType::kInt32,
                     cu_seqlens_k.info.rank == 1 && cu_seqlens_k.info.shape[0] >= 1, kAcceptedCuSeqlens);
  if (cu_seqlens_q.info.shape[0] != cu_seqlens_k.info.shape[0])
    throw ArgumentError({"cu_seqlens_k", "has shape " + shape_text(cu_seqlens_k.object),
                         "cu_seqlens_q's, " + shape_text(cu_seqlens_q.object)});
  return Varlen{static_cast<const int*>(cu_seqlens_q.info.data), static_cast<const int*>(cu_seqlens_k.info.data),
                cu_seqlens_q.info.shape[0] - 1, field.max_seqlen_q(options), field.max_seqlen_k(options)};
}

// None, or a number for every query head.
std::optional<PerHead> read_per_head(const Field<py::handle>& of, py::handle options, const Argument& q,
                                     const std::optional<Varlen>& varlen) {
  if (of(options).is_none()) return std::nullopt;
  const Argument numbers(of.name, of(options));
  const std::int64_t batch = varlen ? varlen->batch : q.info.shape[0], heads = q.info.shape[q.info.rank - 2];
  const auto& shape = numbers.info.shape;
  const bool of_heads = numbers.info.rank == 1 && shape[0] == heads;
  const bool of_batch = numbers.info.rank == 2 && shape[0] == batch && shape[1] == heads;
  check_small_tensor(numbers, q, ElementType::kFloat32, of_heads || of_batch, of.accepted);
  return PerHead{static_cast<const float*>(numbers.info.data), of_batch ? numbers.info.strides[0] : 0};
}

// None, or what is said of every pair of query and key. Its shape is checked where the launch is planned.
std::optional<PairTensor> read_bias(py::handle options, const Argument& q) {
  if (field.attn_bias(options).is_none()) return std::nullopt;
  const Argument argument(field.attn_bias.name, field.attn_bias(options));
  check_same_device(argument, q);
  const TensorInfo& info = argument.info;
  const bool is_like_q = info.dtype == q.info.dtype;
  PairTensor bias{info.data, pair_type_of(dtype_of(q)), {1, 1, 1, 1}, {}};
  if (info.dtype == ElementType::kFloat32) bias.type = PairType::kFloat32;
  if (info.dtype == ElementType::kBool) bias.type = PairType::kBool;
  const bool is_known = is_like_q || info.dtype == ElementType::kFloat32 || info.dtype == ElementType::kBool;
  if (!is_known || info.rank < 1 || info.rank > 4)
    throw ArgumentError({argument.name,
                         "has shape " + shape_text(argument.object) + " and dtype " + dtype_text(argument.object),
                         field.attn_bias.accepted});
  std::copy_n(info.shape.begin(), info.rank, bias.shape.end() - info.rank);
  std::copy_n(info.strides.begin(), info.rank, bias.strides.end() - info.rank);
  return bias;
}

std::optional<Dropout> read_dropout(py::handle options, const Argument& q) {
  const double p = field.dropout_p(options);
  if (p == 0) return std::nullopt;
  const Argument seed(field.dropout_seed.name, field.dropout_seed(options));
  check_small_tensor(seed, q, ElementType::kInt32, seed.info.rank == 1 && seed.info.shape[0] == 2,
                     field.dropout_seed.accepted);
  return Dropout{p, static_cast<const int*>(seed.info.data)};
}

// None, or a logit for every query head.
const float* read_sinks(py::handle options, const Argument& q) {
  if (field.s_aux(options).is_none()) return nullptr;
  const Argument sinks(field.s_aux.name, field.s_aux(options));
  check_small_tensor(sinks, q, ElementType::kFloat32,
                     sinks.info.rank == 1 && sinks.info.shape[0] == q.info.shape[q.info.rank - 2],
                     field.s_aux.accepted);
  return static_cast<const float*>(sinks.info.data);
}

// None, or a number of rows for each sequence.
const int* read_of_batch(const Field<py::handle>& of, py::handle options, const Argument& q, std::int64_t batch) {
  if (of(options).is_none()) return nullptr;
  const Argument numbers(of.name, of(options));
  check_small_tensor(numbers, q, ElementType::kInt32, numbers.info.rank == 1 && numbers.info.shape[0] == batch,
                     of.accepted);
  return static_cast<const int*>(numbers.info.data);
}

}  // namespace

void check_small_tensor(const Argument& argument, const Argument& q, ElementType dtype, bool shape_fits,
                        const std::string& accepted) {
  check_same_device(argument, q);
  const TensorInfo& info = argument.info;
  const int last = info.rank - 1;  // shape_fits: there is one
  if (info.dtype == dtype && shape_fits && (info.strides[last] == 1 || info.shape[last] <= 1)) return;
  throw ArgumentError({argument.name,
                       "has shape " + shape_text(argument.object) + ", strides " + strides_text(argument.object) +
                           " and dtype " + dtype_text(argument.object),
                       accepted});
}

std::optional<PageTable> read_page_table(py::handle block_table, const Argument& q, std::int64_t batch) {
  if (block_table.is_none()) return std::nullopt;
  const Argument table("block_table", block_table);
  check_small_tensor(table, q, ElementType::kInt32, table.info.rank == 2 && table.info.shape[0] == batch,
                     kAcceptedBlockTable);
  return PageTable{static_cast<const int*>(table.info.data), table.info.strides[0], table.info.shape[1]};
}

void connect_options(py::type type) {
  auto names = type.attr("_fields").cast<std::vector<std::string>>();
  std::vector<std::pair<AnyField*, py::ssize_t>> places;
  for (AnyField* each = AnyField::first; each; each = each->next) {
    const auto found = std::find(names.begin(), names.end(), each->name);
    if (found == names.end()) throw Error(std::string("Options has no field ") + each->name);
    places.emplace_back(each, found - names.begin());
    found->clear();
  }
  for (const std::string& name : names)
    if (!name.empty()) throw Error("the compiled module does not read the field " + name + " of Options");
  for (const auto& [each, place] : places) each->place = place;
  options_type = new py::type(type);
}

py::dict accepted_tensors() {
  py::dict accepted;
  for (const AnyField* each = AnyField::first; each; each = each->next)
    if (each->accepted) accepted[each->name] = each->accepted;
  return accepted;
}

Layout layout_of(py::handle options) {
  if (!options_type) throw Error("connect_options() was not called");
  if (!PyObject_TypeCheck(options.ptr(), reinterpret_cast<PyTypeObject*>(options_type->ptr())))
    throw ArgumentError({"options", "is " + kind_text(options), "an Options"});
  const bool is_varlen = !field.cu_seqlens_q(options).is_none() || !field.cu_seqlens_k(options).is_none();
  return is_varlen ? Layout::kTotal : Layout::kBatch;
}

bool is_paged(py::handle options) { return !field.block_table(options).is_none(); }

std::int64_t num_splits(py::handle options) { return field.num_splits(options); }

AttentionOptions read_options(py::handle options, const Argument& q) {
  AttentionOptions read;
  read.dtype = dtype_of(q);
  read.softmax_scale = field.softmax_scale(options).value_or(default_softmax_scale(q.info.shape[q.info.rank - 1]));
  set_mask(read, field.causal(options), {field.window_left(options), field.window_right(options)});
  read.softcap = field.softcap(options);
  read.has_backward = field.has_backward(options);
  read.varlen = read_varlen(options, q);
  read.alibi = read_per_head(field.alibi_slopes, options, q, read.varlen);
  read.bias = read_bias(options, q);
  read.dropout = read_dropout(options, q);
  read.sinks = read_sinks(options, q);
  const std::int64_t batch = read.varlen ? read.varlen->batch : q.info.shape[0];
  const int* const used = read_of_batch(field.seqused_k, options, q, batch);
  const int* const leftpad = read_of_batch(field.leftpad_k, options, q, batch);
  if (used != nullptr || leftpad != nullptr) read.key_lengths = KeyLengths{used, leftpad, field.seqused_more(options)};
  read.pages = read_page_table(field.block_table(options), q, batch);
  return read;
}

}  // namespace flash_attn_jit::bindings

#include "runtime/launch/case_memory.h"

#include <algorithm>
#include <cmath>

#include "generator/families/families.h"
#include "runtime/system/errors.h"

namespace flash_attn_jit {
namespace {

// Tensors of kernels that access elements one by one begin 2 bytes behind a multiple of 16, so that they are the ones
// that are chosen at every head dim.
constexpr std::int64_t kPadElements = 8;

constexpr std::int64_t kMostCopies = 1024;
constexpr double kMemoryShare = 0.6;  // of what is free, for all copies but the first

std::int64_t half_bytes(std::int64_t elements) { return 2 * (elements + kPadElements); }

template <class Value>
Driver::Memory on_device(Driver& driver, const std::vector<Value>& values) {
  Driver::Memory memory(driver, sizeof(Value) * values.size());
  if (!values.empty()) driver.copy_to_device(memory.data(), values.data(), memory.bytes());
  return memory;
}

// `count` numbers, each one `step` more than the one before it.
std::vector<int> steps(std::int64_t count, std::int64_t step) {
  std::vector<int> numbers;
  for (std::int64_t i = 0; i < count; ++i) numbers.push_back(static_cast<int>(i * step));
  return numbers;
}

// Pages of all sequences, in order; none where keys do not lie in pages.
std::int64_t pages_of(const AttentionCase& attention) {
  return attention.spec.has(Feature::kPaged) ? attention.rows_k() / attention.page_size() : 0;
}

}  // namespace

std::int64_t CaseMemory::bytes_of(const AttentionCase& attention) {
  const std::int64_t q = half_bytes(attention.statistics() * attention.spec.head_dim),
                     k = half_bytes(attention.rows_k() * attention.num_heads_k * attention.spec.head_dim),
                     row = 4 * attention.statistics();
  return attention.is_backward() ? 4 * q + 4 * k + 2 * row : 2 * q + 2 * k + row;
}

CaseMemory::CaseMemory(Driver& driver, const AttentionCase& attention, const CaseNumbers& numbers,
                       std::int64_t l2_bytes)
    : driver_(driver),
      attention_(attention),
      q_elements_(attention.statistics() * attention.spec.head_dim),
      k_elements_(attention.rows_k() * attention.num_heads_k * attention.spec.head_dim),
      head_numbers_(on_device(driver, attention.head_numbers())),
      pairs_(on_device(driver, attention.pair_bytes())),
      cu_seqlens_q_(on_device(driver, steps(attention.batch + 1, attention.seqlen_q))),
      cu_seqlens_k_(on_device(driver, steps(attention.batch + 1, attention.seqlen_k))),
      key_lengths_(on_device(
          driver, std::vector(static_cast<std::size_t>(attention.batch), static_cast<int>(attention.seqlen_k)))),
      page_table_(on_device(driver, steps(pages_of(attention), 1))) {
  const std::int64_t bytes = bytes_of(attention);
  const DeviceMemoryInfo memory = driver.memory_info();
  if (static_cast<double>(bytes) > static_cast<double>(memory.free))
    throw DriverError(
        "the device has " + std::to_string(memory.free >> 20) + " MiB free of " + std::to_string(memory.total >> 20) +
        ", and the tensors of " + attention.spec.text().substr(0, attention.spec.text().rfind(' ')) + " take " +
        std::to_string((bytes >> 20) + 1) + " MiB; end what else uses the device, or tune with a smaller batch");
  const auto room = static_cast<std::int64_t>(kMemoryShare * static_cast<double>(memory.free));
  const std::int64_t wanted = l2_bytes > 0 ? 2 * l2_bytes / bytes + 1 : 1;
  const std::int64_t count = std::clamp<std::int64_t>(std::min(wanted, room / bytes), 1, kMostCopies);
  for (std::int64_t i = 0; i < count; ++i) {
    copies_.push_back(make_copy());
    const Copy& copy = copies_.back();
    fill(copy.q, CaseTensor::kQ, q_elements_, numbers);
    fill(copy.k, CaseTensor::kK, k_elements_, numbers);
    fill(copy.v, CaseTensor::kV, k_elements_, numbers);
    if (attention.is_backward()) fill(copy.dout, CaseTensor::kDout, q_elements_, numbers);
  }
}

CaseMemory::Copy CaseMemory::make_copy() const {
  const auto halves = [&](std::int64_t elements) {
    return Driver::Memory(driver_, static_cast<std::size_t>(half_bytes(elements)));
  };
  const auto rows = [&](bool wanted) {
    return Driver::Memory(driver_, static_cast<std::size_t>(wanted ? 4 * attention_.statistics() : 0));
  };
  const bool backward = attention_.is_backward();
  const std::int64_t gradients_q = backward ? q_elements_ : 0, gradients_k = backward ? k_elements_ : 0;
  return {halves(q_elements_), halves(k_elements_), halves(k_elements_), halves(q_elements_), rows(true),
          halves(gradients_q), rows(backward),      halves(gradients_q), halves(gradients_k), halves(gradients_k)};
}

void CaseMemory::fill(const Driver::Memory& memory, CaseTensor tensor, std::int64_t elements,
                      const CaseNumbers& numbers) {
  auto* const begin = static_cast<std::uint16_t*>(first(memory));
  for (std::int64_t at = 0; at < elements;) {
    std::int64_t count = elements - at;
    const std::uint16_t* const run = numbers.run(tensor, at, count);
    driver_.copy_to_device(begin + at, run, static_cast<std::size_t>(2 * count));
    at += count;
  }
}

void* CaseMemory::first(const Driver::Memory& memory) const {
  const bool by_element = attention_.spec.access == GlobalAccess::kElement2B;
  return static_cast<std::uint16_t*>(memory.data()) + (by_element ? 1 : 0);
}

TensorView CaseMemory::view(const Driver::Memory& memory, bool is_query) const {
  const bool varlen = attention_.spec.has(Feature::kVarlen), paged = !is_query && attention_.spec.has(Feature::kPaged);
  const std::int64_t seqlen = is_query ? attention_.seqlen_q : attention_.seqlen_k,
                     heads = is_query ? attention_.num_heads : attention_.num_heads_k, dims = attention_.spec.head_dim,
                     all_rows = attention_.batch * seqlen,
                     rows = paged    ? attention_.page_size()
                            : varlen ? all_rows
                                     : seqlen;
  return {first(memory),
          {all_rows / rows, rows, heads, dims},
          {rows * heads * dims, heads * dims, dims, 1},
          varlen && !paged ? 3 : 4};
}

AttentionOptions CaseMemory::options() const {
  AttentionOptions options = attention_.options(static_cast<const float*>(head_numbers_.data()), pairs_.data());
  if (attention_.spec.has(Feature::kVarlen))
    options.varlen =
        Varlen{static_cast<const int*>(cu_seqlens_q_.data()), static_cast<const int*>(cu_seqlens_k_.data()),
               attention_.batch, attention_.seqlen_q, attention_.seqlen_k};
  if (attention_.spec.has(Feature::kKeyLengths))
    options.key_lengths = KeyLengths{static_cast<const int*>(key_lengths_.data()), nullptr, 0};
  const std::int64_t columns = pages_of(attention_) / attention_.batch;
  if (columns > 0) options.pages = PageTable{static_cast<const int*>(page_table_.data()), columns, columns};
  return options;
}

ForwardRequest CaseMemory::forward(int copy) const {
  const Copy& on = copies_[static_cast<std::size_t>(copy)];
  ForwardRequest request;
  request.q = view(on.q, true);
  request.k = view(on.k, false);
  request.v = view(on.v, false);
  request.out = view(on.out, true);
  request.softmax_lse = static_cast<float*>(on.lse.data());
  request.options = options();
  return request;
}

BackwardRequest CaseMemory::backward(int copy) const {
  const Copy& on = copies_[static_cast<std::size_t>(copy)];
  BackwardRequest request;
  request.q = view(on.q, true);
  request.k = view(on.k, false);
  request.v = view(on.v, false);
  request.out = view(on.out, true);
  request.dout = view(on.dout, true);
  request.dq = view(on.dq, true);
  request.dkdv = KeyGradients{view(on.dk, false), view(on.dv, false)};
  request.softmax_lse = static_cast<const float*>(on.lse.data());
  request.delta = static_cast<float*>(on.delta.data());
  request.options = options();
  return request;
}

void CaseMemory::spoil_outputs() {
  constexpr unsigned char kNoNumber = 0xff;  // fp16 and float32 are NaN
  const Copy& copy = copies_[0];
  std::vector<const Driver::Memory*> outputs;
  const KernelResults& results = family_of(attention_.spec.kind).results;
  if (results.out) outputs.insert(outputs.end(), {&copy.out, &copy.lse});
  if (results.delta) outputs.push_back(&copy.delta);
  if (results.dq) outputs.push_back(&copy.dq);
  if (results.dkdv) outputs.insert(outputs.end(), {&copy.dk, &copy.dv});
  for (const Driver::Memory* memory : outputs) driver_.fill(memory->data(), kNoNumber, memory->bytes());
}

std::vector<std::uint16_t> CaseMemory::halves(const Driver::Memory& memory, std::int64_t elements) const {
  std::vector<std::uint16_t> values(static_cast<std::size_t>(elements));
  driver_.copy_to_host(values.data(), first(memory), 2 * values.size());
  return values;
}

std::vector<float> CaseMemory::floats(const Driver::Memory& memory) const {
  std::vector<float> values(static_cast<std::size_t>(attention_.statistics()));
  driver_.copy_to_host(values.data(), memory.data(), 4 * values.size());
  return values;
}

void CaseMemory::set_out(const std::vector<std::uint16_t>& out) {
  for (const Copy& copy : copies_) driver_.copy_to_device(first(copy.out), out.data(), 2 * out.size());
}

void CaseMemory::set_lse(const std::vector<float>& lse) {
  for (const Copy& copy : copies_) driver_.copy_to_device(copy.lse.data(), lse.data(), 4 * lse.size());
}

void CaseMemory::set_delta(const std::vector<float>& delta) {
  for (const Copy& copy : copies_) driver_.copy_to_device(copy.delta.data(), delta.data(), 4 * delta.size());
}

}  // namespace flash_attn_jit

// What a tensor (batch, heads, seqlen_q, seqlen_k) says of each pair of a query and a key: a number that is added to
// its score, or whether the query sees the key. Where it is broadcast its strides are 0.
//
// Kernels read it ahead of the scores: of a query as many keys as a lane has, at once where they are neighbours
// (lane_order.cuh) and the tensor's layout lets them.
#pragma once

#include "attention_params.cuh"
#include "lane_order.cuh"
#include "primitives.cuh"
#include "score_feature.cuh"
#include "stored.cuh"

// ---- what the tensor is made of: an element of what was loaded, and what a score becomes ----

struct HalfBias {
  static constexpr int kBytes = 2;
  static constexpr bool kIsLarge = false, kHidesOnly = false;

  static __device__ __forceinline__ unsigned load(const char* at) { return load_global_2B(at); }
  static __device__ __forceinline__ float apply(float score, unsigned bits, float unit) {
    return fma_rounded(Fp16::low(bits), unit, score);
  }
};

struct FloatBias {
  static constexpr int kBytes = 4;
  static constexpr bool kIsLarge = true, kHidesOnly = false;

  static __device__ __forceinline__ unsigned load(const char* at) {
    return static_cast<unsigned>(load_global_i32(reinterpret_cast<const int*>(at)));
  }
  static __device__ __forceinline__ float apply(float score, unsigned bits, float unit) {
    return fma_rounded(bounded_bias(float_of_bits(bits)), unit, score);
  }
};

// The upper halves of floats, which reach as far as these.
struct BrainBias {
  static constexpr int kBytes = 2;
  static constexpr bool kIsLarge = true, kHidesOnly = false;

  static __device__ __forceinline__ unsigned load(const char* at) { return load_global_2B(at); }
  static __device__ __forceinline__ float apply(float score, unsigned bits, float unit) {
    return FloatBias::apply(score, bits << 16, unit);
  }
};

// 16 bits an element, of the type that the tensors have.
template <class Stored>
struct StoredBiasOf {
  using Type = HalfBias;
};
template <>
struct StoredBiasOf<Bf16> {
  using Type = BrainBias;
};
template <class Stored>
using StoredBias = typename StoredBiasOf<Stored>::Type;

struct BoolMask {
  static constexpr int kBytes = 1;
  static constexpr bool kIsLarge = false, kHidesOnly = true;

  static __device__ __forceinline__ unsigned load(const char* at) { return load_global_1B(at); }
  static __device__ __forceinline__ float apply(float score, unsigned sees, float /*unit*/) {
    return (sees & 0xffu) != 0 ? score : -infinity();
  }
};

// Elements of a load, at most as many as the host aligns rows to, and of at most 16 bytes.
constexpr int unit_of(int count, int bytes) {
  int unit = 8;
  while (count % unit != 0 || unit * bytes > 16) unit /= 2;
  return unit;
}

template <class Format, bool kHasKeyStride, bool kIsForAllQueries>
class PairBias : public ScoreFeature {
 public:
  static constexpr bool kMayHideRows = true, kReadsPairs = true;
  static constexpr bool kIsOneRow = kIsForAllQueries, kIsLarge = Format::kIsLarge;
  static constexpr bool kHidesTiles = Format::kHidesOnly && !kIsOneRow, kHidesKeys = Format::kHidesOnly && kIsOneRow;

  // Several elements in a word where they are read at once.
  template <int kCount, bool kAtOnce>
  struct Fetched {
    static constexpr int kUnit = unit_of(kCount, Format::kBytes), kMost = 4 / Format::kBytes;
    static constexpr int kElementsOfWord = !kAtOnce ? 1 : kUnit < kMost ? kUnit : kMost;
    unsigned word[kCount / kElementsOfWord];

    // With what comes behind it in its word.
    __device__ __forceinline__ unsigned element(int i) const {
      return word[i / kElementsOfWord] >> i % kElementsOfWord * 8 * Format::kBytes;
    }
  };

  template <class Params, class Sequence>
  __device__ __forceinline__ void prepare(const Params& params, const Sequence& sequence, int head, float unit) {
    const PairTensorParams& pairs = params.pairs;
    pairs_ = &pairs;
    first_ = static_cast<const char*>(pairs.data) + sequence.batch() * pairs.batch_stride + head * pairs.head_stride +
             static_cast<long long>(sequence.first_key_row()) * key_stride();
    unit_ = kLog2E * unit;
  }

  template <class Keys, int kCount, bool kQueryExists, bool kKeysExist, class Sequence>
  __device__ __forceinline__ void fetch(Fetched<kCount, Keys::kAtOnce>& fetched, const Sequence& sequence, int query,
                                        int key) const {
    using Result = Fetched<kCount, Keys::kAtOnce>;
    if (!kQueryExists && !kIsOneRow) query = Sequence::minimum(query, sequence.seqlen_q() - 1);
    const char* const row = kIsOneRow ? first_ : first_ + static_cast<long long>(query) * pairs_->query_stride;
    if constexpr (Keys::kAtOnce) {
#pragma unroll
      for (int i = 0; i < kCount; i += Result::kUnit) {
        int at = key + i;
        if (!kKeysExist) at = Sequence::minimum(at, (sequence.seqlen_k() - 1) / Result::kUnit * Result::kUnit);
        load_unit<Result::kUnit * Format::kBytes>(fetched.word + i / Result::kElementsOfWord,
                                                  row + static_cast<long long>(at) * Format::kBytes);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        int at = key + Keys::at(i);
        if (!kKeysExist) at = Sequence::minimum(at, sequence.seqlen_k() - 1);
        fetched.word[i] = Format::load(row + static_cast<long long>(at) * key_stride());
      }
    }
  }

  // Whether a query sees the key, where all do or none. Beyond the last key none does.
  template <class Sequence>
  __device__ __forceinline__ bool shows_key(const Sequence& sequence, int key) const {
    return key < sequence.seqlen_k() && Format::load(first_ + static_cast<long long>(key) * key_stride()) != 0;
  }

  // Whether some of the bytes that were fetched is not False.
  template <class AnyFetched>
  static __device__ __forceinline__ bool shows(const AnyFetched& fetched) {
    unsigned any = 0;
    for (const unsigned word : fetched.word) any |= word;
    return any != 0;
  }

  template <class AnyFetched, class Sequence>
  __device__ __forceinline__ float bias(float score, const AnyFetched& fetched, int element, const Sequence&,
                                        int /*query*/, int /*key*/) const {
    return Format::apply(score, fetched.element(element), unit_);
  }

 private:
  template <int kBytes>
  static __device__ __forceinline__ void load_unit(unsigned* words, const char* at) {
    if constexpr (kBytes == 16) {
      Vec16 v;
      load_global_16B(v, at);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = v.word[i];
    } else if constexpr (kBytes == 8) {
      load_global_8B(words[0], words[1], at);
    } else if constexpr (kBytes == 4) {
      words[0] = static_cast<unsigned>(load_global_i32(reinterpret_cast<const int*>(at)));
    } else {
      static_assert(kBytes == 2, "a lane has two keys at least");
      words[0] = load_global_2B(at);
    }
  }

  __device__ __forceinline__ int key_stride() const { return kHasKeyStride ? pairs_->key_stride : Format::kBytes; }

  const PairTensorParams* pairs_;
  const char* first_;  // of the block's query head
  float unit_;         // of what is added to a score, a bias of 1
};

// The features that a kernel has compiled in only where they are on; their values are arguments of the launch. Whatever
// deals with features (a spec's text, the rendered traits, the program's flags, the command in an error, the hash of a
// loaded kernel) walks this table, so that a new one is a row here.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <initializer_list>
#include <string_view>
#include <vector>

namespace flash_attn_jit {

enum class Feature : std::uint8_t {
  kSoftcap,
  kAlibi,
  kBias16,
  kBias32,
  kBoolMask,
  kUnpaired,
  kOneRow,
  kDropout,
  kVarlen,
  kKeyLengths,
  kPaged,
  kSink,
  kUserScore,
  kUserBias,
  kBlockMask,
};

struct FeatureInfo {
  Feature feature;
  std::string_view word;    // in a spec's text; "--" and it are the program's flag
  std::string_view trait;   // of the rendered Traits
  std::string_view phrase;  // for the program's help: "kernels ..."
  bool changes_scores;      // computes on each score
  bool needs_positions;     // computes from the places of a query and a key, as a window does
  bool forward_only;        // no backward kernel has it
  // Read where a row's keys are all done, by what makes out alone: to other kernels it says nothing, nor to main loops.
  bool finishes_rows = false;
  // Of functions that a caller gives: see KernelSpec::functions. No flag of the program asks for it.
  bool is_users = false;
};

// In the order of the words in a spec's text.
inline constexpr std::array kFeatures = {
    FeatureInfo{Feature::kSoftcap, "softcap", "kIsSoftcap", "with softcap", true, false, false},
    FeatureInfo{Feature::kAlibi, "alibi", "kHasAlibi", "with ALiBi slopes", true, true, false},
    FeatureInfo{Feature::kBias16, "bias16", "kHasBias16", "with an attn_bias of q's dtype", true, true, false},
    FeatureInfo{Feature::kBias32, "bias32", "kHasBias32", "with a float32 attn_bias", true, true, false},
    FeatureInfo{Feature::kBoolMask, "boolmask", "kHasBoolMask", "with a bool attn_bias", true, true, false},
    FeatureInfo{Feature::kUnpaired, "unpaired", "kIsUnpaired", "whose attn_bias is read one element at a time", false,
                false, false},
    FeatureInfo{Feature::kOneRow, "onerow", "kIsOneRow", "whose attn_bias is the same for all queries", false, false,
                false},
    FeatureInfo{Feature::kDropout, "dropout", "kHasDropout", "with dropout", false, true, false},
    FeatureInfo{Feature::kVarlen, "varlen", "kIsVarlen", "for cu_seqlens", false, false, false},
    FeatureInfo{Feature::kKeyLengths, "keylens", "kHasKeyLengths", "for seqused_k and leftpad_k", false, false, true},
    FeatureInfo{Feature::kPaged, "paged", "kIsPaged", "for a block_table", false, false, true},
    FeatureInfo{Feature::kSink, "sink", "kHasSink", "with a sink of each head", false, false, false, true},
    FeatureInfo{Feature::kUserScore, "userscore", "kHasUserScore", "with a score_mod", true, true, false, false, true},
    FeatureInfo{Feature::kUserBias, "userbias", "kHasUserBias", "with a score_mod that only adds", true, true, false,
                false, true},
    FeatureInfo{Feature::kBlockMask, "blockmask", "kHasBlockMask", "with a block_mask", false, true, false, false,
                true},
};

// Those that are on. Off is the default of each.
class FeatureSet {
 public:
  constexpr FeatureSet() = default;
  constexpr FeatureSet(std::initializer_list<Feature> on) {
    for (Feature feature : on) set(feature);
  }

  constexpr bool has(Feature feature) const { return (bits_ & bit(feature)) != 0; }
  constexpr void set(Feature feature, bool on = true) { bits_ = on ? bits_ | bit(feature) : bits_ & ~bit(feature); }
  constexpr std::uint32_t bits() const { return bits_; }
  constexpr bool empty() const { return bits_ == 0; }
  constexpr bool only(Feature feature) const { return bits_ == bit(feature); }

  // Whether there is such a kernel: at most one tensor of pairs, and a way to read one only where there is one; a
  // user's functions say all that there is to say of scores and masks.
  constexpr bool go_together() const {
    if (are_users())
      return (bits_ & ~(bit(Feature::kUserScore) | bit(Feature::kUserBias) | bit(Feature::kBlockMask))) == 0 &&
             !(has(Feature::kUserScore) && has(Feature::kUserBias));
    const int pairs = has(Feature::kBias16) + has(Feature::kBias32) + has(Feature::kBoolMask);
    return pairs <= 1 && (pairs == 1 || !(has(Feature::kUnpaired) || has(Feature::kOneRow)));
  }
  constexpr bool read_pairs() const {
    return has(Feature::kBias16) || has(Feature::kBias32) || has(Feature::kBoolMask);
  }
  // Whether that tensor holds numbers, which may need a gradient.
  constexpr bool read_numbers() const { return has(Feature::kBias16) || has(Feature::kBias32); }
  // Of an element of that tensor; 0 where there is none.
  constexpr int pair_bytes() const {
    return has(Feature::kBias32) ? 4 : has(Feature::kBias16) ? 2 : has(Feature::kBoolMask) ? 1 : 0;
  }

  // Whether a user's functions are compiled in.
  constexpr bool are_users() const { return any(&FeatureInfo::is_users); }

  constexpr bool change_scores() const { return any(&FeatureInfo::changes_scores); }
  constexpr bool need_positions() const { return any(&FeatureInfo::needs_positions); }
  constexpr bool forward_only() const { return any(&FeatureInfo::forward_only); }

  // Those that finish rows, and the others.
  constexpr FeatureSet finishing_rows() const { return filtered(true); }
  constexpr FeatureSet of_main_loop() const { return filtered(false); }

  friend constexpr FeatureSet operator|(FeatureSet a, const FeatureSet& b) {
    a.bits_ |= b.bits_;
    return a;
  }
  friend auto operator<=>(const FeatureSet&, const FeatureSet&) = default;

 private:
  constexpr bool any(bool FeatureInfo::* property) const {
    for (const FeatureInfo& info : kFeatures)
      if (info.*property && has(info.feature)) return true;
    return false;
  }

  constexpr FeatureSet filtered(bool finishing) const {
    FeatureSet set;
    for (const FeatureInfo& info : kFeatures)
      if (info.finishes_rows == finishing) set.set(info.feature, has(info.feature));
    return set;
  }

  static constexpr std::uint32_t bit(Feature feature) { return std::uint32_t{1} << static_cast<unsigned>(feature); }

  std::uint32_t bits_ = 0;
};

// Every set of features that go together, but for those of a user's functions.
inline std::vector<FeatureSet> all_feature_sets() {
  std::vector<FeatureSet> sets;
  for (std::size_t i = 0; i < std::size_t{1} << kFeatures.size(); ++i) {
    FeatureSet set;
    for (std::size_t f = 0; f < kFeatures.size(); ++f) set.set(kFeatures[f].feature, (i >> f & 1) != 0);
    if (set.go_together() && !set.are_users()) sets.push_back(set);
  }
  return sets;
}

}  // namespace flash_attn_jit

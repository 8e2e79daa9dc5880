// A kernel family: all that the project knows of a kind of kernel. One descriptor each in families/; what needs to know
// about kinds asks the descriptor and has no switch of its own.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "generator/kernel_spec.h"
#include "generator/tile_table.h"

namespace flash_attn_jit {

// The rows of a problem that a block owns.
enum class RowSide { kQueries, kKeys };

// What a kernel writes.
struct KernelResults {
  bool out = false, delta = false, dq = false, dkdv = false;  // out: softmax_lse with it
  bool dbias = false;                                         // attn_bias's gradient
  bool cache = false;                                         // rows of k and v
};

// The tiles that there are beside the default ones: every combination of these, of warps and of rows that is legal.
// Empty: no others.
struct TileSpace {
  std::span<const int> columns;
  std::span<const LoopSchedule> schedules;
};

struct KernelFamily {
  std::string_view word;        // in a spec's text, and of `inspect --kind`
  std::string_view pack_group;  // of `prebuild --kinds`: the kernels of one pass are built together

  // The source.
  std::string_view template_file;
  std::string_view function;    // the template function in it, of a Traits
  std::string_view params;      // its argument's type
  std::string_view tile = {};   // the template struct whose kSharedBytes must equal shared_bytes(); empty: it uses none
  std::string_view trait = {};  // a line of Traits of its own, or nothing

  KernelResults results;
  RowSide rows;
  bool reads_mask;                  // false: mask, features and group size say nothing about the kernel
  bool reads_values_alone = false;  // of q's and v's head dims the kernel knows v's
  bool has_all_rows = false;        // a block owns all rows of a sequence: a tile with fewer is not for the problem
  // A warp has 16 or 32 of a block's rows, and those that have the same ones take turns with tiles of columns; the
  // query heads of a group are rows of one block. A block has some of the columns: see key_splits.h.
  bool warps_share_rows = false;
  // How many warps have the same rows, each with its part of the head dims.
  int dim_splits = 1;
  int least_head_dim = 1, most_head_dim = kMostNarrowHeadDim;
  constexpr bool has_head_dim(int head_dim) const { return head_dim >= least_head_dim && head_dim <= most_head_dim; }

  // What a tile occupies. None of these reads more of a spec than its head dims and tile.
  int products = 0;        // of an iteration of the main loop: forward S and O, dQ also dP; 0: no main loop
  int value_products = 0;  // of them those that go over v's head dims, or make them
  int (*output_splits)(const KernelSpec&) = [](const KernelSpec&) { return 1; };
  int (*shared_bytes)(const KernelSpec&) = [](const KernelSpec&) { return 0; };
  int (*registers)(const KernelSpec&);  // a thread's, at the least

  bool is_tuned = true;  // whether the tuner has problems for it
  // Whether its default tiles are chosen by what they cost: see tile_costs.h.
  constexpr bool has_tile_costs() const { return is_tuned && products > 0; }

  // Which tiles there are.
  std::optional<std::string> (*check_tile)(const KernelSpec&);  // nothing, or why it is not one of this family's
  TileTables (*default_tiles)(const KernelSpec&);
  TileSpace space = {};
};

}  // namespace flash_attn_jit

// Which tile for a spec and a problem: one question, whoever answers it. The default tables, which the families hold,
// do; on GPUs measured records stand before them.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "generator/kernel_spec.h"
#include "generator/legality.h"
#include "generator/problem.h"

namespace flash_attn_jit {

// A backward pass takes these, or the one whose blocks have all keys.
inline constexpr std::array kSeparateBackwardKinds = {KernelKind::kBackwardPreprocess, KernelKind::kBackwardDkDv,
                                                      KernelKind::kBackwardDq};

class TileChooser {
 public:
  virtual ~TileChooser() = default;

  // A tile for `spec`, whose own is not read. Asked at every launch: allocates nothing and waits for nobody. Throws
  // UnsupportedError where there is none (head dims above 256).
  virtual TileConfig choose(const KernelSpec& spec, const Problem& problem) const = 0;

  // Whether a backward pass that is to make all gradients takes the one kernel whose blocks have all keys: where there
  // is a tile for it, and it is done before the other three. Of `spec` the kind and the tile are not read. As choose().
  virtual bool takes_all_keys(const KernelSpec& spec, const Problem& problem) const = 0;

  // Whether a forward pass takes the decode kernel: where its rows are few. As takes_all_keys().
  virtual bool takes_decode(const KernelSpec& spec, const Problem& problem) const = 0;
};

// Whether a block's rows lie in one block of the problem's block mask, and that mask's columns are whole tiles. True
// without one.
bool fits_mask_blocks(const KernelSpec& spec, const TileConfig& tile, const Problem& problem);

// Whether a block of `tile` has the rows that its family asks for: all of a sequence, or any number.
bool has_rows(const KernelSpec& spec, const TileConfig& tile, std::int64_t seqlen_k);

// Whether one of the default tiles for `spec` has them.
bool has_default_tile(const KernelSpec& spec, std::int64_t seqlen_k);

// How long the problem would take with a tile on a Turing card with as many multiprocessors, in its cycles, by the
// costs of the default tiles: what there is to say of a kernel that nobody has compiled.
double expected_cycles(const KernelSpec& spec, const TileConfig& tile, const Problem& problem);

// Of the default tiles, the one that would be done first on a Turing card with as many multiprocessors.
const TileChooser& default_tile_chooser();

// Every default tile for `spec`'s kind, head dim, access, mask and features, the one for large problems first.
std::vector<TileConfig> default_tiles(const KernelSpec& spec);

// The tile space: every tile that the tuner may try and the tests execute.
std::vector<TileConfig> tile_space(const KernelSpec& spec, const ArchLimits& arch);

}  // namespace flash_attn_jit

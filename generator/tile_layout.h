// What a spec's tile occupies, as far as it is the same for every family; the rest stands in the families' descriptors.
#pragma once

#include "generator/kernel_spec.h"

namespace flash_attn_jit {

// Head dims that the kernel computes with: head_dim in steps of 8, of 16 where its gradients are split in two, and of
// 64 where four warps share them. Those beyond head_dim are zeros that no tensor holds.
int kernel_dims(const KernelSpec& spec);
int kernel_value_dims(const KernelSpec& spec);  // the same of v's
int greatest_kernel_dims(const KernelSpec& spec);

// Rows that a warp has: its part of the block's; where warps share rows 32 of them, if there are, and 16 above head dim
// 128, where O of more has no room in registers.
int rows_of_warp(const KernelSpec& spec);

// Tiles of 16 rows that a warp has.
int row_tiles_of_warp(const KernelSpec& spec);

// Columns that a block's warps go over together, one iteration each.
int columns_of_iteration(const KernelSpec& spec);

// Blocks that the kernel is compiled to keep on one multiprocessor: 8 warps of 255 registers fill its registers.
int blocks_per_multiprocessor(const TileConfig& tile);

// m16n8k8 tensor instructions that one warp's iteration of the unmasked main loop needs for the true head dim: where
// two blocks make half of the gradients each and both compute S and dP, half of what the two need together.
int useful_mma_per_iteration(const KernelSpec& spec);

// Head dims that the kernel's products go over for a pair of a query and a key, all together.
int product_dims(const KernelSpec& spec);

// Shared memory: bytes from a row of a tile to the next (templates/tile_copy.cuh), head dims that a warp's rows are
// staged by on their way out (templates/row_output.cuh), bytes of one operand's rows, of kernel_dims() or
// kernel_value_dims(), that registers do not hold.
int row_pitch(int dims);
int staging_dims(int dims);
int shared_row_bytes(const KernelSpec& spec, int dims);

// Of an operand's dims those that registers hold: whole steps of 16, or all. A tile's register_dims bounds them, and is
// more than an operand has where v has more head dims.
int register_dims(const KernelSpec& spec, int dims);

// Registers of a thread: those of one operand's rows, and those that every kernel takes.
int row_registers(const KernelSpec& spec, int dims);
inline constexpr int kFragmentAndAddressRegisters = 24;

}  // namespace flash_attn_jit

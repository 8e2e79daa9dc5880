// What a spec's tile occupies: shared memory, resident blocks, tensor instructions.
#pragma once

#include "generator/kernel_spec.h"

namespace flash_attn_jit {

// Dynamic shared memory of a block in bytes; equals kSharedBytes of FlashFwdTile or FlashBwdTile in the templates, which
// the rendered source asserts.
int shared_bytes(const KernelSpec& spec);

// Head dims that the kernel computes with: head_dim rounded up to 16, and to 32 where its gradients are split in two. Those
// beyond head_dim are zeros that no tensor holds.
int kernel_dims(const KernelSpec& spec);

// Into how many parts of the head dims the gradients are split, a block for each: above 128, 16 rows of both dK and dV
// would take all of a thread's registers.
int output_splits(const KernelSpec& spec);

// Blocks that the kernel is compiled to keep on one multiprocessor: 8 warps of 255 registers fill its registers.
int blocks_per_multiprocessor(const KernelSpec& spec);

// Registers a thread needs at the least: accumulators, Q, two sets of scores, fragments and addresses.
int estimated_registers(const KernelSpec& spec);

// m16n8k8 tensor instructions that one warp's turn of the unmasked main loop needs for the true head dim: where two blocks
// make half of the gradients each and both compute S and dP, half of what the two need together.
int useful_mma_per_turn(const KernelSpec& spec);

}  // namespace flash_attn_jit

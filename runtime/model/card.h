// The Turing cards that the model knows, and one multiprocessor of theirs in numbers.
#pragma once

#include <span>
#include <string>
#include <string_view>

namespace flash_attn_jit {

struct Card {
  std::string_view word;  // of `--gpu`
  std::string_view name;  // as the driver gives it
  int multiprocessors = 0;
  double boost_mhz = 0;
  // What it holds under tensor work, where its power limit leaves less than the boost clock.
  double sustained_mhz = 0;
  double dram_bytes_per_second = 0;  // nominal
  int mma_interval = 8;              // cycles of a sub-partition for an m16n8k8 with float32 accumulators
  // What copies on the device get of DRAM, reads and writes together; 0 where no figure is known.
  double copied_bytes_per_second = 0;

  // The most that a kernel is predicted to move.
  double attainable_bytes_per_second() const {
    return copied_bytes_per_second > 0 ? copied_bytes_per_second : dram_bytes_per_second;
  }
};

std::span<const Card> cards();
// Throws UnsupportedError, which names those that there are.
const Card& find_card(std::string_view word);

// What decides how fast a multiprocessor (sm_75) runs code, in cycles and bytes.
struct MultiprocessorModel {
  // Z. Jia et al., "Dissecting the NVidia Turing T4 GPU via Microbenchmarking", 2019: latencies, and the shared
  // memory's 3.66 TiB/s over 40 multiprocessors, which are 64 B a cycle each.
  int mma_latency = 18;      // until an accumulator can be read
  int mma_read = 10;         // until an operand's register can be written
  int shared_latency = 22;   // and the cycles its data take
  int global_latency = 300;  // of a load that L2 has
  int barrier_latency = 12;
  int shared_bytes_per_cycle = 64;
  // Two tensor cores of 64 multiply-adds a cycle in each sub-partition: NVIDIA, "Turing GPU Architecture", 2018. Also
  // the distance that ptxas leaves.
  int mma_interval = 8;
  // 32 lanes over those that a sub-partition has of a kind, ibid.: 16 for float32 and integers each, 4 for special
  // functions, 1 for double precision.
  int alu_interval = 2, xu_interval = 8, fp64_interval = 32;
  // Estimates, where no figure is published; nearly nothing in a main loop waits for them but exponentials for
  // xu_latency. With all of these the model is within 7 % of 72 published times of a T4.
  int alu_latency = 6, xu_latency = 20, fp64_latency = 60;
  int shuffle_latency = 22;
  int store_latency = 40;  // until its registers can be written; local memory's loads too
  int atomic_latency = 300, atomic_interval = 8;
  int other_memory_latency = 25;
  // R. Huerta et al., "Analyzing Modern NVIDIA GPU cores", MICRO 2025, and its configuration of an RTX 2080 Ti: the
  // first level of instructions, of each sub-partition, is 16 KiB in 128-byte lines; one stream buffer runs ahead of a
  // miss.
  int instruction_sets = 4, instruction_ways = 32;
  int instruction_miss = 78;
  int stream_buffer_lines = 8;
  int fetch_ahead = 2;   // instructions
  int memory_queue = 6;  // memory instructions that a sub-partition holds before it stalls

  // With longer latencies: a share that holds up under them rests on less luck.
  MultiprocessorModel stressed() const;
};

MultiprocessorModel multiprocessor_of(const Card& card);

// Blocks that fit on a multiprocessor; 0: none does. NVIDIA, CUDA C++ programming guide, "Technical specifications per
// compute capability", 7.5: 64 K registers, 64 KiB of shared memory, 1024 threads, 16 blocks.
int resident_blocks(int registers, int shared_bytes, int threads);

}  // namespace flash_attn_jit

// The options of a call: read from flash_attn_jit._options.Options.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "python/bindings_arguments.h"
#include "runtime/request/attention_options.h"

namespace flash_attn_jit::bindings {

// `type` is the NamedTuple. Looks up, once, where each field lies that is read by name here; throws where a field is
// missing on one of the two sides.
void connect_options(pybind11::type type);

// What is accepted of each option that is a tensor, in words: name -> text.
pybind11::dict accepted_tensors();

// Of q, and of k and v that are no pages. Throws ArgumentError for what is no Options.
Layout layout_of(pybind11::handle options);

// Whether k and v are (pages, page size, heads, head_dim). Of an Options.
bool is_paged(pybind11::handle options);

std::int64_t num_splits(pybind11::handle options);

// A contiguous tensor of numbers on q's device, or an ArgumentError with what is `accepted`.
void check_small_tensor(const Argument& argument, const Argument& q, ElementType dtype, bool shape_fits,
                        const std::string& accepted);

inline constexpr const char* kAcceptedOfBatch =
    "None, or (batch), torch.int32, contiguous: a number of rows for each sequence";

// A block_table for a batch, or None.
std::optional<PageTable> read_page_table(pybind11::handle block_table, const Argument& q, std::int64_t batch);

AttentionOptions read_options(pybind11::handle options, const Argument& q);

}  // namespace flash_attn_jit::bindings

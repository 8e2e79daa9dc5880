// The process that measures: what the one that searches starts as another program.
#pragma once

namespace flash_attn_jit {

// Serves tuning on stdin and stdout until stdin ends. Returns the exit code. The process ends with its parent.
int run_tune_worker();

}  // namespace flash_attn_jit

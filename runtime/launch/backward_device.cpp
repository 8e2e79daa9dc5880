#include "runtime/launch/loaded_kernels.h"
#include "runtime/request/backward.h"

namespace flash_attn_jit {

void backward_on_device(const BackwardRequest& request, int device_ordinal, StreamHandle stream) {
  process_devices().backward(request, device_ordinal, stream);
}

}  // namespace flash_attn_jit

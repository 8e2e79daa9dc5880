#include "runtime/launch/loaded_kernels.h"
#include "runtime/request/forward.h"

namespace flash_attn_jit {

void forward_on_device(const ForwardRequest& request, int device_ordinal, StreamHandle stream) {
  process_devices().forward(request, device_ordinal, stream);
}

}  // namespace flash_attn_jit

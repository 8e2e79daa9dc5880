#include "small_kernel.h"
#include "runtime/launch/process.h"
#include "runtime/system/errors.h"

#include "generator/render.h"
#include "runtime/compile/host_compiler.h"

namespace flash_attn_jit::testing {
namespace {

// The text of a template, with those that it includes in the place of their include lines.
std::string inlined(const std::string& name) {
  const std::string text = embedded_templates().at(name), mark = "#include \"";
  std::string result = "#line 1 \"" + name + "\"\n";
  std::size_t at = 0;
  for (std::size_t found; (found = text.find(mark, at)) != std::string::npos;) {
    const std::size_t begin = found + mark.size(), end = text.find('"', begin);
    result += text.substr(at, found - at);
    const std::string included = text.substr(begin, end - begin);
    if (included != "primitives_cuda.cuh") result += inlined(included);
    at = end + 1;
  }
  return result + text.substr(at);
}

}  // namespace

CompiledKernel compile_small_kernel(const std::string& declarations, const std::string& body) {
  RenderedKernel rendered;
  rendered.entry = "small_kernel";
  rendered.source = inlined("primitives.cuh") + declarations +
                    "\n__global__ void small_kernel(const Params params) {\n#line 1 \"body.cu\"\n" + body +
                    "\n}\nextern \"C\" void flash_attn_jit_thread(const void* params) {\n"
                    "  small_kernel(*static_cast<const Params*>(params));\n}\n";
  try {
    return compile_for_host(rendered, host_compiler());
  } catch (const HostCompileFailure& failure) {
    throw Error(std::string(failure.what()) + "\n" + failure.log);
  }
}

InterpreterReport run_small_kernel(const CompiledKernel& kernel, int threads, const void* params,
                                   std::span<const TensorExtent> tensors) {
  return interpret(kernel, {.blocks = 1, .threads = threads, .dynamic_smem = 4096}, params, tensors);
}

std::string error_of_small_kernel(const std::string& body, int threads) {
  const CompiledKernel kernel = compile_small_kernel("struct Params {};", body);
  const char no_params = 0;
  try {
    run_small_kernel(kernel, threads, &no_params, {});
  } catch (const InterpreterError& error) {
    return error.what();
  }
  return "";
}

}  // namespace flash_attn_jit::testing

#include "python/bindings_errors.h"

#include <pybind11/pybind11.h>

#include "runtime/system/errors.h"
#include "runtime/system/interrupt.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {
namespace {

py::object error_class(const char* name) { return py::module_::import("flash_attn_jit.errors").attr(name); }

void raise(const char* class_name, const std::exception& error) {
  py::set_error(error_class(class_name), readable(error.what()));
}

// With the parts of the message, where it has them, as flash_attn_jit.errors.Refusal.
void raise_refusal(const py::object& type, const RefusalError& error) {
  const py::object instance = type(readable(error.what()));
  if (const std::optional<Refusal>& parts = error.refusal)
    instance.attr("refusal") = error_class("Refusal")(readable(parts->argument), readable(parts->came),
                                                      readable(parts->accepted), readable(parts->advice), type);
  PyErr_SetObject(type.ptr(), instance.ptr());
}

py::object builtin(PyObject* type) { return py::reinterpret_borrow<py::object>(type); }

// A path as Python has it, so that it can be opened.
py::str path_text(const std::string& path) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<py::ssize_t>(path.size())));
}

void raise_compile_error(const CompileError& error) {
  const py::object type = error_class("CompileError");
  py::object instance = type(readable(error.what()));
  instance.attr("log") = readable(error.log);
  instance.attr("options") = readable(error.options);
  instance.attr("source_path") = path_text(error.source_path);
  PyErr_SetObject(type.ptr(), instance.ptr());
}

void raise_missing_kernel_error(const MissingKernelError& error) {
  const py::object type = error_class("MissingKernelError");
  py::object instance = type(readable(error.what()));
  instance.attr("spec") = error.spec.text();
  instance.attr("prebuild_command") = error.prebuild_command;
  PyErr_SetObject(type.ptr(), instance.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Interrupted&) {
    if (!PyErr_Occurred()) PyErr_SetNone(PyExc_KeyboardInterrupt);
  } catch (const CompileError& error) {
    raise_compile_error(error);
  } catch (const MissingKernelError& error) {
    raise_missing_kernel_error(error);
  } catch (const DriverError& error) {
    raise("DriverError", error);
  } catch (const InterpreterError& error) {
    raise("InterpreterError", error);
  } catch (const UnsupportedError& error) {
    raise_refusal(error_class("UnsupportedError"), error);
  } catch (const ConfigError& error) {
    raise("ConfigError", error);
  } catch (const ArgumentError& error) {
    raise_refusal(builtin(PyExc_ValueError), error);
  } catch (const SpecError& error) {
    py::set_error(PyExc_ValueError, readable(error.what()));
  } catch (const Error& error) {
    py::set_error(PyExc_RuntimeError, readable(error.what()));
  }
}

}  // namespace

py::str readable(const std::string& text) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), "replace"));
}

void register_error_translator() { py::register_local_exception_translator(translate); }

}  // namespace flash_attn_jit::bindings

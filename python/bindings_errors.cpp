#include "python/bindings_errors.h"

#include <pybind11/pybind11.h>

#include "runtime/interpreter/interpreter.h"
#include "runtime/interrupt.h"
#include "runtime/kernel_library.h"

namespace py = pybind11;

namespace flash_attn_jit::bindings {
namespace {

py::object error_class(const char* name) { return py::module_::import("flash_attn_jit.errors").attr(name); }

void raise(const char* class_name, const std::exception& error) {
  py::set_error(error_class(class_name), error.what());
}

void raise_compile_error(const CompileError& error) {
  const py::object type = error_class("CompileError");
  py::object instance = type(error.what());
  instance.attr("log") = error.log;
  instance.attr("options") = error.options;
  instance.attr("source_path") = error.source_path;
  PyErr_SetObject(type.ptr(), instance.ptr());
}

void raise_missing_kernel_error(const MissingKernelError& error) {
  const py::object type = error_class("MissingKernelError");
  py::object instance = type(error.what());
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
    raise("UnsupportedError", error);
  } catch (const ConfigError& error) {
    raise("ConfigError", error);
  } catch (const NotBuiltError& error) {
    py::set_error(PyExc_NotImplementedError, error.what());
  } catch (const ArgumentError& error) {
    py::set_error(PyExc_ValueError, error.what());
  } catch (const SpecError& error) {
    py::set_error(PyExc_ValueError, error.what());
  }
}

}  // namespace

void register_error_translator() { py::register_local_exception_translator(translate); }

}  // namespace flash_attn_jit::bindings

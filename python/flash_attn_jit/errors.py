"""What can go wrong. Bad arguments raise ``ValueError``, what is not built yet ``NotImplementedError``."""

__all__ = [
    "CompileError",
    "ConfigError",
    "DriverError",
    "InterpreterError",
    "MissingKernelError",
    "UnsupportedError",
]


class UnsupportedError(ValueError):
    """The device or the library cannot do what was asked; names the argument, the device and what is supported."""


class CompileError(RuntimeError):
    """The compiler refused a generated kernel.

    Attributes:
        log: the compiler's log.
        options: the options it was given.
        source_path: where the source was kept.
    """

    log: str = ""
    options: str = ""
    source_path: str = ""


class MissingKernelError(RuntimeError):
    """No pack or cache holds the kernel, and no compiler can be had.

    Attributes:
        spec: the kernel's canonical text.
        prebuild_command: the command that makes a pack with it.
    """

    spec: str = ""
    prebuild_command: str = ""


class DriverError(RuntimeError):
    """A CUDA driver call failed, or there is no driver."""


class InterpreterError(RuntimeError):
    """The interpreter caught a fault; names the kernel, source line, block, warp and lane."""


class ConfigError(RuntimeError):
    """A ``FLASH_ATTN_JIT_...`` variable has a bad value; names the variable and what it accepts."""

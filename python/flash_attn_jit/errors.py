"""What can go wrong. Bad arguments raise ``ValueError``, what is not built yet ``NotImplementedError``."""

from typing import Any, NamedTuple

__all__ = [
    "CompileError",
    "ConfigError",
    "DriverError",
    "InterpreterError",
    "MissingKernelError",
    "UnsupportedError",
]


class Refusal(NamedTuple):
    """Why an argument is refused, in the parts of the message. An error of the compiled module's checks has it as its
    attribute ``refusal``."""

    argument: str
    came: str
    accepted: str
    advice: str = ""
    error: type[Exception] = ValueError

    def exception(self) -> Exception:
        advice = f". {self.advice}" if self.advice else ""
        return self.error(f"{self.argument} {self.came}; accepted: {self.accepted}{advice}")

    def reason(self) -> str:
        """What came, and what to do about it."""
        advice = f". {self.advice}" if self.advice else ""
        return f"{self.argument} {self.came}{advice}"


def kind_text(value: Any) -> str:
    """What a value is, in words: "an int", "a list", "None"."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' or name == 'ndarray' else 'a'} {name}"


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
    """No pack or cache holds the kernel, and no compiler can be had or FLASH_ATTN_JIT_OFFLINE=1 forbids to compile.

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

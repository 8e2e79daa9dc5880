"""What the card does meanwhile, as nvidia-smi tells: clocks, power, temperature, and what holds the clocks down."""

import shutil
import subprocess
import threading
import time
from statistics import median
from typing import Any

_FIELDS = {
    "clocks.sm": "clock_mhz",
    "power.draw": "power_watts",
    "temperature.gpu": "temperature_celsius",
    "clocks_throttle_reasons.active": "throttled_by",
}
_LIMITS = {
    "name": "name",
    "driver_version": "driver",
    "power.limit": "power_limit_watts",
    "clocks.max.sm": "highest_clock_mhz",
    "ecc.mode.current": "ecc",
}
# Bits of NVML's clock event reasons.
_REASONS = {
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}


def _command(gpu: str, fields: dict[str, str]) -> list[str]:
    return ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def _value(name: str, text: str) -> Any:
    """None for what the card does not tell: "[N/A]"."""
    if name in ("name", "driver", "ecc"):
        return None if text.startswith("[") else text
    try:
        if name == "throttled_by":
            bits = int(text, 16)
            return [reason for bit, reason in _REASONS.items() if bits & bit]
        return float(text)
    except ValueError:
        return None


def parse(fields: dict[str, str], line: str) -> dict[str, Any] | None:
    """A line of nvidia-smi's; None for one that is none."""
    texts = [text.strip() for text in line.split(",")]
    if len(texts) != len(fields):
        return None
    return {name: _value(name, text) for name, text in zip(fields.values(), texts)}


def limits(gpu: str) -> dict[str, Any]:
    """The card's own; with "error" where they cannot be had."""
    if shutil.which("nvidia-smi") is None:
        return {"error": "there is no nvidia-smi"}
    try:
        done = subprocess.run(_command(gpu, _LIMITS), capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    parsed = parse(_LIMITS, done.stdout) if done.returncode == 0 else None
    return parsed or {"error": (done.stderr or done.stdout).strip()[:300]}


class Watch:
    """Follows the card while it is entered, a few times a second. Where there is no nvidia-smi it sees nothing."""

    def __init__(self, gpu: str, milliseconds: int = 200):
        self._command = [*_command(gpu, _FIELDS), f"--loop-ms={milliseconds}"]
        self._seen: list[tuple[float, dict[str, Any]]] = []
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> "Watch":
        try:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
            )
        except OSError:
            return self
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._reader is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if sample := parse(_FIELDS, line):
                self._seen.append((time.monotonic(), sample))

    def since(self, begin: float) -> dict[str, Any]:
        """Medians since that time.monotonic(), and every reason that held the clocks down."""
        samples = [sample for when, sample in self._seen if when >= begin]
        found: dict[str, Any] = {"samples": len(samples)}
        for name in ("clock_mhz", "power_watts", "temperature_celsius"):
            values = [sample[name] for sample in samples if sample[name] is not None]
            found[name] = median(values) if values else None
        found["throttled_by"] = sorted({reason for sample in samples for reason in sample["throttled_by"] or []})
        return found

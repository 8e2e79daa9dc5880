"""Python files of a wheel on the package index, of which nothing else is downloaded."""

import io
import json
import urllib.error
import urllib.request
import zipfile
from typing import Any

import pytest

_INDEX = "https://pypi.org/simple"
_SECONDS = 60


class _RemoteFile(io.RawIOBase):
    """A file behind an address whose server gives parts of it."""

    def __init__(self, address: str, size: int) -> None:
        self.address, self.size, self.at = address, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        end = min(self.at + len(buffer), self.size)
        if end <= self.at:
            return 0
        request = urllib.request.Request(self.address, headers={"Range": f"bytes={self.at}-{end - 1}"})
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            assert answer.status == 206, f"{self.address} gives no parts: status {answer.status}"
            data = answer.read()
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def _find(package: str, version: str) -> tuple[str, int]:
    """Address and size of one of its wheels: the Python files are the same in all."""
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    request = urllib.request.Request(f"{_INDEX}/{package}/", headers=accept)
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        files = json.load(answer)["files"]
    wheels = [f for f in files if f["filename"].startswith(f"{package}-{version}-") and f["filename"].endswith(".whl")]
    assert wheels, f"{package} {version} has no wheel on {_INDEX}"
    with urllib.request.urlopen(urllib.request.Request(wheels[0]["url"], method="HEAD"), timeout=_SECONDS) as answer:
        return wheels[0]["url"], int(answer.headers["Content-Length"])


class Wheel:
    def __init__(self, package: str, version: str) -> None:
        try:
            self.archive = zipfile.ZipFile(io.BufferedReader(_RemoteFile(*_find(package, version)), 1 << 20))
        except urllib.error.HTTPError:  # an answer, and so no lack of a network
            raise
        except (urllib.error.URLError, TimeoutError) as error:
            pytest.skip(f"the package index cannot be reached: {error}")
        self.names = set(self.archive.namelist())

    def source(self, module: str) -> str:
        """module: with dots."""
        path = module.replace(".", "/")
        for name in (f"{path}.py", f"{path}/__init__.py"):
            if name in self.names:
                return self.archive.read(name).decode()
        pytest.fail(f"the wheel has no module {module}")

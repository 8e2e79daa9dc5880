"""What a wheel is: its tags, its files, and of each binary what the loader will ask for."""

from __future__ import annotations

import re
import zipfile
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection


class Binary(NamedTuple):
    name: str
    machine: str
    needed: set[str]
    search_paths: set[str]  # RPATH and RUNPATH
    glibc: set[tuple[int, ...]]  # versions of glibc that its symbols ask for
    exported: set[str]
    imported: set[str]


class Wheel(NamedTuple):
    file_name: str
    tags: set[str]
    files: set[str]
    binaries: list[Binary]


def read_binary(name: str, image: bytes) -> Binary:
    elf = ELFFile(BytesIO(image))
    binary = Binary(name, elf["e_machine"], set(), set(), set(), set(), set())
    for section in elf.iter_sections():
        if isinstance(section, DynamicSection):
            for tag in section.iter_tags():
                if tag.entry.d_tag == "DT_NEEDED":
                    binary.needed.add(tag.needed)
                elif tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
                    binary.search_paths.add(getattr(tag, tag.entry.d_tag[3:].lower()))
        elif isinstance(section, GNUVerNeedSection):
            for _, versions in section.iter_versions():
                for version in versions:
                    if match := re.fullmatch(r"GLIBC_([0-9.]+)", version.name):
                        binary.glibc.add(tuple(map(int, match[1].split("."))))
        elif isinstance(section, SymbolTableSection) and section.name == ".dynsym":
            for symbol in section.iter_symbols():
                if symbol.name:
                    undefined = symbol["st_shndx"] == "SHN_UNDEF"
                    (binary.imported if undefined else binary.exported).add(symbol.name)
    return binary


def read_wheel(path: Path) -> Wheel:
    with zipfile.ZipFile(path) as archive:
        if (bad := archive.testzip()) is not None:
            raise SystemExit(f"{path}: {bad} is damaged")
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/WHEEL")]
        tags = set(re.findall(r"^Tag: (.*)$", archive.read(metadata).decode(), re.MULTILINE))
        images = {name: archive.read(name) for name in names}
    binaries = [read_binary(name, image) for name, image in images.items() if image[:4] == b"\x7fELF"]
    return Wheel(path.name, tags, set(names), binaries)

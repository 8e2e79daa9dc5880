"""The built module links the C and C++ run-time libraries and nothing else."""

import struct
from pathlib import Path

import flash_attn_jit._core

ALLOWED = {
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
PT_LOAD, PT_DYNAMIC = 1, 2
DT_NEEDED, DT_STRTAB, DT_RPATH, DT_RUNPATH = 1, 5, 15, 29


def dynamic_entries(image):
    """(tag, value) of a 64-bit little-endian ELF file's dynamic section, and its string table's file offset."""
    assert image[:6] == b"\x7fELF\x02\x01"
    (offset,), (size, count) = struct.unpack_from("<Q", image, 32), struct.unpack_from("<HH", image, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", image, offset + i * size) for i in range(count)]
    (dynamic,) = [header for header in headers if header[0] == PT_DYNAMIC]
    entries = list(struct.iter_unpack("<qQ", image[dynamic[2] : dynamic[2] + dynamic[5] // 16 * 16]))
    address = dict(entries)[DT_STRTAB]
    (strings,) = [
        header[2] + address - header[3]
        for header in headers
        if header[0] == PT_LOAD and header[3] <= address < header[3] + header[5]
    ]
    return entries, strings


def test_needed_libraries():
    image = Path(flash_attn_jit._core.__file__).read_bytes()
    entries, strings = dynamic_entries(image)
    needed = {
        image[strings + value : image.index(b"\0", strings + value)].decode()
        for tag, value in entries
        if tag == DT_NEEDED
    }
    assert "libc.so.6" in needed
    assert needed <= ALLOWED
    assert not [tag for tag, _ in entries if tag in (DT_RPATH, DT_RUNPATH)]


def test_the_package_is_typed():
    assert (Path(flash_attn_jit.__file__).parent / "py.typed").exists()

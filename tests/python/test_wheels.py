"""tools/wheels without a build: which interpreters are taken, which wheels are refused; what a release has to have."""

import importlib.metadata
import re
import stat
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from interpreters import WANTED, Interpreter, describe, search
from wheel_rules import PACK, problems

ROOT = Path(__file__).resolve().parents[2]
HERE = "{}.{}".format(*sys.version_info[:2])


class Binary(NamedTuple):
    """As wheel_facts reads one, which needs a library that the tests have not."""

    name: str
    exported: frozenset[str] = frozenset()
    imported: frozenset[str] = frozenset({"memcpy", "__cxa_atexit"})
    machine: str = "EM_X86_64"
    needed: frozenset[str] = frozenset({"libc.so.6", "libm.so.6"})
    search_paths: frozenset[str] = frozenset()
    glibc: frozenset[tuple[int, ...]] = frozenset({(2, 2, 5), (2, 28)})


class Wheel(NamedTuple):
    file_name: str
    tags: set[str]
    files: set[str]
    binaries: list[Binary]


TAG = "cp311-cp311-manylinux_2_28_x86_64"
MODULE = Binary("flash_attn_jit/_core.cpython-311-x86_64-linux-gnu.so", frozenset({"PyInit__core"}))
PROGRAM = Binary("flash_attn_jit-0.1.0.data/scripts/flash-attn-jit")
SOUND = Wheel(f"flash_attn_jit-0.1.0-{TAG}.whl", {TAG}, {"flash_attn_jit/__init__.py"}, [MODULE, PROGRAM])


def told(wheel, version="0.1.0", python="3.11"):
    return problems(wheel, version, python, {"flash_attn_jit/__init__.py"})


def test_a_sound_wheel():
    assert told(SOUND) == []
    with_pack = SOUND._replace(file_name=f"flash_attn_jit-0.1.0+sm75-{TAG}.whl", files={*SOUND.files, PACK})
    assert told(with_pack, "0.1.0+sm75") == []


@pytest.mark.parametrize(
    ("wheel", "problem"),
    [
        (SOUND._replace(file_name="flash_attn_jit-0.1.0-cp311-cp311-linux_x86_64.whl"), "its name is"),
        (SOUND._replace(tags={"cp311-cp311-linux_x86_64"}), "its tags are cp311-cp311-linux_x86_64; accepted"),
        (SOUND._replace(tags={TAG, TAG.replace("28", "34")}), "its tags are"),
        (SOUND._replace(files=set()), "it lacks flash_attn_jit/__init__.py"),
        (SOUND._replace(files={*SOUND.files, PACK}), f"{PACK} is in it, and its version is 0.1.0"),
        (SOUND._replace(binaries=[MODULE]), "its binaries are _core; accepted: _core, flash-attn-jit"),
        (SOUND._replace(binaries=[*SOUND.binaries, Binary("libgomp.so.1")]), "its binaries are"),
    ],
)
def test_a_wheel_that_is_refused(wheel, problem):
    assert any(problem in each for each in told(wheel)), told(wheel)


def test_a_version_with_a_pack_and_no_pack():
    wheel = SOUND._replace(file_name=f"flash_attn_jit-0.1.0+sm75-{TAG}.whl")
    assert told(wheel, "0.1.0+sm75") == [f"{PACK} is missing, and its version is 0.1.0+sm75"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"machine": "EM_AARCH64"}, "it is for EM_AARCH64; accepted: EM_X86_64"),
        ({"needed": {"libc.so.6", "libcuda.so.1"}}, "it links libcuda.so.1; accepted: ld-linux-x86-64.so.2, libc.so.6"),
        ({"needed": {"libnvrtc.so.12", "libtorch.so"}}, "it links libnvrtc.so.12, libtorch.so"),
        ({"needed": {"libstdc++.so.6"}}, "it links libstdc++.so.6"),
        ({"search_paths": {"$ORIGIN/../torch/lib"}}, "it has library paths of its own: $ORIGIN/../torch/lib"),
        ({"glibc": {(2, 5), (2, 34)}}, "it asks for glibc 2.34; accepted: up to 2.28"),
        ({"imported": {"_ZSt9terminatev", "free"}}, "names of the C++ library from elsewhere: _ZSt9terminatev"),
        ({"imported": {"__cxa_throw"}}, "names of the C++ library from elsewhere: __cxa_throw"),
        (
            {"exported": {"PyInit__core", "_ZTISt9exception"}},
            "exports PyInit__core, _ZTISt9exception; accepted: PyInit",
        ),
        ({"exported": set()}, "it exports nothing"),
    ],
)
def test_a_module_that_is_refused(change, problem):
    (found,) = told(SOUND._replace(binaries=[MODULE._replace(**change), PROGRAM]))
    assert found.startswith(f"{MODULE.name}: ") and problem in found, found


def fake_python(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def described(version, implementation="cpython", free_threaded="false", headers='"/usr/include/python"'):
    return (
        f'echo \'{{"version": "{version}", "executable": "/opt/python", "implementation": "{implementation}", '
        f'"free_threaded": {free_threaded}, "headers": {headers}}}\''
    )


@pytest.fixture
def no_pythons(monkeypatch, tmp_path):
    """None but what the test puts into the folder `bin`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setattr("interpreters._DESCRIBE", "")
    return folder


def test_this_interpreter():
    found = describe(sys.executable)
    assert isinstance(found, str) or (found is not None and found.version == HERE)


def test_interpreters_that_lack_are_named(no_pythons, tmp_path):
    fake_python(no_pythons / "python3.10", described("3.10"))
    fake_python(no_pythons / "python3.11", "exit 127")  # as pyenv's shims do
    fake_python(no_pythons / "python3.12", described("3.12", headers="null"))
    fake_python(no_pythons / "python3.13", described("3.13", free_threaded="true"))
    of_pyenv = tmp_path / "versions" / "3.11.7" / "bin"
    of_pyenv.mkdir(parents=True)
    fake_python(of_pyenv / "python3.11", described("3.11"))
    found, lacking = search([])
    assert list(found) == ["3.10", "3.11"] and list(lacking) == ["3.12", "3.13", "3.14"]
    assert found["3.10"] == Interpreter("3.10", "/opt/python", "/usr/include/python")
    assert "has no Python.h" in lacking["3.12"] and "apt-get install python3.12-dev" in lacking["3.12"]
    assert "is a free-threaded build" in lacking["3.13"]
    assert lacking["3.14"] == "no python3.14 on the PATH or among pyenv's"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("exit 1", "it does not run, or is no Python"),
        ("echo hello", "it does not run, or is no Python"),
        (described("3.9"), "is Python 3.9; accepted: 3.10, 3.11, 3.12, 3.13, 3.14"),
        (described("3.11", implementation="pypy"), "is pypy, and wheels are for CPython"),
    ],
)
def test_an_interpreter_that_is_given_and_serves_for_nothing(no_pythons, body, reason):
    with pytest.raises(SystemExit, match=re.escape(reason)):
        search([str(fake_python(no_pythons / "python", body))])


def test_an_interpreter_that_is_given_comes_first(no_pythons):
    fake_python(no_pythons / "python3.11", described("3.11").replace("/opt/python", "/of/path"))
    given = fake_python(no_pythons / "given", described("3.11"))
    assert search([str(given)]).found["3.11"].executable == "/opt/python"


def source_version():
    return re.search(r"project\(flash-attn-jit VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())[1]


def test_the_changelog_has_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    assert any(re.fullmatch(rf"{re.escape(source_version())} - (\d{{4}}-\d\d-\d\d|unreleased)", h) for h in headings)


def test_the_metadata_of_the_package():
    metadata = importlib.metadata.metadata("flash-attn-jit")
    assert metadata["Version"].partition("+")[0] == source_version()
    assert metadata["License-Expression"] == "MIT" and metadata["License-File"] == "LICENSE"
    classifiers = metadata.get_all("Classifier")
    assert [f"Programming Language :: Python :: {version}" for version in WANTED] == [
        each for each in classifiers if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", each)
    ]
    assert "Typing :: Typed" in classifiers and not any("License ::" in each for each in classifiers)
    # An install must never replace the user's torch.
    assert not [each for each in metadata.get_all("Requires-Dist") if "extra ==" not in each]


def test_wheels_are_built_with_pinned_tools():
    lines = (ROOT / "tools" / "wheels" / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[a-z0-9-]+==[0-9.]+", line) for line in lines)

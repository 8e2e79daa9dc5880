#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages that a build needs and that are missing, or prints the command that does.
# usage: system_packages.sh PYTHON
set -euo pipefail
python=$1

required=()  # nothing can be built without them
headers=()   # CMake downloads these where they are missing
optional=()  # without them some tests are skipped

command -v c++ >/dev/null || required+=(g++)
"$python" -c 'import venv, ensurepip' 2>/dev/null || required+=(python3-venv)
"$python" - <<'END' || required+=(python3-dev)
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
END
have_header() { echo "#include <$1>" | c++ -std=c++20 -fsyntax-only -x c++ - 2>/dev/null; }
if command -v c++ >/dev/null; then
  have_header nlohmann/json.hpp || headers+=(nlohmann-json3-dev)
  have_header CLI/CLI.hpp || headers+=(libcli11-dev)
  have_header doctest/doctest.h || headers+=(doctest-dev)
else
  headers+=(nlohmann-json3-dev libcli11-dev doctest-dev)
fi
command -v cmake >/dev/null || headers+=(cmake)

command -v chromium >/dev/null || command -v chromium-browser >/dev/null || optional+=(chromium)  # draws report pages

missing=("${required[@]}" "${headers[@]}")
if [ ${#missing[@]} -eq 0 ] && [ ${#optional[@]} -eq 0 ]; then
  echo "everything is there"
  exit 0
fi

by_hand="sudo apt-get update && sudo apt-get install -y ${missing[*]}"
as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo -n)

install_packages() {
  [ $# -gt 0 ] || return 0
  command -v apt-get >/dev/null || return 1
  "${as_root[@]}" true 2>/dev/null || return 1
  echo "apt-get install $*"
  "${as_root[@]}" apt-get update -q || true  # an old index may still do
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install -q -y --no-install-recommends "$@"
}

# By themselves: where a system does not know them, the others are installed all the same.
install_packages "${optional[@]}" || echo "Going on without ${optional[*]}: tests that need it are skipped."
install_packages "${missing[@]}" && exit 0

echo "Missing: ${missing[*]}. Install them with" >&2
echo "  $by_hand" >&2
if [ ${#required[@]} -gt 0 ]; then
  echo "(or your system's own way), then run make again." >&2
  exit 1
fi
echo "Going on without: headers are downloaded by CMake, CMake itself comes from PyPI." >&2

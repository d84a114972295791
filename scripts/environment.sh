# shellcheck shell=bash
# Makes the Python environment that every other script runs in. Sourced by them, not run by itself:
#
#     source scripts/environment.sh
#     prepare_environment run      # what the command needs, or:
#     prepare_environment test     # the same and what the tests need
#
# It finds Python, makes .venv at the root of the repository and installs querybridge into it, in place.
# A second call installs nothing unless pyproject.toml or constraints.txt changed. Two calls at once wait for
# each other. One that was stopped half-way is finished by the next one.
#
# QUERYBRIDGE_TORCH_INDEX   address of a package index to take torch from (a CPU build, ROCm, …); unset: as pip is set up
#
# bash 3.2 is what macOS has, so nothing newer is used here.

QB_ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
QB_VENV="$QB_ROOT/.venv"
QB_PYTHON=""

# Libraries of another environment must neither count as installed nor be imported.
unset PYTHONPATH PYTHONHOME

say() { printf 'querybridge: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 2
}

# --- Python -------------------------------------------------------------------------------------------------

# The upper end is what the pinned torch has wheels for.
python_fits() {
    "$1" -I -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

# Debian ships Python without the second of these; its own `python3 -m venv` leaves half an environment behind then.
python_has_venv() { "$1" -I -c 'import venv, ensurepip' >/dev/null 2>&1; }

python_version() { "$1" -c 'import sys; sys.stdout.write("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

# Sets QB_PYTHON to the first Python on the PATH that will do.
find_python() {
    local name version found="" without_venv=""
    for name in python3 python3.11 python3.12 python3.13 python3.14 python; do
        command -v "$name" >/dev/null 2>&1 || continue
        if ! python_fits "$name"; then
            version="$(python_version "$name" || true)" # empty: it does not even start
            [ -n "$found" ] || [ -z "$version" ] || found="$name is $version"
        elif ! python_has_venv "$name"; then
            [ -n "$without_venv" ] || without_venv="$name"
        else
            QB_PYTHON="$name"
            return 0
        fi
    done
    if [ -n "$without_venv" ]; then
        version="$(python_version "$without_venv")"
        die "Python $version ($without_venv) lacks the venv module: on Debian or Ubuntu run" \
            "'sudo apt install python${version%.*}-venv', then run this again"
    fi
    die "Python 3.11, 3.12, 3.13 or 3.14 is needed and the PATH has none (${found:-no Python at all}): install one and run this again"
}

# --- what state .venv is in ---------------------------------------------------------------------------------

# Two things can make an install out of date: these files, and the folder having been moved (a virtual environment
# holds absolute paths).
stamp_text() {
    cksum <"$QB_ROOT/pyproject.toml"
    cksum <"$QB_ROOT/constraints.txt"
    printf '%s\n' "$QB_ROOT"
}

# The index is remembered as a checksum, since its address may hold a password.
torch_index_text() { printf '%s' "${QUERYBRIDGE_TORCH_INDEX:-}" | cksum; }

# Left unset, the index says nothing: torch stays what it was.
torch_is_as_asked() {
    [ -z "${QUERYBRIDGE_TORCH_INDEX:-}" ] ||
        [ "$(cat "$QB_VENV/.querybridge-torch" 2>/dev/null)" = "$(torch_index_text)" ]
}

# pip is looked for because an upgrade of the system's Python can leave a .venv that starts but finds no libraries.
venv_works() {
    python_fits "$QB_VENV/bin/python" && "$QB_VENV/bin/python" -I -c '
import importlib.util, sys
sys.exit(sys.prefix == sys.base_prefix or importlib.util.find_spec("pip") is None)' >/dev/null 2>&1
}

environment_ready() {
    [ "$(cat "$QB_VENV/.querybridge-$1" 2>/dev/null)" = "$(stamp_text)" ] &&
        [ -x "$QB_VENV/bin/querybridge" ] && torch_is_as_asked && venv_works
}

# --- making it ----------------------------------------------------------------------------------------------

# The lock is held by file descriptor 9 of this shell and of what it starts, so it goes when they do, however
# they end. Python takes it because macOS has no flock command.
lock_venv() {
    mkdir -p "$QB_VENV" 2>/dev/null || die "can't make the folder $QB_VENV: free its name, its parent or the disk, then run this again"
    { exec 9>>"$QB_VENV/.querybridge-lock"; } 2>/dev/null || die "can't write in $QB_VENV: it belongs to another user, or the disk is full"
    "$QB_PYTHON" -I -c '
import fcntl, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    try:
        fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.stderr.write("querybridge: another run is setting up .venv; waiting for it\n")
        fcntl.flock(9, fcntl.LOCK_EX)
except OSError as error:
    sys.stderr.write("querybridge: .venv lies where no lock can be taken (%s); start one run at a time\n" % error)' ||
        die "can't lock $QB_VENV (Python's message stands above)"
}

# Everything but the lock, which another run may be waiting on.
empty_venv() { find "$QB_VENV/." -mindepth 1 -maxdepth 1 ! -name .querybridge-lock -exec rm -rf {} +; }

make_venv() {
    local messages
    say "making .venv with Python $(python_version "$QB_PYTHON")"
    empty_venv
    : >"$QB_VENV/.querybridge-making" || die "can't write in $QB_VENV: the disk may be full"
    if ! messages="$("$QB_PYTHON" -I -m venv "$QB_VENV" 2>&1)"; then
        explain "$messages"
        printf '%s\n' "$messages" >&2
        die "Python could not make a virtual environment in $QB_VENV (its messages stand above)"
    fi
    rm -f "$QB_VENV/.querybridge-making"
}

# Leaves a .venv that works, whatever was there: nothing, a half-made one, one of a Python that is gone.
repair_venv() {
    local stamp
    if [ -z "$(find "$QB_VENV/." -mindepth 1 -maxdepth 1 ! -name '.querybridge-*')" ]; then
        make_venv
    elif [ -e "$QB_VENV/.querybridge-making" ]; then
        say "the last run was stopped while it made .venv"
        make_venv
    elif [ ! -e "$QB_VENV/pyvenv.cfg" ]; then
        die "$QB_VENV is no virtual environment and is left alone: move it away and run this again"
    elif ! venv_works; then
        say ".venv does not work (its Python is gone, too old or too new, or it has no pip)"
        make_venv
    else
        for stamp in "$QB_VENV"/.querybridge-run "$QB_VENV"/.querybridge-test; do
            if [ -e "$stamp" ] && [ "$(sed -n 3p "$stamp")" != "$QB_ROOT" ]; then
                say "this folder was moved or copied, which breaks .venv"
                make_venv
                return 0
            fi
        done
    fi
}

# pip writes INSTALLER once a package's files are all there. Without it, pip would take half a package for a whole one.
drop_half_installed() {
    "$QB_VENV/bin/python" -I -c '
import pathlib, shutil, sysconfig
site = pathlib.Path(sysconfig.get_path("purelib"))
halves = [info for info in site.glob("*.dist-info") if not (info / "INSTALLER").is_file()]
for path in [*halves, *site.glob("~*")]:  # ~name: what pip was about to delete when it was stopped
    shutil.rmtree(path) if path.is_dir() else path.unlink()
for info in halves:
    print("querybridge: finishing", info.name.split("-")[0], "which was half installed")' >&2 ||
        die "can't clean up $QB_VENV (Python's message stands above): delete the folder and run this again"
}

# Turns the causes that a user can do something about into one line and exits; returns on any other.
explain() {
    case "$1" in
        *"No space left on device"* | *"Errno 28]"* | *"Disk quota exceeded"*)
            die "no space left on the disk: .venv takes about 2 GB (8 GB with CUDA) in $QB_ROOT, and pip as much for a while in ${TMPDIR:-/tmp}; free some and run this again" ;;
        *"NewConnectionError"* | *"NameResolutionError"* | *"Max retries exceeded"* | *"Failed to establish a new connection"* | \
            *"ConnectTimeout"* | *"Read timed out"* | *"ProxyError"* | *"SSLError"* | *"CERTIFICATE_VERIFY_FAILED"* | *"Network is unreachable"*)
            die "pip can't reach $(index_in_words): check the network, or the proxy or mirror in pip's settings, and run this again (it goes on where it stopped)" ;;
        *"No matching distribution found for torch"[=\<\>]*)
            die "$(index_in_words) has no $(torch_pin) for Python $(python_version "$QB_VENV/bin/python") on $(uname -s) $(uname -m):" \
                "QUERYBRIDGE_TORCH_INDEX can name one that has (there is none for Macs with an Intel processor)" ;;
        *"(from versions: none)"*)
            die "pip gets nothing from $(index_in_words): check the network, or the proxy or mirror in pip's settings, and run this again" ;;
    esac
}

index_in_words() { printf "%s" "its package index${QUERYBRIDGE_TORCH_INDEX:+ or the one in QUERYBRIDGE_TORCH_INDEX}"; }

torch_pin() { sed -n 's/^\(torch==[^ #]*\).*/\1/p' "$QB_ROOT/constraints.txt"; }

# pip_install ARGUMENTS…: on a terminal pip's progress is shown; what else it says is kept, and is said in one line
# where the cause is known.
pip_install() {
    local said status=0
    set -- -I -m pip install --no-input --disable-pip-version-check "$@"
    if [ -t 2 ]; then
        { said="$(cd "$QB_ROOT" && PIP_USER=0 "$QB_VENV/bin/python" "$@" 2>&1 >&3)"; } 3>&2 || status=$?
    else
        said="$(cd "$QB_ROOT" && PIP_USER=0 "$QB_VENV/bin/python" "$@" --progress-bar off 2>&1)" || status=$?
    fi
    [ "$status" -ne 0 ] || return 0
    explain "$said"
    printf '%s\n' "$said" | grep -v -e '^Collecting ' -e '^ *Using cached ' -e '^ *Downloading ' -e '^Looking in ' >&2
    die "pip could not install the libraries (its messages stand above)"
}

# torch alone comes from the index that the user names, then what torch itself needs, from there or from pip's own.
install_torch_from_index() {
    local how=--force-reinstall # the torch of another index has the same version, which pip would leave as it is
    ! torch_is_as_asked || how=--upgrade
    say "installing $(torch_pin) from the index in QUERYBRIDGE_TORCH_INDEX"
    pip_install --index-url "$QUERYBRIDGE_TORCH_INDEX" --no-deps "$how" "$(torch_pin)"
    pip_install --extra-index-url "$QUERYBRIDGE_TORCH_INDEX" "$(torch_pin)"
    torch_index_text >"$QB_VENV/.querybridge-torch"
}

hint_at_cpu_build() {
    [ "$(uname -s)" = Linux ] || return 0
    ! command -v nvidia-smi >/dev/null 2>&1 || return 0
    ! "$QB_VENV/bin/python" -I -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' || return 0
    say "no NVIDIA GPU is seen: should pip fetch CUDA libraries (several GB), QUERYBRIDGE_TORCH_INDEX can name an index of CPU builds (README)"
}

install_libraries() {
    local level target=.
    [ "$1" = run ] || target=".[$1]"
    rm -f "$QB_VENV/.querybridge-run" "$QB_VENV/.querybridge-test"
    drop_half_installed
    if [ -n "${QUERYBRIDGE_TORCH_INDEX:-}" ]; then install_torch_from_index; else hint_at_cpu_build; fi
    say "installing the libraries into .venv (minutes, the first time)"
    pip_install --constraint constraints.txt --editable "$target"
    for level in run "$1"; do
        # Written aside and renamed, so that a stamp is whole or not there.
        if ! { stamp_text >"$QB_VENV/.querybridge-new" && mv "$QB_VENV/.querybridge-new" "$QB_VENV/.querybridge-$level"; }; then
            die "can't write in $QB_VENV: the disk may be full"
        fi
    done
}

# prepare_environment run|test: returns once .venv holds what LEVEL needs; otherwise says why in a line and exits with 2.
prepare_environment() {
    environment_ready "$1" && return 0
    case "$(uname -s)" in
        MINGW* | MSYS* | CYGWIN*) die "on Windows this script runs under WSL: install it (wsl --install) and run this there" ;;
    esac
    # pip turns Ctrl-C into an ordinary failure; this keeps it what it is.
    trap 'say "stopped; run it again and it goes on from here"; exit 130' INT
    find_python
    lock_venv
    if ! environment_ready "$1"; then # another run may have done it while this one waited
        repair_venv
        install_libraries "$1"
        say "the environment is ready"
    fi
    exec 9>&-
    trap - INT
}

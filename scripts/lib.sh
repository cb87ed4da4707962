# Sourced by the other scripts: what they install, and how they say so.
#
# Nothing here asks a question or reads stdin, and every step that is already done is skipped, so a
# script can be run again at any time and from any folder.
# ORION_VENV   the virtual environment (default: .venv in the project's root)
# ORION_PYTHON the Python to make it with (default: the first of 3.11 or later that is found)

set -euo pipefail

ORION_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ORION_VENV=${ORION_VENV:-$ORION_ROOT/.venv}
ORION_SCRIPT=$(basename "$0")
# Debian keeps losetup, mkfs and tgtd where an ordinary user's PATH does not look.
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

say() { printf '%s: %s\n' "$ORION_SCRIPT" "$*"; }
die() { printf '%s: %s\n' "$ORION_SCRIPT" "$*" >&2; exit 1; }

# step WHAT COMMAND...: run quietly; when it fails show its output and name the step.
step() {
    local what=$1 log
    shift
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        die "$what failed (command: $*)"
    fi
    rm -f "$log"
}

# -- Debian packages ------------------------------------------------------------------------------

installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# need_packages PACKAGE...: install those that are missing; one line for each.
need_packages() {
    local missing=() package
    if ! command -v dpkg-query >/dev/null; then
        say "not a Debian system: make sure that you have what Debian calls: $*"
        return
    fi
    for package in "$@"; do
        installed "$package" || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ]; then
        die "missing Debian packages; as root: apt-get update && apt-get install --no-install-recommends ${missing[*]}"
    fi
    if [ -z "${ORION_APT_UPDATED:-}" ]; then
        say "refreshing the package lists (apt-get update)"
        step "apt-get update" apt-get update -qq
        ORION_APT_UPDATED=yes
    fi
    for package in "${missing[@]}"; do
        say "installing the Debian package $package"
    done
    step "installing Debian packages" env DEBIAN_FRONTEND=noninteractive apt-get install \
        -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 "${missing[@]}"
}

# -- Python ---------------------------------------------------------------------------------------

python_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

python_can_make_venvs() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

# The header files that building pyfuse3 needs.
python_has_headers() {
    local folder
    folder=$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))') &&
        [ -e "$folder/Python.h" ]
}

find_python() {
    local candidate
    for candidate in ${ORION_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3}; do
        if command -v "$candidate" >/dev/null && python_is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
}

# Sets PYTHON; installs Debian's when there is none, and what Debian splits off from it.
ensure_python() {
    PYTHON=$(find_python)
    if [ -z "$PYTHON" ]; then
        [ -z "${ORION_PYTHON:-}" ] || die "ORION_PYTHON=$ORION_PYTHON is not Python 3.11 or later"
        need_packages python3 python3-venv python3-dev
        PYTHON=$(find_python)
        [ -n "$PYTHON" ] || die "no Python 3.11 or later here (Debian 12 and later have one)"
    fi
    local version
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    python_can_make_venvs "$PYTHON" || need_packages "python$version-venv"
    python_can_make_venvs "$PYTHON" || die "$PYTHON can't make virtual environments (no ensurepip)"
    python_has_headers "$PYTHON" || need_packages "python$version-dev"
    python_has_headers "$PYTHON" || die "$PYTHON has no header files (Python.h) to build pyfuse3 with"
}

# ensure_venv [EXTRA...]: the package, editable, with these extras, in $ORION_VENV. The stamp file
# says for which pyproject.toml and with which extras it was last installed.
ensure_venv() {
    local python=$ORION_VENV/bin/python stamp=$ORION_VENV/.orion-installed
    local wanted before="" present="" extra extras missing=no
    wanted="$ORION_ROOT $(cksum <"$ORION_ROOT/pyproject.toml")"
    if [ -r "$stamp" ] && [ -x "$ORION_VENV/bin/orion-iscsifs" ] && "$python" -c '' 2>/dev/null; then
        { read -r before && read -r present; } <"$stamp" || true
    fi
    extras=$present
    for extra in "$@"; do
        case " $extras " in
        *" $extra "*) ;;
        *) extras="${extras:+$extras }$extra" missing=yes ;;
        esac
    done
    if [ "$before" = "$wanted" ] && [ "$missing" = no ]; then
        return
    fi
    # Only now: a finished environment needs no compiler and no second Python.
    need_packages gcc pkg-config libfuse3-dev
    ensure_python
    if ! { [ -x "$python" ] && "$python" -m pip --version; } >/dev/null 2>&1; then
        say "making the virtual environment $ORION_VENV with $("$PYTHON" -V)"
        step "making the virtual environment" "$PYTHON" -m venv --clear "$ORION_VENV"
    fi
    say "installing orion-iscsifs${extras:+ and its extras $extras} into $ORION_VENV"
    step "installing the Python package" "$python" -m pip install --quiet \
        --disable-pip-version-check --editable "$ORION_ROOT${extras:+[${extras// /,}]}"
    printf '%s\n%s\n' "$wanted" "$extras" >"$stamp"
}

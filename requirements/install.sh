#!/bin/sh
# Makes .venv ready: `sh requirements/install.sh base` or `sh requirements/install.sh dev`.
#
# It looks for a Python that fits, makes the environment, and installs the hashed requirements. Each finished install
# leaves a copy of its requirements inside .venv, so that nothing is done again until that file changes.
# POSIX sh, since a plain macOS or Debian has nothing else for certain.

set -eu
cd "$(dirname "$0")/.."

wanted="Python 3.11, 3.12, 3.13 or 3.14"
set_name=$1
requirements="requirements/$set_name.txt"
stamp=".venv/.installed-$set_name.txt"

# Prints on one line the version, how many tenths of a microsecond some work took, and each standard module that we need and that is missing.
probe='
import sys, time
clock = getattr(time, "process_time", time.time)
class Thing(object):
    def __init__(self, number):
        self.number = number
    def plus(self, other):
        return self.number + other
def work():
    began = clock()
    for number in range(5000):
        Thing(number).plus(number)
    return int(1e7 * (clock() - began))
words = ["%d.%d" % sys.version_info[:2], str(min(work() for _ in range(40)))]
for name in ("venv", "ensurepip", "ssl", "sqlite3"):
    try:
        __import__(name)
    except ImportError:
        words.append(name)
print(" ".join(words))
'

fits() {
    case $1 in 3.11 | 3.12 | 3.13 | 3.14) return 0 ;; *) return 1 ;; esac
}

refuse() {
    echo "$1" >&2
    exit 1
}

# All places in PATH where these names lie, the newest version first. A shim in front of a real interpreter may know no
# such version, so that the one behind it counts too.
candidates() {
    if [ -n "${PYTHON:-}" ]; then
        case $PYTHON in
            /*) echo "$PYTHON" ;;
            */*) echo "$PWD/$PYTHON" ;;
            *) command -v "$PYTHON" || echo "$PYTHON" ;;
        esac
        return
    fi
    for name in python3.14 python3.13 python3.12 python3.11 python3; do
        echo "$PATH" | tr ':' '\n' | while read -r folder; do
            [ ! -x "$folder/$name" ] || echo "$folder/$name"
        done
    done
}

# What the probe prints; fails where nothing runs. In `/`, because the version file of a checkout steers such shims too.
ask() {
    (cd / && "$1" -c "$probe") 2>/dev/null
}

# The time in what the probe printed.
took() {
    rest=${1#* }
    echo "${rest%% *}"
}

# Why this Python does not do, in one sentence; nothing when it does. Arguments: its path, what the probe printed.
objection() {
    version=${2%% *}
    missing=${2#"$version" "$(took "$2")"}
    if ! fits "$version"; then
        case $version in
            2.* | 3.? | 3.10) echo "Found Python $version ($1): too old. Sluice needs $wanted." ;;
            *) echo "Found Python $version ($1): not supported yet. Sluice needs $wanted." ;;
        esac
        return
    fi
    case "$missing " in
        " ") ;;
        *" venv "* | *" ensurepip "*) echo "Python $version ($1) cannot make virtual environments: apt install python3-venv (or python$version-venv)." ;;
        *) echo "Python $version ($1) was built without$missing, which Sluice needs. Install another $wanted." ;;
    esac
}

# Sets `python`, or ends with one line that says what is missing. Each candidate is really run: builds of one version differ by
# a factor of two (one that somebody compiled without profiles, and one of a distribution), and so does what a core can serve. A
# later one is taken when it is clearly faster, by a fifth.
find_python() {
    python=
    least=0
    complaint="No Python was found. Sluice needs $wanted."
    if [ -n "${PYTHON:-}" ]; then
        complaint="PYTHON: '$PYTHON' cannot be run. Sluice needs $wanted."
    fi
    # One path a line: a folder's name may hold spaces.
    IFS='
'
    for candidate in $(candidates); do
        found=$(ask "$candidate") || continue
        problem=$(objection "$candidate" "$found")
        if [ -z "$problem" ]; then
            if [ -z "$python" ] || [ $(($(took "$found") * 5)) -lt $((least * 4)) ]; then
                python=$candidate
                least=$(took "$found")
            fi
            continue
        fi
        # A Python of the right version that lacks a module is the nearer miss, and the one to name.
        case $complaint in "Python "*) ;; *) complaint=$problem ;; esac
    done
    unset IFS
    [ -n "$python" ] || refuse "$complaint"
}

# True for an environment that still runs: its Python may have been removed or upgraded since.
environment_works() {
    [ -x .venv/bin/python ] && fits "$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"
}

if environment_works; then
    if cmp -s "$requirements" "$stamp"; then
        exit 0
    fi
else
    rm -f .venv/.installed-*
fi

started=$(date +%s)
if ! environment_works || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    find_python
    echo "Making .venv with $python"
    here=$PWD
    (cd / && "$python" -m venv --clear "$here/.venv") || refuse "The virtual environment could not be made: see the lines above."
fi
echo "Installing $requirements into .venv (the first time takes a minute or so) ..."
.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r "$requirements" ||
    refuse "The requirements could not be installed: see the lines above. Nothing is lost; the same command tries again."
cp "$requirements" "$stamp"
echo "Installed in $(($(date +%s) - started)) s."

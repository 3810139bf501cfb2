#!/bin/sh
# Make the project's virtual environment, or bring it up to date: venv.sh PYTHON VENV CONSTRAINTS
#
# Only a finished install leaves the stamp VENV/.installed. A running install keeps its process id in VENV/.installing.
# If that process is gone, the last install was cut short, and the script removes its environment.
set -eu

python=$1 venv=$2 constraints=$3
unfinished=$venv/.installing

fail() {
  echo "error: $*" >&2
  exit 1
}

if [ -e "$unfinished" ]; then
  owner=$(cat "$unfinished")
  if [ -n "$owner" ] && kill -0 "$owner" 2>/dev/null; then
    fail "another install into $venv is running (process $owner); try again when it is done"
  fi
  echo "Removing the unfinished $venv"
  rm -rf "$venv"
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  version=$("$python" --version 2>&1) || version="not there"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 ||
    fail "Python 3.11 or newer is needed; $python is $version. Name another one: make PYTHON=python3.12"
  "$venv/bin/python" -c '' 2>/dev/null || rm -rf "$venv" # its Python is gone
  mkdir -p "$venv"
  echo $$ >"$unfinished"
  "$python" -m venv "$venv" >/dev/null 2>&1 || {
    rm -rf "$venv"
    fail "$python cannot make a virtual environment with pip (on Debian and Ubuntu: apt install python3-venv)"
  }
fi

echo $$ >"$unfinished"
trap 'exit 130' INT TERM # leaves $unfinished behind; after an error pip has cleaned up, so it is removed below
echo "Installing into $venv (some minutes the first time)"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check -c "$constraints" -e '.[dev]' || {
  rm -f "$unfinished"
  fail "the install failed (see above)"
}
rm -f "$unfinished"
touch "$venv/.installed"

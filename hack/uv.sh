#!/usr/bin/env bash
# Prints the path of uv; installs it into the cache where there is none.
set -euo pipefail
if command -v uv >/dev/null && uv --version >/dev/null 2>&1; then
  command -v uv
  exit
fi
home="${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/qlora-operator}/uv"
if [ ! -x "$home/bin/uv" ]; then
  python3 -m venv "$home" >&2
  "$home/bin/pip" install --quiet "uv>=0.11" >&2
fi
echo "$home/bin/uv"

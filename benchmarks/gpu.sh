#!/usr/bin/env bash
# One command for a machine with an NVIDIA card: build, test, check with compute-sanitizer, tune and time everything, what
# matters most first, in 9 minutes and without network. Called again, it goes on where it ended.
#
#   benchmarks/gpu.sh [OPTIONS] [WHEELS]
#
#   WHEELS      a folder of wheels for the Python packages that the machine lacks
#   --wheels    print the command that downloads them, on a machine with network
#   --dry-run   check every stage on a machine without a card
#   --help      the other options: --out, --fresh, --retry, --seconds, --budget
#
# Needs Python with torch >= 2.10 built for CUDA (PYTHON=... names another than python3), and a CUDA toolkit (CUDA_HOME,
# or nvcc on PATH). Everything but the results stays under build/gpu of this tree; the rest is
# layersync_kernels/bench/card.
set -euo pipefail

wheels="" options=() before=""
for argument; do
  case "$before:$argument" in
    --out:* | --seconds:*) options+=("$argument") ;;
    *:--wheels) exec "${PYTHON:-python3}" "$(dirname "$0")/../layersync_kernels/bench/card/packages.py" wheels ;;
    *:-*) options+=("$argument") ;;
    *) [ -d "$argument" ] || { echo "gpu.sh: $argument is not a folder of wheels (see --help)" >&2; exit 2; }
      wheels="$(cd "$argument" && pwd)" ;;
  esac
  before="$argument"
done

root="$(cd "$(dirname "$0")/.." && pwd)" python="${PYTHON:-python3}"
command -v "$python" >/dev/null || { echo "gpu.sh: no $python here; name another by PYTHON=..." >&2; exit 2; }
export PYTHONPATH="$root:$root/build/gpu/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1

read -ra missing <<<"$("$python" "$root/layersync_kernels/bench/card/packages.py" missing)"
if [ ${#missing[@]} -gt 0 ]; then
  [ -n "$wheels" ] || { echo "gpu.sh: missing: ${missing[*]}; give a folder with their wheels (see --wheels)" >&2; exit 2; }
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --find-links "$wheels" \
    --target "$root/build/gpu/site" "${missing[@]}" || exit 2
fi
"$python" -c 'import torch' || { echo "gpu.sh: $python has no torch; name another by PYTHON=..." >&2; exit 2; }
exec "$python" -m layersync_kernels.bench.card ${options[@]+"${options[@]}"}

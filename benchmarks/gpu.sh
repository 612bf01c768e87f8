#!/usr/bin/env bash
# One command for a machine with an NVIDIA card: build, test, check with compute-sanitizer, benchmark; under 9 minutes,
# no network. What matters most comes first, and results are written as they come.
#
#   benchmarks/gpu.sh [--dry-run] [--out DIR] [WHEELS]
#
#   --dry-run  check every stage on a machine without a card: tools, files and commands, and run what a CPU can run
#   --out DIR  where results go (default: $OUT, else benchmarks/results/<card>): results.jsonl, environment.txt, log.txt
#   WHEELS     folder of wheels for Python packages that the machine lacks (rich, tyro, pybind11, ninja, pytest, ...)
#
# Needs Python with torch >= 2.10 built for CUDA, and a CUDA toolkit (CUDA_HOME, or nvcc on PATH). Everything but the
# results stays under build/gpu of this tree.
set -uo pipefail

dry_run=0 wheels="" out="${OUT:-}"
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=1 ;;
    --out) out="${2:?--out needs a folder}" && shift ;;
    -h | --help) sed -n '2,14s/^# \{0,1\}//p' "$0" && exit 0 ;;
    -*) echo "gpu.sh: unknown option $1 (see --help)" >&2 && exit 2 ;;
    *) wheels="$1" ;;
  esac
  shift
done
if [ -n "$wheels" ]; then
  [ -d "$wheels" ] || { echo "gpu.sh: $wheels is not a folder of wheels" >&2; exit 2; }
  wheels="$(cd "$wheels" && pwd)"
fi
[ -z "$out" ] || { mkdir -p "$out" && out="$(cd "$out" && pwd)"; } || exit 2

cd "$(dirname "$0")/.." || exit 2
root="$PWD" work="$PWD/build/gpu" python="${PYTHON:-python3}" started=$SECONDS failed=()
readonly budget=525 # seconds in all
if [ $dry_run = 1 ]; then
  card="dry-run"
  out="${out:-$work/dry-run}"
else
  card="$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr -c 'A-Za-z0-9\n' '-')"
  [ -n "$card" ] || { echo "gpu.sh: nvidia-smi finds no card; --dry-run checks this script without one" >&2; exit 2; }
  out="${out:-$root/benchmarks/results/$card}"
fi
mkdir -p "$out" "$work"
results="$out/results.jsonl" environment="$out/environment.txt" log="$out/log.txt"
: >"$results" && : >"$environment" && : >"$log"

export PYTHONPATH="$root:$work/site" PYTHONDONTWRITEBYTECODE=1 TRITON_CACHE_DIR="$work/triton" \
  TORCHINDUCTOR_CACHE_DIR="$work/inductor" PIP_DISABLE_PIP_VERSION_CHECK=1 COLUMNS=160
unset TRITON_INTERPRET

# stage NAME SECONDS COMMAND...: runs it with its output in the log, within its limit and what is left of the budget.
stage() {
  local name="$1" limit="$2" left=$((budget - (SECONDS - started))) begin=$SECONDS code
  shift 2
  [ "$limit" -le "$left" ] || limit="$left"
  if [ "$limit" -lt 5 ]; then
    echo "$name: skipped, the time is up" | tee -a "$environment"
    failed+=("$name")
    return 1
  fi
  printf '\n== %s (at most %s s): %s\n' "$name" "$limit" "$*" | tee -a "$log"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  case $code in
    0) echo "$name: passed in $((SECONDS - begin)) s" | tee -a "$environment" ;;
    124 | 137) echo "$name: stopped after $limit s" | tee -a "$environment" ;;
    *) echo "$name: failed with status $code after $((SECONDS - begin)) s" | tee -a "$environment" ;;
  esac
  [ "$code" = 0 ] || failed+=("$name")
  return "$code"
}

# planned NAME COMMAND...: what a dry run prints of a stage that needs a card.
planned() { printf '\n== %s, with a card: %s\n' "$1" "${*:2}" | tee -a "$log"; }

describe() {
  date -u '+%Y-%m-%dT%H:%M:%SZ'
  echo "card: $card"
  nvidia-smi --query-gpu=driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit --format=csv 2>/dev/null
  nvidia-smi -q -d CLOCK,POWER 2>/dev/null | grep -E 'Graphics|SM |Memory|Current Power Limit' | head -n 12
  "$python" -c 'import platform, sys; print("python", sys.version.split()[0], platform.platform())'
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  "$python" -c 'import triton; print("triton", triton.__version__)'
  find_tool nvcc >/dev/null && "$(find_tool nvcc)" --version | tail -n 2
  git rev-parse HEAD 2>/dev/null | sed 's/^/commit /'
  return 0
}

# find_tool NAME: from the toolkit that CUDA_HOME names, the usual place, or PATH.
find_tool() {
  local folder
  for folder in "${CUDA_HOME:-}/bin" /usr/local/cuda/bin; do
    [ -x "$folder/$1" ] && echo "$folder/$1" && return 0
  done
  command -v "$1"
}

# Packages that are missing come from the wheels, into build/gpu/site.
dependencies() {
  local missing
  missing="$("$python" - <<'PYTHON'
from importlib.util import find_spec
names = "numpy", "rich", "tyro", "setuptools", "ninja", "pybind11", "pytest"
print(*(name for name in names if find_spec(name) is None))
PYTHON
)" || return 1
  [ -z "$missing" ] && return 0
  [ -n "$wheels" ] || { echo "missing: $missing; give a folder with their wheels as argument"; return 1; }
  # shellcheck disable=SC2086
  "$python" -m pip install --quiet --no-index --find-links "$wheels" --target "$work/site" $missing
}

# From a copy without pyproject.toml, so that an old setuptools will do; for this card alone, which is quickest.
build() {
  rm -rf "$work/tree" && mkdir -p "$work/tree" && cp -r setup.py build_backend.py csrc "$work/tree" || return 1
  (
    cd "$work/tree" || exit 1
    [ "$dry_run" = 1 ] || TORCH_CUDA_ARCH_LIST="$("$python" -c \
      'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')" || exit 1
    export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" LAYERSYNC_BUILD=cuda
    "$python" setup.py -q build_ext --build-lib lib
  ) || return 1
  ls -l "$work"/tree/lib/layersync_kernels/*.so || return 1
  [ "$dry_run" = 1 ] || cp "$work"/tree/lib/layersync_kernels/*.so layersync_kernels/
}

# Every kernel on sizes that reach each of its paths; run under compute-sanitizer.
readonly exercise='import sys, torch
from layersync_kernels import functional, layersync_loss
backends, device = sys.argv[1].split(","), sys.argv[2]
torch.manual_seed(0)
for backend in backends:
    for width in (1, 77, 384, 1152, 5000):
        for dtypes in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)):
            student, teacher = (torch.randn(3, 11, width, device=device).to(dtype) for dtype in dtypes)
            student[0, 0], teacher[0, 1] = 0, 1e4
            mask = torch.rand(3, 11, device=device) > 0.3
            for reduction in ("mean", "none"):
                leaves = [x.clone()[:, 1:].requires_grad_() for x in (student, teacher)]
                options = {"reduction": reduction, "teacher_grad": True, "backend": backend}
                loss = layersync_loss(*leaves, mask=mask[:, 1:], **options)
                gradients = torch.autograd.grad(loss.sum(), leaves)
                assert all(x.isfinite().all() for x in (loss, *gradients)), (backend, width, dtypes)
    for width in (1, 77, 384, 1152, 2100, 5000, 9000):
        for stream, half in ((torch.float32, torch.bfloat16), (torch.float16, torch.float16), (torch.float32,) * 2):
            def draw(*shape, dtype=half):
                return torch.randn(*shape, width, device=device).to(dtype).requires_grad_()
            x, s = draw(3, 12, dtype=stream), draw(3, 12, dtype=stream)
            for shape in ((), (3,), (3, 12)):
                branch, gate, shift, scale = draw(3, 12), draw(*shape), draw(*shape), draw(*shape)
                options = {"norm": "rms" if shape else "layer", "backend": backend}
                student = functional.aligned_residual_norm(s, branch, gate, shift, scale, tap=True, **options)
                teacher = functional.aligned_residual_norm(x, branch, gate, shift, scale, student=student.tap, **options)
                alone = functional.modulated_layer_norm(x, shift, scale, backend=backend)
                total = sum(t.float().sum() for t in (*teacher[:3], student.residual, student.normed, alone))
                gradients = torch.autograd.grad(total, (x, s, branch, gate, shift, scale))
                assert all(g.isfinite().all() for g in gradients), (backend, width, stream, half, shape)
            weight = draw(40)
            activation = functional.linear_gelu(draw(12), weight, draw().new_zeros(40), backend=backend)
            mlp = functional.gelu_mlp(draw(12), weight, None, draw(40).t(), None, backend=backend)
            torch.autograd.grad(activation.float().sum() + mlp.float().sum(), weight)
    for width in (1, 77, 384):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            tokens, weight = (torch.randn(*shape, width, device=device).to(dtype) for shape in ((3, 300), (40,)))
            tokens[0, 0] = 0
            hidden, projection = tokens.clone().requires_grad_(), weight.clone().requires_grad_()
            teacher = functional.spatial_norm(tokens[:, 1:] + 1, backend=backend)
            total = functional.gram_alignment_loss(hidden[:, 1:], teacher, margin=0.1, backend=backend)
            target = torch.randn(3, 300, 40, device=device).to(dtype)
            total = total + functional.projected_alignment_loss(hidden, projection, None, target, backend=backend)
            gradients = torch.autograd.grad(total, (hidden, projection))
            assert all(x.isfinite().all() for x in (total, *gradients)), (backend, width, dtype)
print("exercised", *backends, "on", device)
'

sanitize() { # TOOL
  local sanitizer
  sanitizer="$(find_tool compute-sanitizer)" || { echo "compute-sanitizer is not installed"; return 1; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 9 "$python" "$work/exercise.py" cuda cuda
}

pytest=("$python" -m pytest -o addopts=-ra -q -p no:cacheprovider --continue-on-collection-errors)
bench=("$python" -m layersync_kernels.bench)
export -f describe find_tool dependencies build sanitize
export card python wheels work root dry_run

timeout 30 bash -c 'describe' 2>&1 | tee -a "$environment" "$log"
"$python" -c "import torch; raise SystemExit(not ($dry_run or torch.cuda.is_available()))" ||
  { echo "gpu.sh: $python has no torch that sees the card; name another by PYTHON=..." >&2; exit 2; }
stage dependencies 60 bash -c 'dependencies'
printf '%s' "$exercise" >"$work/exercise.py"

if [ $dry_run = 1 ]; then
  stage "script syntax" 10 bash -n benchmarks/gpu.sh
  for tool in nvcc compute-sanitizer nvidia-smi; do
    find_tool "$tool" >>"$log" || echo "note: no $tool here; the real run needs it" | tee -a "$environment"
  done
  if find_tool nvcc >/dev/null; then stage build 300 bash -c 'build'; else planned build "setup.py build_ext"; fi
  stage "GPU tests are found" 60 "${pytest[@]}" --collect-only -m gpu tests
  planned "GPU tests" "${pytest[*]} -m gpu tests"
  stage "exercise on the CPU" 60 "$python" "$work/exercise.py" reference cpu
  planned "memcheck, racecheck" "compute-sanitizer --tool TOOL $python $work/exercise.py cuda cuda"
  planned "headline benchmark" "${bench[*]} ops --ops gated_residual_norm cosine_alignment --size 65536 1152"
  stage "benchmark suite" 120 "${bench[@]}" ops --quick --device cpu --json "$results"
  stage "trainer benchmark" 120 "${bench[@]}" trainer --quick --device cpu --json "$results"
else
  if ! stage build 150 bash -c 'build'; then echo "gpu.sh: going on with Triton alone" | tee -a "$environment"; fi
  stage "GPU tests" 100 "${pytest[@]}" -m gpu tests
  stage "headline benchmark" 100 "${bench[@]}" ops --ops gated_residual_norm cosine_alignment --size 65536 1152 \
    --json "$results"
  stage "op tests" 90 "${pytest[@]}" tests/ops -k "triton or cuda"
  stage memcheck 45 bash -c 'sanitize memcheck'
  stage racecheck 45 bash -c 'sanitize racecheck'
  stage "trainer benchmark" 200 "${bench[@]}" trainer --json "$results"
  for epilogues in 0 1; do
    stage "gelu_mlp, cuBLASLt epilogues $epilogues" 40 env LAYERSYNC_CUBLASLT=$epilogues "${bench[@]}" ops \
      --ops gelu_mlp --json "$out/gelu_mlp_cublaslt_$epilogues.jsonl"
  done
  stage "benchmark suite" 200 "${bench[@]}" ops --json "$results"
fi

rm -rf "$work/tree" "$work/exercise.py"
printf '\n%s in %s s; results in %s\n' "${card}" "$((SECONDS - started))" "$out"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'not passed: %s\n' "${failed[*]}" | tee -a "$environment"
  exit 1
fi

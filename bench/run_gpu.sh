#!/usr/bin/env bash
# Correctness, then speed, on a machine with a GPU and PyTorch, in three calls of at most 9 minutes, each useful alone.
#
#   bench/run_gpu.sh RESULTS_DIR CALL [--device DEVICE] [--archive FILE] [STEP ...]
#
# CALL 1: is it right, how fast is it, what bounds it (bfloat16)
#   environment  check  dense  profile  base  chunks  sparse  peaks  l2  hopper  hopper_film  fp8
# CALL 2: everything else that is promised
#   correctness  compiled  compiled_base  large  training  operations
# CALL 3: what takes longest
#   memcheck  bits  racecheck  synccheck  kernels  check_compiled  tune
#
# A step gets the seconds that stand beside it below, or what is left of the call, but never less than 30: then it is left
# out. It writes NAME.log and, after every case, NAME.json into RESULTS_DIR; after each step all of RESULTS_DIR is
# packed anew into FILE (RESULTS_DIR/callN.tar.gz), so that whatever ends the call, one file holds what there is. What
# failed in correctness.json or check.json gets no time, in later calls with the same directory either.
#
# Nothing is installed or fetched. `make gpu-extension` makes, on another machine, the extension that `hopper`,
# `hopper_film`, `fp8`, `bits`, `racecheck`, `synccheck`, `kernels` and `check_compiled` need: build/gpu/_C.*.so.
# VITUP_BENCH_DEVICE names the device too; on "cpu" sizes are tiny, to try the script itself. PYTHON names the interpreter
# (python3).
# Exit code: 0 if all steps passed, 1 if one did not, 2 for a wrong argument.
set -uo pipefail

total_seconds=${VITUP_BENCH_SECONDS:-530}
least_seconds=30
device=${VITUP_BENCH_DEVICE:-cuda}
python=${PYTHON:-python3}
results=
call=
archive=
chosen=()
declare -A steps=(
  [1]="environment:30 check:75 dense:55 profile:40 base:45 chunks:45 sparse:40 peaks:30 l2:40 hopper:50 hopper_film:30 fp8:30"
  [2]="correctness:170 compiled:110 compiled_base:90 large:70 training:50 operations:40"
  [3]="memcheck:100 bits:40 racecheck:40 synccheck:40 kernels:40 check_compiled:50 tune:220"
)

usage() {
  echo "$1 (usage: bench/run_gpu.sh RESULTS_DIR CALL [--device DEVICE] [--archive FILE] [STEP ...], CALL: 1, 2 or 3)" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --device | --archive)
      (($# > 1)) || usage "$1 needs a value"
      [[ $1 == --device ]] && device=$2 || archive=$2
      shift
      ;;
    -*) usage "unknown option $1" ;;
    *)
      if [[ -z $results ]]; then
        results=$1
      elif [[ -z $call ]]; then
        call=$1
        [[ -n ${steps[$call]:-} ]] || usage "no call $call"
      elif [[ " ${steps[$call]}" == *" $1:"* ]]; then
        chosen+=("$1")
      else
        usage "call $call has no step $1"
      fi
      ;;
  esac
  shift
done
[[ -n $results ]] || usage "no directory for the results"
[[ -n $call ]] || usage "no call"
command -v "$python" >/dev/null || usage "no interpreter $python"
python=$(command -v "$python")
mkdir -p "$results" || exit 2
results=$(cd "$results" && pwd)
archive=${archive:-$results/call$call.tar.gz}
mkdir -p "$(dirname "$archive")" || exit 2
archive=$(cd "$(dirname "$archive")" && pwd)/$(basename "$archive")
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The package is not installed: links put its folders where an installation would.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/vitup_fast"
ln -s "$repository"/vitup_fast/* "$scratch/vitup_fast/"
for room in kernels bench; do
  ln -sfn "$repository/$room" "$scratch/vitup_fast/$room"
done
# The extension that was made for this GPU takes the place of what the checkout may have built.
for built in "$repository"/build/gpu/_C.*.so; do
  [[ -f $built && $device != cpu* ]] || continue
  rm -f "$scratch"/vitup_fast/_C.*
  ln -s "$built" "$scratch/vitup_fast/"
done
cd "$scratch" || exit 2
export PYTHONPATH=$scratch${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
export PATH=$PATH:/usr/local/cuda/bin

patience=1
if [[ $device == cpu* ]]; then
  patience=20 # nobody lends a CPU, which may be busy
  splus=tiny base=tiny impl=torch dtype=float32 side=12 large=(16 20) chunk_sizes=(40 80) sparse=(20) trained=30 queries=64
  rounds=(--repeats 1) quick=(--quick --operation norm_linear golden --dtype float32) compile=(--no-compile)
else
  splus=dinov3_splus base=dinov3_base impl=triton dtype=bfloat16 side=448 large=(896 1024 2048)
  chunk_sizes=(8448 33792) sparse=(100 1000 4096) trained=75000 queries=16896
  rounds=(--repeats 15 --seconds 3) quick=() compile=()
fi

failed=()
seconds=0
# run NAME COMMAND...: a step's command within its time; its output goes to NAME.log.
run() {
  local name=$1 begin=$SECONDS code verdict
  shift
  timeout --kill-after=5 "$seconds" "$@" >"$results/$name.log" 2>&1 </dev/null
  code=$?
  case $code in
    0) verdict=ok ;;
    124 | 137) verdict="FAIL (over $seconds s)" ;;
    *) verdict="FAIL (exit code $code)" ;;
  esac
  echo "$name: $verdict, $((SECONDS - begin)) s"
  if ((code)); then
    failed+=("$name")
    tail -n 4 "$results/$name.log" | cut -c -200 | sed 's/^/    /'
  fi
}

bench() { # NAME MODULE ARGUMENTS...
  local name=$1 module=$2
  shift 2
  run "$name" "$python" -m "vitup_fast.bench.$module" --device "$device" --json "$results/$name.json" "$@"
}

timed() { # the same, for what shall not be timed unless it is correct
  local known=() file
  for file in correctness check; do
    if [[ -f $results/$file.json && ${#known[@]} == 0 ]]; then known=(--correctness "$results/$file.json"); fi
  done
  bench "$@" --dtype "$dtype" "${rounds[@]}" "${known[@]}"
}

whole() { timed "$1" end_to_end --impl "$impl" --preset "${@:2}"; } # NAME PRESET ARGUMENTS...

needs_gpu() {
  [[ $device != cpu* ]] && return
  echo "$1: left out, it needs a GPU"
  return 1
}

needs_extension() {
  needs_gpu "$1" || return 1
  [[ -n $(compgen -G "$scratch/vitup_fast/_C.*") ]] && return
  echo "$1: left out, there is no extension (make gpu-extension)"
  return 1
}

sanitized() { # NAME TOOL IMPLEMENTATION OPERATION...
  local name=$1 tool=$2 implementation=$3
  shift 3
  # Without PyTorch's pool every tensor has an allocation of its own, whose bounds are checked.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$name" compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$python" -m vitup_fast.bench.correctness --device "$device" --quick --impl "$implementation" \
    --dtype bfloat16 --operation "$@" --json "$results/$name.json"
}

environment() {
  # shellcheck disable=SC2016 # the inner shell expands
  run environment bash -c '
    "$1" -m vitup_fast.cli info || exit 1
    uname -a
    nvidia-smi || true
    nvcc --version || true
    [[ $2 == cpu* ]] || "$1" -c "import torch; assert torch.cuda.is_available(), \"PyTorch sees no GPU\""
  ' environment "$python" "$device"
}
# What the network launches, at its size: first, for all times are void without it.
check() {
  if [[ $device == cpu* ]]; then
    bench check correctness --impl "$impl" "${quick[@]}"
  else
    bench check correctness --impl "$impl" --dtype "$dtype" --chunk
  fi
}
dense() { whole dense "$splus" --no-compile --dense "$side"; }
profile() { bench profile kernel_times --preset "$splus" --dtype "$dtype" --side "$side" --impl "$impl"; }
base() { whole base "$base" --no-compile --dense "$side"; }
chunks() { whole chunks "$splus" --no-compile --dense "$side" --chunks "${chunk_sizes[@]}"; }
sparse() { whole sparse "$splus" --no-compile --prepared --sparse "${sparse[@]}"; }
peaks() { bench peaks peaks --dtype "$dtype" --repeats "$([[ $device == cpu* ]] && echo 1 || echo 9)"; }
# What the L2 cache and the matrix units do in each kernel of a chunk.
l2() {
  needs_gpu l2 || return
  run l2 ncu --target-processes all --launch-skip 200 --launch-count 70 --csv --page raw \
    --metrics gpu__time_duration.sum,lts__t_bytes.sum.per_second,dram__bytes.sum.per_second,sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active \
    "$python" -m vitup_fast.bench.kernel_times --device "$device" --preset "$splus" --dtype "$dtype" --side 224 --impl "$impl"
}
# Never run before: last, so that what hangs costs nothing else.
hopper() {
  needs_extension hopper || return
  timed hopper residual_mlp --preset "$splus" "$base" --queries "$queries" --no-compile --impl triton cuda
}
hopper_film() {
  needs_extension hopper_film || return
  timed hopper_film film_mlp --preset "$splus" --queries "$queries" --no-compile --impl triton cuda
}

fp8() {
  needs_extension fp8 || return
  timed fp8 residual_mlp --preset "$splus" --queries "$queries" --no-compile --impl cuda cuda_fp8
}

correctness() { bench correctness correctness --impl "$impl" torch "${quick[@]}"; }
compiled() { whole compiled "$splus" "${compile[@]}" --dense "$side"; }
compiled_base() { whole compiled_base "$base" "${compile[@]}" --dense "$side"; }
large() { whole large "$splus" --no-compile --dense "${large[@]}"; }
training() { whole training "$splus" --no-compile --backward --sparse "$trained"; }
operations() { timed operations operations --impl "$impl" --preset "$splus" --queries "$queries" --no-compile; }

memcheck() {
  needs_gpu memcheck || return
  sanitized memcheck memcheck triton residual_mlp rope_cross_attention film_mlp film_mlp_table norm_linear network
}
bits() {
  needs_extension bits || return
  run bits "$python" -m pytest -p no:cacheprovider "$repository"/tests/test_cuda_kernels.py \
    "$repository"/tests/test_hopper_*.py -k "gpu or launches"
}
racecheck() { needs_extension racecheck && sanitized racecheck racecheck cuda bilinear_sample film_mlp film_mlp_table; }
# Only the kernels for Hopper meet at barriers of their own, and only at their widths.
synccheck() {
  needs_extension synccheck || return
  run synccheck compute-sanitizer --tool synccheck --error-exitcode 9 "$python" -m pytest -p no:cacheprovider \
    "$repository"/tests/test_hopper_*.py -k gpu
}
kernels() {
  needs_extension kernels || return
  timed kernels operations --impl triton cuda --preset "$splus" --queries "$queries" --no-compile
}
# The network with compiled kernels, at the size at which its MLPs are one kernel each.
check_compiled() {
  needs_extension check_compiled || return
  bench check_compiled correctness --impl cuda --dtype "$dtype" --chunk
}
tune() {
  needs_gpu tune || return
  run tune "$python" -m vitup_fast.bench.tune --device "$device" --dtype bfloat16 --preset "$splus" \
    --variants linear linear_rows attention linear_narrow linear_few_rows --output "$results/settings.json"
}

# One line per provider from the reports that are there, this call's or an earlier one's.
summary() {
  "$python" - "$results" <<'SUMMARY' | tee "$results/summary.txt"
import json, pathlib, sys

for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    content = json.loads(path.read_text())
    if isinstance(content, dict) and "checks" in content:
        bad = [c for c in content["checks"] if not c["passed"]]
        print(f"{path.stem}: {len(content['checks']) - len(bad)} of {len(content['checks'])} checks passed")
    if not isinstance(content, list):
        continue
    for report in (r for r in content if "rows" in r):
        goal = report["goal"] and report["goal"]["seconds"]
        figures = []
        for row in report["rows"]:
            time = row["failure"] or f"{1e3 * row['seconds']:.2f}"
            figures.append(f"{row['provider']} {time}")
        aim = f" (goal {1e3 * goal:.1f})" if goal else ""
        print(f"{report['title']} {report['dtype']} ms: {', '.join(figures)}{aim}")
SUMMARY
}

pack() {
  local list=("$results"/*.{log,json,txt,png})
  tar -czf "$archive.part" -C "$results" $(for file in "${list[@]}"; do [[ -f $file ]] && basename "$file"; done) &&
    mv "$archive.part" "$archive"
}

for entry in ${steps[$call]}; do
  name=${entry%:*}
  if ((${#chosen[@]})) && [[ " ${chosen[*]} " != *" $name "* ]]; then continue; fi
  seconds=$((patience * ${entry#*:}))
  left=$((patience * total_seconds - SECONDS))
  ((seconds > left)) && seconds=$left
  if ((seconds < least_seconds)); then
    echo "$name: left out, $left s are left"
    failed+=("$name")
    continue
  fi
  "$name"
  pack
done
echo
summary
pack
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all steps passed; results in $archive"

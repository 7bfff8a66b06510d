#!/usr/bin/env bash
# Correctness, then speed, of every implementation on a machine with a GPU and PyTorch; nothing is installed or fetched.
#
#   bench/run_gpu.sh RESULTS_DIR [--device DEVICE] [STAGE ...]
#
# Stages, by default all of them in this order, with their shares of 9 minutes (fewer stages have more time each):
#   extension     40  compile the CUDA kernels for this GPU with its nvcc, cmake, ninja and pybind11
#   environment   10  machine, driver, compiler, versions, implementations
#   compilation   70  fill Triton's cache: all of the below in parallel at small sizes, results discarded
#   correctness   60  every operation, implementation and dtype, the network and the goldens against float64
#   sanitizer     60  compute-sanitizer memcheck of the kernels at small sizes
#   peaks         15  matrix product, copy, copy within L2
#   operations    55  time of every operation, forward, then forward and backward
#   compiled      90  dense 448 and 1024, S+ and B, against torch.compile (and VITUP_REFERENCE, if set)
#   end_to_end    90  all sizes of the suite, S+ and B, against eager
#   training      40  forward and backward of 75 000 queries
#   profile       25  kernel times of one dense 448 pass per implementation
#   compiled_kernels 100  the extension's kernels: bits against the host, float64, sanitizers, times beside Triton's
#   roofline      10  picture of all the above
# and only by name:
#   tune         500  launch settings for this GPU, written to RESULTS_DIR/settings.json; goes on where it stopped
#
# Every step writes NAME.log and NAME.json into RESULTS_DIR as it goes, so that a step cut short leaves what it has.
# What fails in correctness.json is not timed, in later calls with the same directory either. VITUP_BENCH_DEVICE names
# the device too; on "cpu" sizes are tiny, to try the script itself. PYTHON names the interpreter (python3).
# Exit code: 0 if all steps passed, 1 if one did not, 2 for a wrong argument.
set -uo pipefail

stages=(extension environment compilation correctness sanitizer peaks operations compiled end_to_end training profile
  compiled_kernels roofline)
declare -A share=([extension]=40 [environment]=10 [compilation]=70 [correctness]=60 [sanitizer]=60 [peaks]=15
  [operations]=55 [compiled]=90 [end_to_end]=90 [training]=40 [profile]=25 [compiled_kernels]=100 [roofline]=10 [tune]=500)
extra=(tune)
total_seconds=530
device=${VITUP_BENCH_DEVICE:-cuda}
python=${PYTHON:-python3}
results=
chosen=()

usage() {
  echo "$1 (usage: bench/run_gpu.sh RESULTS_DIR [--device DEVICE] [STAGE ...], stages: ${stages[*]} ${extra[*]})" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --device)
      (($# > 1)) || usage "--device needs a value"
      device=$2
      shift
      ;;
    -*) usage "unknown option $1" ;;
    *)
      if [[ -z $results ]]; then
        results=$1
      elif [[ " ${stages[*]} ${extra[*]} " == *" $1 "* ]]; then
        chosen+=("$1")
      else
        usage "unknown stage $1"
      fi
      ;;
  esac
  shift
done
[[ -n $results ]] || usage "no directory for the results"
((${#chosen[@]})) || chosen=("${stages[@]}")
shares=0
for stage in "${chosen[@]}"; do
  [[ $device == cpu* && " extension compilation sanitizer compiled_kernels tune " == *" $stage "* ]] && continue
  shares=$((shares + share[$stage]))
done
command -v "$python" >/dev/null || usage "no interpreter $python"
python=$(command -v "$python")
mkdir -p "$results" || exit 2
results=$(cd "$results" && pwd)
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The package is not installed: links put its folders where an installation would.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/vitup_fast"
ln -s "$repository"/vitup_fast/* "$scratch/vitup_fast/"
for room in kernels bench; do
  ln -sfn "$repository/$room" "$scratch/vitup_fast/$room"
done
# An extension for this GPU takes the place of what the checkout may have built.
use_extension() {
  local built
  for built in "$results"/extension/_C.*.so; do
    [[ -f $built ]] || continue
    rm -f "$scratch"/vitup_fast/_C.*
    ln -s "$built" "$scratch/vitup_fast/"
  done
}
use_extension
cd "$scratch" || exit 2
export PYTHONPATH=$scratch${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1

if [[ $device == cpu* ]]; then
  splus=tiny both=(tiny) dtypes=(float32) dense=(12) sparse=(20) compared=(10) trained=(30) side=12
  queries=64 backward=norm_linear rounds=(--repeats 1 --no-compile) some=(film_mlp norm_linear golden) quick=(--quick)
else
  splus=dinov3_splus both=(dinov3_splus dinov3_base) dtypes=(bfloat16) compared=(448 1024) trained=(75000)
  dense=(224 448 896 1024 2048) sparse=(100 1000 4096) side=448 queries=33792
  rounds=(--repeats 15 --seconds 3) some=() quick=() backward=operations
fi

failed=()
# step NAME SHARE COMMAND...: run a command within its share of the time; its output goes to NAME.log.
step() {
  local name=$1 limit=$(($2 * total_seconds / shares)) begin=$SECONDS code verdict
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$results/$name.log" 2>&1 </dev/null
  code=$?
  case $code in
    0) verdict=ok ;;
    124 | 137) verdict="FAIL (over $limit s)" ;;
    *) verdict="FAIL (exit code $code)" ;;
  esac
  echo "$name: $verdict, $((SECONDS - begin)) s"
  if ((code)); then
    failed+=("$name")
    tail -n 4 "$results/$name.log" | cut -c -200 | sed 's/^/    /'
  fi
}

bench() { # NAME SHARE MODULE ARGUMENTS...
  local name=$1 limit=$2 module=$3
  shift 3
  step "$name" "$limit" "$python" -m "vitup_fast.bench.$module" --device "$device" --json "$results/$name.json" "$@"
}

timed() { # the same, for what shall not be timed unless it is correct
  local known=()
  [[ -f $results/correctness.json ]] && known=(--correctness "$results/correctness.json")
  implementations
  bench "$@" --impl "${plain[@]}" "${rounds[@]}" "${known[@]}"
}

extension() {
  if [[ $device == cpu* ]]; then
    echo "extension: left out, it needs a GPU"
    return
  fi
  if ! PATH=$PATH:/usr/local/cuda/bin command -v nvcc >/dev/null; then
    echo "extension: left out, there is no nvcc"
    return
  fi
  # Code for compute capability 9.0 and 10.0 may use what those GPUs alone have.
  PATH=$PATH:/usr/local/cuda/bin step extension 40 bash -c '
    architecture=$("$1" -c "
import torch
number = \"{}{}\".format(*torch.cuda.get_device_capability(\"$4\"))
print(number + (\"a\" if number in (\"90\", \"100\") else \"\"))") || exit 1
    cmake -S "$2" -B "$3" -G Ninja -DPython_EXECUTABLE="$1" -DVITUP_FAST_CPU=OFF -DVITUP_FAST_CUDA=ON \
      -DCMAKE_CUDA_ARCHITECTURES="$architecture" && cmake --build "$3"
  ' extension "$python" "$repository" "$results/extension" "$device"
  use_extension
}

# Implementations that run here, without the extension's, whose failures shall not cost the others their results.
implementations() {
  ((${#plain[@]})) && return
  read -ra plain < <("$python" -c "
import torch
from vitup_fast.bench.harness import check_implementations
print(*(n for n in check_implementations(None, torch.device('$device')) if n != 'cuda'))")
}
plain=()

environment() {
  step environment 10 bash -c '
    "$1" -m vitup_fast.cli info || exit 1
    uname -a
    nvidia-smi || true
    nvcc --version || true
    [[ $2 == cpu* ]] || "$1" -c "import torch; assert torch.cuda.is_available(), \"PyTorch sees no GPU\""
  ' environment "$python" "$device"
}

# Kernels compile one after the other within a process; processes share what they have compiled.
compilation() {
  local name preset commands=()
  if [[ $device == cpu* ]]; then
    echo "compilation: left out, it needs a GPU"
    return
  fi
  for name in bilinear_sample residual_mlp rope_cross_attention film_mlp film_mlp_table norm_linear network golden; do
    commands+=("correctness --operation $name")
  done
  for preset in "${both[@]}"; do
    commands+=("end_to_end --preset $preset --dtype ${dtypes[*]} --no-compile --repeats 1 --dense 224 --sparse 100 4096")
    commands+=("end_to_end --preset $preset --dtype ${dtypes[*]} --no-compile --repeats 1 --backward --sparse 9000")
  done
  step compilation 70 bash -c '
    python=$1 device=$2
    shift 2
    for command in "$@"; do
      # shellcheck disable=SC2086 # a command is several words
      "$python" -m vitup_fast.bench.$command --device "$device" >/dev/null &
    done
    wait
  ' compilation "$python" "$device" "${commands[@]}"
}

correctness() {
  implementations
  bench correctness 60 correctness --impl "${plain[@]}" "${quick[@]}" ${some[@]+--operation "${some[@]}"} ${some[@]+--dtype "${dtypes[@]}"}
}

sanitizer() {
  if [[ $device == cpu* ]]; then
    echo "sanitizer: left out, it needs a GPU"
    return
  fi
  implementations
  if [[ " ${plain[*]} " != *" triton "* ]]; then
    echo "sanitizer: left out, Triton does not run here"
    return
  fi
  sanitized sanitizer 60 memcheck triton \
    bilinear_sample residual_mlp rope_cross_attention film_mlp film_mlp_table norm_linear network
}

sanitized() { # NAME SHARE TOOL IMPLEMENTATION OPERATION...
  local name=$1 limit=$2 tool=$3 implementation=$4 checker
  shift 4
  checker=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer)
  # Without PyTorch's pool every tensor has an allocation of its own, whose bounds are checked.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$name" "$limit" \
    "${checker:-compute-sanitizer}" --tool "$tool" --error-exitcode 9 \
    "$python" -m vitup_fast.bench.correctness --device "$device" --quick --impl "$implementation" \
    --dtype bfloat16 float32 --operation "$@" --json "$results/$name.json"
}

# Each step is a process of its own: a kernel that hangs or writes astray ends that step alone.
compiled_kernels() {
  local name tool operations=(bilinear_sample film_mlp film_mlp_table)
  if [[ $device == cpu* ]]; then
    echo "compiled_kernels: left out, it needs a GPU"
    return
  fi
  if ! "$python" -c "
import sys
from vitup_fast import extension
sys.exit(extension.obstacle('cuda') or 0)"; then
    echo "compiled_kernels: left out, they are not built"
    return
  fi
  if "$python" -c "import pytest" 2>/dev/null; then
    step bits 10 "$python" -m pytest -p no:cacheprovider "$repository/tests/test_cuda_kernels.py" -k "gpu or launches"
    step hopper 10 "$python" -m pytest -p no:cacheprovider "$repository/tests/test_hopper_mlp.py" -k on_a_gpu
  fi
  for tool in memcheck racecheck synccheck; do
    sanitized "$tool" 10 "$tool" cuda "${operations[@]}"
  done
  for name in bilinear_sample film_mlp residual_mlp; do
    [[ $name == film_mlp ]] && operations=(film_mlp film_mlp_table) || operations=("$name")
    bench "correctness_$name" 10 correctness --impl cuda --operation "${operations[@]}"
    bench "cuda_$name" 10 "$name" --preset "${both[@]}" --dtype "${dtypes[@]}" --queries "$queries" --no-compile \
      --impl triton cuda "${rounds[@]}" --correctness "$results/correctness_$name.json"
  done
}

peaks() { bench peaks 15 peaks --dtype float32 bfloat16 --repeats "$([[ $device == cpu* ]] && echo 1 || echo 9)"; }

operations() {
  timed operations 30 operations --preset "$splus" --dtype "${dtypes[@]}" --queries "$queries" --no-compile
  timed operations_backward 25 "$backward" --preset "$splus" --dtype "${dtypes[@]}" --queries "$queries" --no-compile \
    --backward
}

compiled() {
  local preset limit=50
  for preset in "${both[@]}"; do
    timed "compiled_$preset" "$limit" end_to_end --preset "$preset" --dtype "${dtypes[@]}" --dense "${compared[@]}"
    limit=40
  done
}

end_to_end() {
  timed end_to_end 90 end_to_end --preset "${both[@]}" --dtype "${dtypes[@]}" --no-compile \
    --dense "${dense[@]}" --sparse "${sparse[@]}"
}

training() {
  timed training 40 end_to_end --preset "${both[@]}" --dtype "${dtypes[@]}" --no-compile --backward \
    --sparse "${trained[@]}"
}

profile() { bench profile 25 kernel_times --preset "$splus" --dtype "${dtypes[0]}" --side "$side"; }

tune() {
  if [[ $device == cpu* ]]; then
    echo "tune: left out, it needs a GPU"
    return
  fi
  step tune 500 "$python" -m vitup_fast.bench.tune --device "$device" --dtype bfloat16 --output "$results/settings.json"
}

roofline() {
  local file files=()
  for file in "$results"/{operations,operations_backward,compiled_*,end_to_end,training}.json; do
    [[ -f $file ]] && files+=("$file")
  done
  if ((${#files[@]} == 0)); then
    echo "roofline: left out, nothing was timed"
    return
  fi
  step roofline 10 "$python" -m vitup_fast.bench.roofline "$results/roofline.png" "${files[@]}"
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

for stage in "${chosen[@]}"; do
  "$stage"
done
echo
summary
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all steps passed; results in $results"

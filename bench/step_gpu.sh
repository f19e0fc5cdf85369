#!/usr/bin/env bash
# What docs/nvidia.md asks of one GPU with 141 GB, in two runs of about six minutes each: `bench/step_gpu.sh short` has the
# sequences of 4096 tokens, `long` those of 32768. Tables and logs go to bench/results, or to the second argument.
# Forecast at 40 % of an H200's bf16 rate: short 90 s, long 300 s of steps, and 30 s to start each command.
set -uo pipefail
out=${2:-bench/results}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
recompute=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
failed=0

step() {
  local name=$1
  shift
  timeout "${LIMIT:-280}" loongforge bench step "$@" --json "$out/step-$name.json" \
    --calibrate "$out/calibration.json" 2>&1 | tee "$out/step-$name.log" || failed=1
}

case ${1:-} in
  short)
    step dense --model-name qwen3-0.6b qwen3-4b --seq-length 4096 --documents 1 8 --steps 5 --gate-steps 6 --profile
    step 8b --model-name qwen3-8b --num-layers 18 --seq-length 4096 --steps 5 --gate-steps 4 --rounds 1
    step moe --model-name qwen3-30b-a3b --num-layers 6 --moe-aux-loss-coeff 0 --seq-length 4096 --steps 5 --gate-steps 4 \
      --profile
    ;;
  long)
    step 0.6b-32k --model-name qwen3-0.6b --seq-length 32768 --documents 1 8 --steps 2 --gate-steps 3 --rounds 1
    step 4b-32k --model-name qwen3-4b --seq-length 32768 "${recompute[@]}" --steps 2 --gate-steps 3 --rounds 1 \
      --sides ours transformers megatron
    step moe-32k --model-name qwen3-30b-a3b --num-layers 6 --moe-aux-loss-coeff 0 --seq-length 32768 "${recompute[@]}" \
      --steps 2 --gate-steps 3 --rounds 1 --sides ours transformers megatron
    ;;
  *)
    echo "usage: bench/step_gpu.sh short|long [directory]" >&2
    exit 2
    ;;
esac
exit $failed

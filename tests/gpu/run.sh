#!/usr/bin/env bash
# Everything that only a GPU can show, part by part, into one folder; each part is cut off after its
# share of the time and leaves what it has. Without a GPU the same runs in small: a rehearsal.
#   tests/gpu/run.sh OUT [PART ...]      parts: tests meters goals large small seven pipeline
# PYTHON: interpreter (python3). SCALE: multiplies all limits (1 = ten minutes together). BLOCKS: of
# each comparison (5).
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests meters goals large small seven pipeline)
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/tests:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
rehearse=()
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || rehearse=(--rehearse)
failed=0

part() { # name, seconds, command …
    local name=$1 limit
    limit=$(awk "BEGIN { print $2 * ${SCALE:-1} }")
    shift 2
    echo "== $name: at most $limit s"
    timeout --signal=INT --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1
    local status=$?
    echo "== $name: exit $status after ${SECONDS} s in all"
    [ $status -eq 0 ] || failed=1
    tail -n 15 "$out/$name.log"
}
matrix() { # name, seconds: stops starting blocks in time to write its report
    part "$1" "$2" "$python" -m bench.run "matrices/gpu/$1.yaml" --out "$out" \
        --budget "$(awk "BEGIN { print int(0.85 * $2 * ${SCALE:-1}) }")"
}

for name in "${parts[@]}"; do
    case $name in
    tests) NVML_TRACE="$out/nvml.jsonl" part tests 120 "$python" -m pytest -m gpu -rs ;;
    meters) part meters 40 "$python" -m bench.overhead matrices/gpu/opt-125m.yaml ;;
    goals)
        part goals 90 "$python" -m perf.on_gpu "${rehearse[@]}" --blocks "${BLOCKS:-5}" --out "$out/goals.md" \
            same limits training trainer gating outputs evaluation
        ;;
    large)
        part large 110 "$python" -m perf.on_gpu "${rehearse[@]}" --blocks "${BLOCKS:-5}" --out "$out/large.md" \
            layer "large limits" "large trainer" "4 bit"
        ;;
    small) matrix opt-125m 110 ;;
    seven) matrix llama-2-7b 130 ;;
    pipeline) matrix pipeline 100 ;;
    *)
        echo "no part $name" >&2
        exit 2
        ;;
    esac
done
exit $failed

#!/usr/bin/env bash
# The program's main job on a GPU: tested, timed and run.
#
#   bash replication/gpu.sh OUT                        # all parts, about 15 minutes on one H100
#   bash replication/gpu.sh OUT tests speed            # some of them: tests, compile, speed, train, ladder
#   LIMIT=450 bash replication/gpu.sh OUT fused        # more: other ways to the published mask, inference compiled
#   bash replication/gpu.sh OUT --small                # a dry run on a CPU, 3 minutes of 2 cores
#
# Nothing is downloaded. CIFAR-10 is the folder $CIFAR10, by default datasets/cifar10/, with train/ and val/ of class
# folders; where there is none, datasets/cifar10.tar.gz is unpacked. Photos are those of the folder $PHOTOS, laid out in
# the same way; without it some are drawn. $AUTHORS is models/ of a clone of github.com/techmonsterwang/iLLaMA, which
# `fused` times, too. Every part is ended after $LIMIT seconds (230), and what it has measured by then is in OUT, a row at a
# time. The ladder runs $JOBS (4) at once for $EPOCHS, or for as many as a pilot says will fit; it saves itself, and with
# the same $EPOCHS goes on where it was in the next call. $STEPS are the steps that it trains, with one seed, if not all
# that there is time for.
set -uo pipefail
cd "$(dirname "$0")/.."
small="" parts=() out=""
for word in "$@"; do
    case $word in
        --small) small=yes ;;
        tests|compile|speed|fused|train|ladder) parts+=("$word") ;;
        *) out=${out:-$word} ;;
    esac
done
[ -n "$out" ] || { echo "error: give the folder for the rows: bash replication/gpu.sh OUT" >&2; exit 2; }
[ ${#parts[@]} -gt 0 ] || parts=(tests compile speed train ladder)
mkdir -p "$out"
python=${PYTHON:-python3}
limit=${LIMIT:-230}
device=cuda
[ -z "$small" ] || device=cpu
failed=0
cut=124                                             # timeout's exit code: what was measured counts

run() {    # a command, ended after what is left of its part's time; what it says is kept
    echo "+ $*" | tee -a "$out/log.txt"
    local left=$((began + limit - SECONDS))
    [ $left -gt 0 ] || { echo "no time left" | tee -a "$out/log.txt"; return 0; }
    timeout --signal=TERM --kill-after=30 $left "$@" 2>&1 | tee -a "$out/log.txt"
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || { echo "exit code $code: $*" | tee -a "$out/log.txt"; [ "$code" -eq "$cut" ] || failed=1; }
}

tests() {
    local cut=0                                     # tests that are cut short have failed
    GPU_TESTS_ON=$device run "$python" -m pytest tests/test_gpu.py -m gpu -q -rs -p no:cacheprovider --durations=10
}

model() {    # NAME and flags of bench_model.py, which appends to speed-NAME.jsonl
    local name=$1
    shift
    run "$python" -m replication.bench_model --device $device --out "$out/speed-$name.jsonl" "$@"
}

trainings() {    # calls $1 with each: its name, size, batch size, image sizes and models
    $1 tiny tiny 256 224 timm none causal soft soft_log
    $1 tokens tiny 16 "512 1024" none causal
    wait                                            # compiled all at once they take more than 80 GB
    $1 base base 128 224 timm causal soft
    $1 small small 256 224 timm soft
    wait
}

compile_each() {    # begins to: each model in a process of its own, into torch's cache on disk
    local size=$2 batch=$3 img_sizes=$4 img_size one
    for one in "${@:5}"; do
        for img_size in $img_sizes; do
            run "$python" -m replication.bench_model --device $device --sizes $size --batch-sizes $batch --dtypes bfloat16 \
                --compile 1 --img-sizes $img_size --models "$one" --repeats 1 &
        done
    done
}

time_all() {
    model training-$1 --sizes $2 --batch-sizes $3 --img-sizes $4 --models "${@:5}" --dtypes bfloat16 --compile 1
}

compile() {    # what `speed` takes from the cache
    [ -n "$small" ] || trainings compile_each
}

speed() {    # the most important first
    if [ -n "$small" ]; then
        model training --models none causal soft --dtypes float32 --compile 0 --img-sizes 32 --batch-sizes 2 --repeats 1
        model inference --models none causal --inference --dtypes float32 tf32 --compile 0 --img-sizes 32 --batch-sizes 2 --repeats 1
        return
    fi
    trainings time_all
    # Table 6 of the paper: DeiT and iLLaMA, whose mask is multiplied after the softmax
    model inference --inference --sizes tiny small base --batch-sizes 1024 --models timm causal soft --dtypes bfloat16 tf32 \
        --compile 0 --repeats 5
    model training-float32 --sizes tiny --batch-sizes 256 --models timm causal soft --dtypes float32 tf32 --compile 0 --repeats 5
}

other_ways() {
    local size
    for size in tiny small base; do
        $1 fused-$size $size 128 224 timm soft "soft, two passes" "soft, doubled keys"
        wait
        $1 fused-$size-384 $size 32 384 timm soft "soft, two passes" "soft, doubled keys"
        wait
    done
}

fused() {    # other ways to the published mask; and inference compiled, all masks, beside the authors' model if it is there
    if [ -n "$small" ]; then
        model fused --models soft "soft, doubled keys" --dtypes float32 --compile 0 --img-sizes 32 --batch-sizes 2 --repeats 1
        return
    fi
    other_ways compile_each
    other_ways time_all
    local size models=(timm none causal soft soft_log)
    [ -z "${AUTHORS:-}" ] || models+=(published)
    for size in tiny small base; do
        PYTHONPATH=${AUTHORS:-}:${PYTHONPATH:-} model inference-compiled --inference --sizes $size --batch-sizes 256 1024 \
            --models "${models[@]}" --dtypes bfloat16 --compile 1 --repeats 5
    done
}

photos() {    # the folder of photos, made if there is none
    local count=$1
    if [ -z "${PHOTOS:-}" ]; then
        PHOTOS=$out/photos
        [ -d "$PHOTOS/train" ] || run "$python" -m replication.bench_data "$PHOTOS" --make "$count" --images 32 --repeats 1 --models ours
    fi
}

train() {
    local flags="--batch-size 512 --workers $(nproc) --epochs 1 --warmup-epochs 0 --soft-mask-epochs 0 --dtype bfloat16 --compile"
    if [ -n "$small" ]; then
        run "$python" -m torch.distributed.run --standalone train.py --size tiny --device cpu --depth 1 --patch-size 16 \
            --epochs 1 --warmup-epochs 0 --soft-mask-epochs 0 --batch-size 2000 --micro-batch 500 --out "$out/first" --resume
        photos 1000
        flags="--device cpu --batch-size 8 --micro-batch 8 --workers 2 --epochs 1 --warmup-epochs 0 --soft-mask-epochs 0 --img-size 32 --depth 1"
        run "$python" train.py --data "$PHOTOS" --size tiny $flags --out "$out/photos-tiny" --resume
        return
    fi
    run "$python" -m torch.distributed.run --standalone train.py --size tiny --out "$out/first" --resume
    photos 102400                                   # 200 iterations of 512
    run "$python" -m replication.bench_data "$PHOTOS" --workers "$(nproc)" --models ours --repeats 1 --batch-size 128 --images 640 \
        --out "$out/data.jsonl"
    run "$python" train.py --data "$PHOTOS" --size tiny $flags --micro-batch 512 --out "$out/photos-tiny" --resume
    run "$python" train.py --data "$PHOTOS" --size base $flags --micro-batch 256 --out "$out/photos-base" --resume
}

ladder() {
    local data=${CIFAR10:-datasets/cifar10} jobs=${JOBS:-4} long=(--long) epochs=${EPOCHS:-} least=6 most=100
    local groups=("rmsnorm ps_cls soft_mask vit" "swiglu rope abs_pos soft_log modified rope_alone") seeds="1 3"
    if [ -n "$small" ]; then
        photos 1000
        data=$PHOTOS jobs=1 long=("--with=--dtype float32 --no-compile") groups=(rmsnorm) seeds=1 least=1 most=1
    elif [ ! -d "$data/train" ] && [ -f datasets/cifar10.tar.gz ]; then
        mkdir -p "$data" && tar xzf datasets/cifar10.tar.gz -C "$data" --strip-components=1
    fi
    local program=("$python" -m replication.ladder "${long[@]}" --data "$data" --device $device --jobs "$jobs")
    [ -z "${STEPS:-}" ] || groups=("$STEPS") seeds=1
    if [ -z "$epochs" ]; then
        # A pilot: how long does an epoch of so many runs at once take, its evaluation included, once they are compiled?
        run "${program[@]}" --epochs 3 --seeds 1 --steps ${groups[0]} --out "$out/pilot"
        [ -s "$out/pilot/rows.jsonl" ] || { echo "the pilot left no rows"; failed=1; return; }
        epochs=$("$python" - "$out/pilot" $((began + limit - SECONDS - 40)) $least $most <<'END'    # 40 seconds to start
import json
import sys
from pathlib import Path
folder, seconds, least, most = Path(sys.argv[1]), *map(int, sys.argv[2:])
times = [[json.loads(line)["time_s"] for line in file.read_text().splitlines()] for file in folder.glob("*/metrics.jsonl")]
slowest = max((run[-1] - run[0]) / (len(run) - 1) for run in times)
print(max(least, min(most, int(0.8 * seconds / slowest))))             # 0.8: the pilot's runs were not all at once
END
)
    fi
    for count in $seeds; do
        for steps in "${groups[@]}"; do
            run "${program[@]}" --epochs "$epochs" --seeds "$count" --steps $steps --out "$out/ladder-$epochs"
        done
    done
    # Curves; without matplotlib the rows are all there is.
    "$python" -m downstream.compare "$out/ladder-$epochs"/*/metrics.jsonl --plot "$out/ladder-$epochs.png" || true
}

nvidia-smi -L 2>/dev/null | tee -a "$out/log.txt"
for part in "${parts[@]}"; do
    began=$SECONDS
    $part
    echo "$part: $((SECONDS - began)) s" | tee -a "$out/log.txt"
done
exit $failed

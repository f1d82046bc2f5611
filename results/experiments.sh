#!/usr/bin/env bash
# The experiments behind RESULTS.md, in order. Each run continues where it was stopped, and a finished one is skipped:
# call this script again after Ctrl-C, SIGTERM or a crash. Every run uses one thread. Settings by environment:
#   OUT     where runs go                                    (default runs/experiments)
#   CIFAR   CIFAR-10 as folders train/CLASS and test/CLASS   (default data/cifar10)
#   SEEDS   default "0 1 2"
#   ONLY    a pattern of run names, such as 'segmentation/*' (default all)
set -euo pipefail
shopt -s extglob  # @(a|b) in ONLY, for old versions of bash
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/experiments} CIFAR=${CIFAR:-data/cifar10} SEEDS=${SEEDS:-0 1 2} ONLY=${ONLY:-*}
export OMP_NUM_THREADS=1

run() {  # name, then the command
    local name=$1
    shift
    # shellcheck disable=SC2053  # a pattern
    [[ $name == $ONLY ]] || return 0
    [[ -e $OUT/$name/castled.pt ]] && return 0
    echo "== $name: $*"
    python "$@" --output "$OUT/$name" --workers 0
}

# 1. Why is segmentation behind softmax? softmax_normed without DWConvs differs from softmax in the normalised output
#    alone, linear_angular without DWConvs from that in the kernel alone. Others add the DWConv on V, that in the MLPs,
#    and the global constant of Eq. (8) that Eq. (9) replaces (`angular` has it). Then the backbone's learning rate.
for seed in $SEEDS; do
    segment() { run "segmentation/$1-$seed" segment.py --seed "$seed" "${@:2}"; }
    segment softmax --attention softmax
    segment softmax-mlp_dwconv --attention softmax --mlp-dwconv 3
    segment softmax_normed-no_dwconvs --attention softmax_normed --dconv 0 --mlp-dwconv 0
    segment linear_angular-no_dwconvs --attention linear_angular --dconv 0 --mlp-dwconv 0
    segment linear_angular --attention linear_angular
    segment linear_angular-no_mlp_dwconv --attention linear_angular --mlp-dwconv 0
    segment angular --attention angular
    segment relu_e --attention relu_e
    for factor in 0.3 3; do
        segment "softmax-backbone_lr$factor" --attention softmax --backbone-lr "$factor"
        segment "linear_angular-no_dwconvs-backbone_lr$factor" --attention linear_angular --dconv 0 --mlp-dwconv 0 \
            --backbone-lr "$factor"
    done
done

# DeiT-mini on CIFAR-10: 65 tokens in every layer. An epoch is 50,000 images.
small="train.py --data $CIFAR --model deit_mini --image-size 32 --batch-size 64 --optimizer adamw --schedule cosine
    --smoothing 0.1 --mixup 0 --cutmix 0 --randaugment 0 --erasing 0"

# 2. Conversion of a trained softmax network, where a branch ought to pay: 300,000 images as softmax, then 50,000 more.
#    From scratch, with 350,000 images, as controls: softmax_normed is the castling architecture with softmax.
for seed in $SEEDS; do
    base=$OUT/conversion/softmax-6-$seed
    convert() { run "conversion/$1-$seed" $small --epochs 1 --lr 0.004 --seed "$seed" --checkpoint "$base/best.pt" "${@:2}"; }
    scratch() { run "conversion/$1-scratch-$seed" $small --epochs 7 --lr 0.008 --seed "$seed" "${@:2}"; }
    run "conversion/softmax-6-$seed" $small --epochs 6 --lr 0.008 --seed "$seed" --attention softmax
    convert softmax --attention softmax
    convert linear_angular --attention linear_angular
    convert ramp --attention castling --mask-schedule ramp
    convert anneal --attention castling --mask-schedule anneal
    convert fixed --attention castling --mask-schedule fixed
    convert anneal-zero_dconv --attention castling --mask-schedule anneal --zero-dconv
    convert linear_angular-zero_dconv --attention linear_angular --zero-dconv
    scratch softmax --attention softmax
    scratch softmax_normed --attention softmax_normed
    scratch linear_angular --attention linear_angular
    scratch anneal --attention castling --mask-schedule anneal
done

# 3. Does the kernel matter? 100,000 images. `identity` mixes tokens by its DWConvs alone. softmax_normed is softmax in
#    the castling architecture.
# 4. What of the castling architecture does it? Either DWConv, or the normalised output? All together is in 3.
# 5. Accuracy against the number of tokens: patches of 8, 4 and 2 pixels are 17, 65 and 257 tokens. 65 is in 3.
for seed in $SEEDS; do
    kernels() { run "kernels/$1-$seed" $small --epochs 2 --lr 0.008 --seed "$seed" "${@:2}"; }
    for kernel in linear_angular identity softmax relu_e relu_s cosine mc softmax_linear angular; do
        kernels "$kernel" --attention "$kernel"
    done
    kernels linear_angular-no_dconv --attention linear_angular --dconv 0
    kernels linear_angular-no_mlp_dwconv --attention linear_angular --mlp-dwconv 0
    kernels linear_angular-no_dwconvs --attention linear_angular --dconv 0 --mlp-dwconv 0
    kernels softmax-mlp_dwconv --attention softmax --mlp-dwconv 5
    kernels softmax_normed --attention softmax_normed
    kernels softmax_normed-no_dwconvs --attention softmax_normed --dconv 0 --mlp-dwconv 0
    for patch in 8 2; do
        for kernel in linear_angular softmax identity; do
            kernels "$kernel-patch$patch" --attention "$kernel" --patch-size "$patch"
        done
    done
done

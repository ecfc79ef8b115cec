"""The paper's figures, from results/published-tables.jsonl, and ours beside them: a table of docs/paper.md."""
from statistics import fmean

import torch

from experiments.ladder import PUBLISHED
from experiments.properties import multiply_accumulates
from experiments.results import MODELS, TRANSFERRED, climbed, means, percent, seeds_of, segmented, selected, table, transferred
from model import VisionTransformer, config


def paper_table():
    top1, train, test = (climbed(key)[0] for key in ("test_acc1", "train_loss", "test_loss"))
    with torch.device("meta"):
        models = [VisionTransformer(config(size)) for size in ("tiny", "small", "base", "large")]
    parameters = " / ".join(f"{sum(p.numel() for p in each.parameters()) / 1e6:.1f}" for each in models)
    macs = " / ".join(f"{multiply_accumulates(each.cfg)['published'] / 1e9:.1f}" for each in models)
    ece, rank = ([seeds_of("properties", key, step) for step in MODELS] for key in ("ece", "rank_80"))
    shape = [percent(seeds_of("shape-bias", "shape_bias", step)) for step in MODELS]
    starts = [[epochs[-1] for epochs in selected(start)] for start in ("uniform", "random")]
    miou = [[row["test_miou"] for row in segmented("segment", step, True)] for step in ("rmsnorm", "soft_mask")]
    schedules, soft = ["no soft mask", "linear 50", "constant 50"], ["no soft mask", "soft mask"]
    illama, deit = ["iLLaMA-T", "iLLaMA-S", "iLLaMA-B"], ["DeiT-Ti", "DeiT-S", "DeiT-B"]
    bits, others = ["iLLaMA, 32 bits", "iLLaMA, 8 bits"], ["ConvNeXt-B", "DeiT3-B", "iLLaMA-B"]
    cifar, starting = ["ViT-T", "iLLaMA-T, no soft mask", "iLLaMA-T, soft mask"], ["LLaMA2-7B, weight selection", "random weights"]
    lines = [  # where in the paper, what, the entries there: of which rows, with how many digits; ours
        ("Table 3", "top-1 without soft mask / linear / constant, T", "tiny", schedules, 1,
         means(*(top1[step] for step in ("abs_pos", "soft_mask", "soft_constant")))),
        ("Table 3", "the same, B", "base", schedules, 1, ""),
        ("Table 4", "training loss without / with soft mask, T", "tiny_train", soft, 3,
         means(train["abs_pos"], train["soft_mask"], digits=3)),
        ("Table 4", "test loss, T", "tiny_test", soft, 3, means(test["abs_pos"], test["soft_mask"], digits=3)),
        ("Table 4", "training loss, B", "base_train", soft, 3, ""),
        ("Table 4", "test loss, B", "base_test", soft, 3, ""),
        ("Table 6", "parameters in millions, T / S / B / L", "params_m", [*illama, "iLLaMA-L, IN-21K"], 1, parameters),
        ("Table 6", "multiply-accumulates in G, T / S / B / L", "gmacs", [*illama, "iLLaMA-L, IN-21K"], 1, macs),
        ("Table 6", "images/s on an A100, iLLaMA-T / S / B", "images_per_s", illama, 0, ""),
        ("Table 6", "images/s on an A100, DeiT-Ti / S / B", "images_per_s", deit, 0, ""),
        ("Table 7", "top-1 with 32 / 8 bits, T", "tiny", bits, 1,
         means(*(seeds_of("properties", key, "soft_mask") for key in ("test_acc1", "int8_acc1")))),
        ("Table 7", "the same, S", "small", bits, 1, ""),
        ("Table 8", "calibration error: ConvNeXt-B / DeiT3-B / iLLaMA-B; here ViT / iLLaMA", "ece", others, 4, means(*ece, digits=4)),
        ("Table 8", "shape decisions, %, of the same models", "shape", others, 2, means(*shape)),
        ("Table 9", "top-1 on CIFAR-10: ViT-T / iLLaMA-T without / with soft mask; here ViT / iLLaMA, five classes", "cifar10",
         cifar, 1, means(*(transferred("fine-tuning", step, 100) for step in TRANSFERRED))),
        ("Table 9", "top-1 on CIFAR-100", "cifar100", cifar, 1, ""),
        ("Table 10", "mIoU, ADE20K: ViT-T / iLLaMA-T; here CamVid, ViT / iLLaMA", "miou", ["ViT-T", "iLLaMA-T"], 1, means(*miou)),
        ("Table 10", "mIoU, ADE20K: ViT-B / iLLaMA-B", "miou", ["ViT-B", "iLLaMA-B"], 1, ""),
        ("Table 18", "top-1 from LLaMA-2 weights / random weights, T; here from a larger iLLaMA's, 3 epochs", "tiny", starting, 1,
         means(*starts)),
        ("Table 18", "the same, S", "small", starting, 1, ""),
        ("Table 18", "the same, B", "base", starting, 1, ""),
        ("Figure 4", "singular values for 80 % in layer 1: head 1 of ViT-T / iLLaMA-T, of 197; here all heads, of 65", "rank_80",
         ["ViT-T", "iLLaMA-T"], 0, means(*([fmean(seed[0]) for seed in seeds] for seeds in rank)))]
    theirs = {(row["source"], row["row"]): row for row in PUBLISHED}
    return table("paper | what | published | here", [
        [source, what, " / ".join(f"{theirs[source, name][key]:.{digits}f}" for name in names), here]
        for source, what, key, names, digits, here in lines], left=2)

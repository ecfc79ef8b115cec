"""How accurate is a model after each row of patches?

    python -m replication.anytime out/a out/b --out out/rows.jsonl

A row for each checkpoint; downstream/anytime.py reads and trains.
"""
from pathlib import Path

import torch

from data import normalize
from downstream.anytime import on_rows
from harness.flags import check_bounds
from harness.processes import report_errors
from replication.properties import append_row, open_subjects, parser_of_checkpoints


@torch.no_grad()
def accuracy_by_row(subject):
    """Top-1 in percent after each row of patches. InputError if an image cannot be read."""
    hits = [0] * subject.model.cfg.grid
    for images, labels in subject.batches(subject.source):
        images, labels = normalize(images.to(subject.device)), labels.to(subject.device)
        for row in range(len(hits)):
            guess = on_rows(subject.model, images, 1 + row).argmax(-1)
            hits[row] += (guess == labels).sum().item()
    return [100 * count / len(subject.source) for count in hits]


@report_errors()
def main(argv=None):
    args = parser_of_checkpoints("anytime", __doc__).parse_args(argv)
    check_bounds(vars(args))
    for subject in open_subjects(args):
        by_row = accuracy_by_row(subject)
        folder = Path(subject.path).parent if Path(subject.path).is_file() else Path(subject.path)
        row = dict(run=folder.name, test_acc1=by_row[-1], acc1_by_row=by_row)
        append_row(subject.described() | row, args.out)


if __name__ == "__main__":
    main()

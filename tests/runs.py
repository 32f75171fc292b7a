"""Readers of the files that a run writes to its folder."""

import csv
import json

import torch


def read_metrics(folder):
    """Returns the report in `metrics.json`."""
    return json.loads((folder / "metrics.json").read_text())


def read_column(folder, name):
    """Returns the logged values of a metric, as the text in `metrics.csv`."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [row[name] for row in csv.DictReader(file) if row.get(name)]


def read_losses(folder):
    """Returns the training loss of each logged step, as text, so that equal losses are equal in every digit."""
    return read_column(folder, "train/loss")


def load_state(folder, name="last"):
    """Returns the tensors of a checkpoint of a run."""
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]

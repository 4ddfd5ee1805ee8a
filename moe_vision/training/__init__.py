"""Training: a schedule of stages (what trains, on which data, how long) on transformers' Trainer."""

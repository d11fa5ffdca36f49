"""Where our side of the parity tests runs: on the CPU, or on a GPU with INFERFLEET_TEST_DEVICE=cuda."""

import os

import torch

DEVICE = torch.device(os.environ.get("INFERFLEET_TEST_DEVICE", "cpu"))
CPU = torch.device("cpu")

"""One thread: the models of the tests are tiny, and more threads would wait for one another, here and in processes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

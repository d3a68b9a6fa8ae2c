"""Losses: pure functions of tensors to a scalar, with keyword-only options.

Unless the docstring of a loss says otherwise:

* Features are (N, D), and row i of one belongs to row i of the other. They are normalised inside.
* Values and gradients are computed in float32, or in float64 if an input is float64, also under autocast. Features in
  half precision get a gradient of their own type.
* With several processes, give the features of all of them, gathered with gradient: value and gradient are then those
  of the global batch. The mean of what each process computes on its own features is another number; only for
  ``swapped_prediction``, the losses of cells and ``masked_mse`` it is the same, and they need no gathering.
* ``chunk_size`` is how many rows of the N x N matrix of pairs exist at a time (None: all). It changes neither value
  nor gradient.
* A loss gives the numbers of its paper and of the authors' code, but for what stands under "Departures".
"""

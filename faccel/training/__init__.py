"""One training step: model, precision, gradients, update."""

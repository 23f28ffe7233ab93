"""Tensors alone: vectors, what is updated together, and the one place that knows autograd's corners."""

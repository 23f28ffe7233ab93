"""One training step as a differentiable map of one state: its gradient stage, then its update stage."""

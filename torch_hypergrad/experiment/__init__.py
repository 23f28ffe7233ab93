"""The user's layer: from a configuration to a trained model, its report, and a resumed run."""

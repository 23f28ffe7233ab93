"""What is tuned: as a user writes it down, its values, and its hypergradient."""

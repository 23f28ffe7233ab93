"""What must hold before, during and after: arguments, checkpoints, writes by others, numbers that are not
finite."""

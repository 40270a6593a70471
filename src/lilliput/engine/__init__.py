"""What executes a recipe: the loop, the run directory, checkpoints, several processes."""

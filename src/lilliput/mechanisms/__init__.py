"""Building blocks that methods share, and that know nothing of recipes, runs or training loops."""

"""Growing: a stage's network starts from what an earlier, smaller or simpler one has learned."""

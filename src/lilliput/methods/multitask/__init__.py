"""Many tasks in one network: a backbone that is there once, and what each task adds to it."""

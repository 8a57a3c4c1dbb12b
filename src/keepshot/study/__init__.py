"""Studies of many models: what to run, and what may be concluded from it."""

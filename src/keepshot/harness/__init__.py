"""At home in lm-evaluation-harness, both ways: our engine as its model, its tasks as ours."""

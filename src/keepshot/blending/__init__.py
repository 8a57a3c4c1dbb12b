"""Partial adaptation: base + lambda * (tuned - base), swept, picked and written."""

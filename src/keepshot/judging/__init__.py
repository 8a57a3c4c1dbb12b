"""Instruction following: verifiable instructions, and pairwise win rates."""

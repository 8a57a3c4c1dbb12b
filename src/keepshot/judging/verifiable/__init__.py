"""Checks of verifiable instructions: pure functions of the answer's text."""

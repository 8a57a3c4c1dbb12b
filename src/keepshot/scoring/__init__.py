"""Tokens in, numbers out: requests, the plan that shares their beginnings, and what runs it."""

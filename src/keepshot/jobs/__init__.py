"""One job per command: a frozen spec in, a run directory out.

Jobs compose loading, tuning, blending and measuring; they know nothing of flags or terminals.
"""

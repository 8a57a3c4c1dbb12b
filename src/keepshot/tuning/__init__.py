"""A recipe becomes changed weights: what trains (methods), on what (data), held by what (terms)."""

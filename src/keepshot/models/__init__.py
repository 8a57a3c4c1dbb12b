"""A reference becomes a live model, or a stream of tensors."""

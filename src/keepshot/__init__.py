"""Fine-tune a language model without losing its in-context learning."""

__version__ = "0.1.0"

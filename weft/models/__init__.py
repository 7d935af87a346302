"""Model families as assembly, presets, and the tables of their Hugging Face keys."""

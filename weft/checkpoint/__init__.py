"""Sharded checkpoints with checksums, committed by rename; Hugging Face in and out."""

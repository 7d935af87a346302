"""Fingerprinted, resumable sources packed into batches with document boundaries. Knows no ranks."""

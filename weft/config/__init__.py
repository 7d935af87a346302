"""Frozen configuration base, strict loader, dotted overrides and errors. No torch."""

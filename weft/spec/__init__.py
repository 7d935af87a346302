"""Every config dataclass, dimension names, and counts of parameters and operations. No torch."""

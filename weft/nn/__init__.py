"""One-device layers with slots for what a parallel layout may put in."""

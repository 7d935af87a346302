"""Generation with a hybrid cache."""

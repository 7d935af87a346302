"""Where model and layout meet: parameters from specs, initial values, the assembled model."""

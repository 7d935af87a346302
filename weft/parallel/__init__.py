"""What a layout needs on torch: communicators, slot fillers, gradient reduction."""

"""Mathematical functions: one readable reference each, and named fast back ends."""

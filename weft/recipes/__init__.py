"""Complete runs as typed functions, and the command line."""

"""What is read off a machine while a stage runs, and what must hold of the figures."""

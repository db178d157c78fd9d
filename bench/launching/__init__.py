"""How a worker is started somewhere, watched, ended, and its end named."""

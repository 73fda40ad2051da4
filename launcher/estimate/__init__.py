"""Memory estimates from a config alone, and the settings chosen by them."""

"""What `make demo`, `make video` and `make serve` run, and how their small models were trained."""

"""Every script that prints a number which the documentation shows; see README.md."""

"""The scripts behind every number in the documentation; see README.md."""

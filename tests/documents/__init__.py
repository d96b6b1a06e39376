"""The documents say what is so: links, commands, references, examples."""

"""Where video and text tokens lie in the sequence of each transformer family."""

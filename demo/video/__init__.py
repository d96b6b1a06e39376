"""The video demonstration: a small trained model of moving shapes, and `make video`."""

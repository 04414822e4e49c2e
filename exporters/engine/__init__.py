"""TensorRT engines: a graph is parsed, verified against its precision, and built into a plan."""

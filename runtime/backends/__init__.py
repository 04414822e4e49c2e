"""What computes the graphs: ONNX Runtime and TensorRT, on a CPU and on a GPU, behind one protocol."""

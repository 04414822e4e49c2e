"""ONNX graphs: traced from the model, cleaned, derived, cast, verified and written."""

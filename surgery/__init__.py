"""Edit transformer weights, ship them through ONNX, and prove that both did what was asked."""
